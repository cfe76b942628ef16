"""Prompts of several rows, and what stands in them."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hawk_compile.capture.modalities import placeholder_ids
from hawk_compile.tools.survey import oracle
from hawk_compile.tools.survey.tiny import Tiny, prompt

LONGER = 3
"""Text that one row has more than others where rows are padded."""


def visual_of(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """[S] bool: the visual tokens of a one-row prompt."""
    return torch.isin(inputs["input_ids"][0], torch.tensor(placeholder_ids(model)))


def question_of(visual: Tensor) -> Tensor:
    """[S] bool: the text behind the last visual token, or all text where none is behind it."""
    behind = ~visual & (visual.flip(0).cumsum(0).flip(0) == 0)
    return behind if behind.any() else ~visual


def rows_in(tiny: Tiny) -> int:
    return len(tiny.inputs["input_ids"]["values"])


def padded(tiny: Tiny, model: PreTrainedModel) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(two rows of which the second is shorter and padded on the left, each of them alone)."""
    rows = [0, 1] if runs_alone(model, prompt(tiny, rows=[1])) else [0, 0]
    inputs = prompt(tiny, rows)
    length = inputs["input_ids"].shape[1]
    visual = set(placeholder_ids(model))
    words = [each for each in inputs["input_ids"][0].tolist() if each not in visual][-1]
    batch, first = dict(inputs), lengthened(prompt(tiny, rows=[0]), [words] * LONGER)
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.ndim != 2 or value.shape != (2, length):
            continue
        filler = {"input_ids": words}.get(name, 0)
        batch[name] = torch.cat([first[name], torch.cat([value.new_full((1, LONGER), filler), value[1:]], 1)])
    return batch, [first, prompt(tiny, rows[1:])]


def lengthened(inputs: dict[str, Any], words: list[int]) -> dict[str, Any]:
    """A one-row prompt with words of text behind it."""
    length, longer = inputs["input_ids"].shape[1], dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == (1, length):
            text = {"input_ids": words, "attention_mask": [1] * len(words)}.get(name, [0] * len(words))
            longer[name] = torch.cat([value, value.new_tensor([text])], 1)
    return longer


def others_kept(keep: Tensor, visual: Tensor) -> Tensor:
    """[S'] ascending: as many positions as `keep`, with removed visual tokens in place of kept ones.

    Args:
        keep: [S'] kept positions of a one-row prompt.
        visual: [S] bool.
    """
    kept = torch.zeros_like(visual).index_fill(0, keep, True)
    removed, seen = (visual & ~kept).nonzero()[:, 0], (visual & kept).nonzero()[:, 0]
    instead = torch.cat([removed, seen])[: len(seen)]
    return torch.cat([(kept & ~visual).nonzero()[:, 0], instead]).sort().values


def runs_alone(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Whether the model takes a row without those before it: indices of patches may count over all rows."""
    try:
        with torch.no_grad():
            model(**inputs)
    except IndexError:
        return False
    return True


def at_places_of(model: PreTrainedModel, inputs: dict[str, Any], row: int, single: dict[str, Any]) -> dict[str, Any]:
    """One row alone, at the positions that it has in a batch: some models count images over all rows."""
    together, apart = (oracle.positions_seen(model, given) for given in (inputs, single))
    if together is None or apart is None or together.ndim != 3:
        return single
    places = together[:, row : row + 1, -single["input_ids"].shape[1] :]
    return single if places.equal(apart) else {**single, "position_ids": places}
