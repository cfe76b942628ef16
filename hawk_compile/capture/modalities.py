"""Which modalities a call holds, which a model takes, and where in a prompt their features go."""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hawk_compile.capture.signatures import ENCODED, signature_of
from hawk_compile.compat.models import AUDIO_LENGTHS
from hawk_compile.errors import InputError
from hawk_compile.plan.ids import is_any
from hawk_compile.settings.config import MODALITIES

AUDIO = "audio"
AUDIO_INPUT = "input_features"
RAW_INPUTS = {
    "image": ("pixel_values", "pixel_values_images", "image_patches"),
    "video": ("pixel_values_videos",),
    AUDIO: (AUDIO_INPUT,),
}
"""The arguments under which Hugging Face models take each modality, as `generate` knows them, beside those that their
encoders name; see `raw_inputs`."""
MERGED_BY_NAME = ("image", "video")
"""The modalities whose encoded features a forward takes by name, in `mm_encoder_outputs`."""

PER_TOKEN_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
"""Arguments of shape [..., B, S] (embeddings: [B, S, D])."""

WORK_OUT_POSITIONS = "compute_3d_position_ids"
"""The method of bodies whose positions depend on images."""

RAW_ENDINGS = {"image": "pixel_values", "video": "pixel_values_videos", AUDIO: AUDIO_INPUT}
"""How the names of pixels and frames end in forwards that encode them themselves."""

AT_ONCE = 2**22
"""Elements of embeddings that are hashed at once: 32 MB as int64."""

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a floating-point number -> integers of as many."""


def asks_for(model: PreTrainedModel, kwargs: dict[str, Any], output: str) -> bool:
    """Whether a call returns `output_hidden_states` or `output_attentions`: itself, or by the configuration."""
    asked = kwargs.get(output)
    if asked is None:
        return any(getattr(config, output, False) for config in (model.config, model.config.get_text_config()))
    return bool(asked)


def tokens_of(kwargs: dict[str, Any]) -> Tensor:
    """input_ids [B, S] or inputs_embeds [B, S, D], whichever was given."""
    tokens = [kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None]
    if len(tokens) != 1:
        raise InputError(
            "a call takes either input_ids [B, S] or inputs_embeds [B, S, D], got "
            f"{'both' if tokens else 'neither'}: give one of them"
        )
    return tokens[0]


def along_prompt(arguments: dict[str, Any], rows: int, length: int) -> tuple[str, ...]:
    """Names of the arguments of shape [..., B, S] that not every model has: they are gathered as the ids are.

    Args:
        arguments: of a call with B `rows` and S = `length` positions. Nothing else in it is as long as a prompt, which
            holds text beside all its visual tokens; what may be, an audio's frames, is read in front of the cut.
    """
    return tuple(sorted(
        name for name, given in arguments.items()
        if name not in PER_TOKEN_INPUTS and isinstance(given, Tensor) and given.ndim >= 2
        and given.shape[-1] == length and given.shape[-2] in (1, rows)
    ))  # fmt: skip


def token_kinds(model: PreTrainedModel, kwargs: dict[str, Any]) -> list[str]:
    """Arguments [B, S], or [B, L] of the whole conversation, from which the model may build its mask.

    Those that the model's forward names, beside ids, mask and positions; not what it reads to work out positions.
    """
    known = {"input_ids", "attention_mask", "position_ids"} | read_for_positions(model)
    rows, new = tokens_of(kwargs).shape[:2]
    cache = kwargs.get("past_key_values")
    lengths = {new, new + (0 if cache is None else int(cache.get_seq_length()))}
    return [
        name for name in signature_of(type(model)).parameters
        if name not in known and isinstance(given := kwargs.get(name), Tensor) and given.ndim == 2
        and given.shape[0] == rows and given.shape[1] in lengths and not given.is_floating_point()
    ]  # fmt: skip


def positions_by_images(model: PreTrainedModel) -> bool:
    """Whether positions depend on the sizes of images (mRoPE). `rope_deltas` alone does not say it: some models have a
    place for them and count like any other."""
    return hasattr(model.base_model, WORK_OUT_POSITIONS)


def read_for_positions(model: PreTrainedModel) -> set[str]:
    """Arguments from which the model works out positions that depend on image sizes (mRoPE); none elsewhere.

    With position_ids at hand they are not read again.
    """
    work_out = getattr(model.base_model, WORK_OUT_POSITIONS, None)
    return set() if work_out is None else taken_by(work_out)


TAKEN: "weakref.WeakKeyDictionary[Callable[..., Any], set[str]]" = weakref.WeakKeyDictionary()
"""The names of what a function takes, for as long as it lives."""


def taken_by(method: Callable[..., Any]) -> set[str]:
    """The names of what a method takes; worked out once for each function that lives."""
    function = getattr(method, "__func__", method)
    if function not in TAKEN:
        TAKEN[function] = {*inspect.signature(method).parameters}
    return TAKEN[function]


def encoder_of(model: PreTrainedModel, modality: str) -> Callable[..., Any] | None:
    """The method of a model's body that encodes a modality. Videos are images one behind another where the forward
    takes them and the model has no encoder of theirs."""
    kind, body = classes_of(model)
    return getattr(model.base_model, encoder_name(kind, body, modality) or "", None)


def classes_of(model: PreTrainedModel) -> tuple[Any, Any]:
    """The classes of a model and of its body."""
    return type(model), type(model.base_model)


@functools.cache
def encoder_name(kind: Any, body: Any, modality: str) -> str | None:
    if hasattr(body, f"get_{modality}_features"):
        return f"get_{modality}_features"
    taken = signature_of(kind).parameters
    by_image = modality == "video" and hasattr(body, "get_image_features") and set(taken) & set(RAW_INPUTS["video"])
    return "get_image_features" if by_image else None


def raw_inputs(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """modality -> the arguments under which a model takes what is not encoded yet: what its encoder takes first, ahead
    of the names that other models have for it."""
    return raw_inputs_of(*classes_of(model))


@functools.cache
def raw_inputs_of(kind: Any, body: Any) -> dict[str, tuple[str, ...]]:
    own: dict[str, str] = {}
    for modality in MODALITIES:
        name = f"get_{modality}_features"
        if hasattr(body, name):
            own[modality] = list(inspect.signature(getattr(body, name)).parameters)[1]
    inputs = {}
    for modality in MODALITIES:
        # A video's encoder may take `pixel_values`, which are no image's then.
        others = [name for name in RAW_INPUTS[modality] if name not in own.values()]
        ours = [own[modality]] if modality in own else []
        named = named_by_forward(kind, modality) if merges_in_forward(kind, body) else []
        inputs[modality] = tuple(dict.fromkeys([*ours, *others, *named]))
    return inputs


def named_by_forward(kind: Any, modality: str) -> list[str]:
    """The arguments under which a forward takes a modality that is not encoded."""
    taken = signature_of(kind).parameters
    return [name for name in taken if name.endswith(RAW_ENDINGS[modality])]


def merges_itself(model: PreTrainedModel) -> bool:
    """Whether a model encodes and merges in the middle of its forward, see `hawk_compile.capture.merging`."""
    return merges_in_forward(*classes_of(model)) and not encodes_audio_itself(model)


@functools.cache
def merges_in_forward(kind: Any, body: Any) -> bool:
    taken = signature_of(kind).parameters
    if ENCODED in taken or any(encoder_name(kind, body, modality) for modality in MODALITIES):
        return False
    return "inputs_embeds" in taken and any(named_by_forward(kind, each) for each in MODALITIES)


def required_arguments(model: PreTrainedModel) -> set[str]:
    """What the model's forward cannot be called without, be it None."""
    return required_by(classes_of(model)[0])


@functools.cache
def required_by(kind: Any) -> set[str]:
    parameters = list(signature_of(kind).parameters.values())[1:]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {each.name for each in parameters if each.default is inspect.Parameter.empty and each.kind in named}


def raw_modalities(model: PreTrainedModel, kwargs: dict[str, Any]) -> set[str]:
    """The modalities that a call holds and that are not encoded yet."""
    inputs = raw_inputs(model)
    return {modality for modality in MODALITIES if any(kwargs.get(name) is not None for name in inputs[modality])}


def modalities_of(model: PreTrainedModel, kwargs: dict[str, Any]) -> set[str]:
    """The modalities that a call holds, encoded or not."""
    outputs = kwargs.get("mm_encoder_outputs") or {}
    return raw_modalities(model, kwargs) | {modality for modality, output in outputs.items() if output is not None}


def takes(model: PreTrainedModel, modality: str) -> bool:
    """Whether the model merges features of a modality into its prompt."""
    encodes = encoder_of(model, modality) is not None
    if merges_itself(model):
        named = named_by_forward(classes_of(model)[0], modality)
        return bool(named) and placeholders_by_modality(model)[modality] is not None
    if modality != AUDIO:
        return encodes
    return getattr(model.config, "audio_token_id", None) is not None and (encodes or encodes_audio_itself(model))


def encodes_audio_itself(model: PreTrainedModel) -> bool:
    """Whether audio is encoded in the middle of the model's forward, so that its encoder stays in the graph."""
    tower = getattr(model.base_model, "audio_tower", None)
    return not hasattr(model.base_model, "get_audio_features") and hasattr(tower, AUDIO_LENGTHS)


def placeholders_by_modality(model: Any, modalities: Iterable[str] = MODALITIES) -> dict[str, int | None]:
    """modality -> the id that waits for its features: the config's, or that of the config of what encodes it."""
    return {modality: placeholder_of(model.config, modality) for modality in modalities}


def placeholder_of(config: Any, modality: str) -> int | None:
    name = f"{modality}_token_id"
    number = getattr(config, name, None)
    encoder = getattr(config, "audio_config" if modality == AUDIO else "vision_config", None)
    return getattr(encoder, name, None) if number is None else number


def placeholder_ids(model: Any, modalities: Iterable[str] = MODALITIES) -> list[int]:
    """The ids that wait for features of these modalities."""
    return sorted({number for number in placeholders_by_modality(model, modalities).values() if number is not None})


def visual_places(model: Any, ids: Tensor, present: Iterable[str]) -> Tensor:
    """[B, S] bool: the placeholders that features are merged into.

    Those of a modality that the call does not hold are text to the model, unless there are no others: some models put
    the frames of a video in the places of images.
    """
    named = is_any(ids, placeholder_ids(model, present))
    return named if named.any() else is_any(ids, placeholder_ids(model))


def known_ids(model: Any, inputs_embeds: Tensor, wanted: Iterable[int]) -> Tensor:
    """[B, S] int64: those of the wanted ids whose embeddings stand in a prompt of embeddings [B, S, D], -1 elsewhere.

    A chat template may have thousands of ids: rows are found by 64-bit hashes and then compared, some at a time.

    Args:
        wanted: of ids with equal embeddings the first one counts; ids beyond the vocabulary are passed over.
    """
    embed = model.get_input_embeddings()
    device, channels = inputs_embeds.device, inputs_embeds.shape[-1]
    numbers = torch.tensor(in_vocabulary(embed, wanted), dtype=torch.int64, device=device)
    if not len(numbers):
        return torch.full(inputs_embeds.shape[:2], -1, dtype=torch.int64, device=device)
    rows = max(1, AT_ONCE // max(1, channels))
    generator = torch.Generator("cpu").manual_seed(0)
    factors = torch.randint(2**62, (channels,), generator=generator, device="cpu").to(device) * 2 + 1
    hashes, order = torch.cat([
        hashes_of(embed(some).to(inputs_embeds.dtype), factors) for some in numbers.split(rows)
    ]).sort(stable=True)  # fmt: skip
    numbers = numbers[order]
    ids = []
    for prompt in inputs_embeds.detach().flatten(0, 1).split(rows):
        place = torch.searchsorted(hashes, hashes_of(prompt, factors)).clamp(max=len(numbers) - 1)
        equal = (embed(numbers[place]).to(prompt.dtype) == prompt).all(-1)
        ids.append(numbers[place].masked_fill(~equal, -1))
    return torch.cat(ids).view(inputs_embeds.shape[:2])


def hashes_of(rows: Tensor, factors: Tensor) -> Tensor:
    """[N] int64 of the bits of rows [N, D]; `factors` [D] int64 are odd. -0 counts as 0, which it equals."""
    bits = (rows.detach() + 0).view(BITS[rows.element_size()]).to(torch.int64)
    return (bits * factors).sum(-1)


def in_vocabulary(embed: Any, wanted: Iterable[int]) -> list[int]:
    """The ids that have a row in an embedding: defaults of a config may lie beyond a small vocabulary."""
    return [number for number in dict.fromkeys(wanted) if 0 <= number < embed.weight.shape[0]]
