"""The prompt that is timed: text, one image, text that asks; every row of a batch alike."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hawk_compile.capture.encode import run_encoders
from hawk_compile.capture.features import FEATURES, LAYER_FEATURES
from hawk_compile.capture.modalities import PER_TOKEN_INPUTS, along_prompt, read_for_positions
from hawk_compile.errors import InputError
from hawk_compile.runtime.positions import deltas_of
from hawk_compile.tools.benchmarking.images import Picture, pixels

LEAST_TEXT = 8
FIRST_WORD, WORDS = 8, 512
"""Ids that text is drawn from, those with a meaning left out."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, B rows alike.

    Attributes:
        image: what gives the visual tokens.
        ids: [B, S] int64 on the model's device.
        visual: where each row's visual tokens stand. question: where the text that votes stands.
        whole: the arguments of a forward with pixels.
    """

    image: Picture
    ids: Tensor
    visual: slice
    question: slice
    whole: dict[str, Any]

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """S."""
        return self.ids.shape[1]


def make(model: Any, image: Picture, text: int, rows: int, device: torch.device) -> Prompt:
    """A prompt of that image with `text` other tokens, half of them before the image."""
    config = model.config
    words, ends = plain_ids(model), end_of_turn(model)
    start, stop = (named_id(config, f"vision_{side}_token_id") for side in ("start", "end"))
    around = len(start) + len(stop) + len(ends)
    spoken = words[torch.randint(len(words), (text - around,), generator=torch.Generator().manual_seed(text))].tolist()
    before, behind, tail = spoken[: len(spoken) // 2], spoken[len(spoken) // 2 : -1], spoken[-1:]
    lead = [*before, *start]
    visual = slice(len(lead), len(lead) + image.tokens)
    asked = visual.stop + len(stop)
    row = [*lead, *[config.image_token_id] * image.tokens, *stop, *behind, *ends, *tail]
    ids = torch.tensor([row] * rows, device=device)
    question = slice(asked, asked + len(behind) if ends else ids.shape[1])
    given = {name: value.to(device) for name, value in pixels(config, image, rows).items()}
    given = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in given.items()}
    if hasattr(model.base_model, "rope_deltas"):
        given["mm_token_type_ids"] = (ids == config.image_token_id).long()
    whole = {"input_ids": ids, "logits_to_keep": 1, **given}
    return Prompt(image, ids, visual, question, whole)


def check_text(text: int) -> None:
    """Raises InputError for a prompt too short to ask anything."""
    if text < LEAST_TEXT:
        raise InputError(f"text must be at least {LEAST_TEXT} tokens, got {text}")


def named_id(config: PreTrainedConfig, name: str) -> list[int]:
    found = getattr(config, name, None)
    return [found] if isinstance(found, int) else []


def end_of_turn(model: Any) -> list[int]:
    """The id that ends what votes; none if the model names none."""
    found = model.generation_config.eos_token_id
    return [found[0]] if isinstance(found, (list, tuple)) else [] if found is None else [found]


def plain_ids(model: Any) -> Tensor:
    """Ids that no config gives a meaning."""
    size = model.config.get_text_config().vocab_size
    configs = (model.config, model.config.get_text_config(), model.generation_config)
    special = {each for config in configs for name in dir(config) if name.endswith(("_token_id", "_token_index"))
               for each in listed(getattr(config, name))}  # fmt: skip
    return torch.tensor([each for each in range(min(FIRST_WORD, size // 2), min(size, WORDS)) if each not in special])


def listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given]


def shortened(prompt: Prompt, given: dict[str, Any], kept: int) -> dict[str, Any]:
    """The arguments of a forward whose rows hold `kept` of their visual tokens and never held more.

    Args:
        given: those of the whole prompt, encoded.
    """
    device = prompt.ids.device
    start, stop = prompt.visual.start, prompt.visual.stop
    places = torch.cat([torch.arange(start + kept, device=device), torch.arange(stop, prompt.length, device=device)])
    first = torch.arange(prompt.rows, device=device)[:, None] * prompt.image.tokens
    features = (first + torch.arange(kept, device=device)).flatten()

    def cut(whole: Any) -> Any:
        rows = torch.cat(list(whole))[features]
        return rows.unsqueeze(0) if isinstance(whole, Tensor) else [rows]

    (modality, output), = given["mm_encoder_outputs"].items()
    parts = {FEATURES: cut(output[FEATURES])}
    if output.get(LAYER_FEATURES) is not None:
        parts[LAYER_FEATURES] = [cut(level) for level in output[LAYER_FEATURES]]
    names = (*PER_TOKEN_INPUTS, *along_prompt(given, prompt.rows, prompt.length))
    per_token = {name: given[name][..., places] for name in names if given.get(name) is not None}
    return {**given, **per_token, "mm_encoder_outputs": {modality: type(output)(**parts)}}


def encode(model: Any, prompt: Prompt) -> dict[str, Any]:
    """Run the vision encoder: the arguments of a forward that begins at the merge."""
    with deltas_of(model, None):
        given = run_encoders(model, dict(prompt.whole))
    used_up = {"mm_token_type_ids"} & read_for_positions(model)  # positions are known by now
    return {name: value for name, value in given.items() if name not in used_up}
