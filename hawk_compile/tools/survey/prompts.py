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


def rows_in(tiny: Tiny) -> int:
    return len(tiny.inputs["input_ids"]["values"])


def padded(tiny: Tiny, model: PreTrainedModel) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(two rows of which the second is shorter and padded on the left, each of them alone)."""
    rows = [0, 1] if runs_alone(model, prompt(tiny, rows=[1])) else [0, 0]
    inputs = prompt(tiny, rows)
    length = inputs["input_ids"].shape[1]
    visual = set(placeholder_ids(model))
    words = [each for each in inputs["input_ids"][0].tolist() if each not in visual][-1]
    batch, first = dict(inputs), dict(prompt(tiny, rows=[0]))
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.ndim != 2 or value.shape != (2, length):
            continue
        text = {"input_ids": words, "attention_mask": 1}.get(name, 0)
        longer = torch.cat([value[:1], value.new_full((1, LONGER), text)], 1)
        filler = {"input_ids": words}.get(name, 0)
        batch[name] = torch.cat([longer, torch.cat([value.new_full((1, LONGER), filler), value[1:]], 1)])
        first[name] = longer
    return batch, [first, prompt(tiny, rows[1:])]


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
