"""The models of these tests, built and captured once for all of them. Tests that change a model build their own."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

import hawk_compile
from tests import zoo
from tests.marks import slow
from tests.runtime.reference import Conversation
from tests.zoo import Row

RATIO = 0.6
LAYERS = 2
MAIN = ("qwen2_5_vl", "llava", "gemma3", "qwen3_vl")
"""mRoPE; plain; sliding windows and attention both ways; features for later layers."""

EVERY = (*MAIN, *slow(*(name for name in zoo.NAMES if name not in MAIN)))
"""All architectures; what the passes make of each is tested in tests/test_architectures.py too."""

ROUNDING = {"atol": 2e-5, "rtol": 1e-5}
"""Equal in exact arithmetic, but with matrix products of other shapes: logits of magnitude 1 to 10 in fp32, whose
sums of 64 to 96 terms over 2 layers differ by up to 8e-6 here."""


@cache
def plain(name: str) -> PreTrainedModel:
    return zoo.build(name, layers=LAYERS)


@cache
def pruned(name: str, ratio: float = RATIO) -> PreTrainedModel:
    return fresh(name, ratio)


def fresh(name: str, ratio: float = RATIO, **settings: Any) -> PreTrainedModel:
    return hawk_compile.optimize(zoo.build(name, layers=LAYERS), ratio=ratio, backend="eager", **settings)


def picture(name: str, which: int = 4) -> dict[str, Tensor]:
    """A single row with one picture."""
    return zoo.inputs(name, plain(name), rows=[zoo.sizes(name)[which]])


def prompt(name: str, *rows: Row, **options: Any) -> dict[str, Tensor]:
    return zoo.inputs(name, plain(name), rows=rows, **options)


def conversation(name: str, inputs: dict[str, Tensor], ratio: float = RATIO, **options: Any) -> Conversation:
    """The hand-written loop behind its first prompt."""
    started = Conversation(plain(name), ratio, **options)
    started.prompt(inputs)
    return started


def generate(model: PreTrainedModel, inputs: dict[str, Any], tokens: int = 8, **options: Any) -> Any:
    """Greedy decoding, with the logits of every step."""
    options = {"max_new_tokens": tokens, "do_sample": False} | options
    return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


def new_tokens(out: Any, inputs: dict[str, Tensor], row: int = 0) -> list[int]:
    """What stands behind the prompt, cut off as users do."""
    return out.sequences[row, inputs["input_ids"].shape[1] :].tolist()


def rows_alone(name: str, inputs: dict[str, Tensor], rows: list[Row]) -> list[dict[str, Tensor]]:
    """The rows of a batch with their own pixels (images lie one after another, patches or whole)."""
    taken, result = 0, []
    per_image = inputs["image_grid_thw"].prod(1).tolist() if "image_grid_thw" in inputs else None
    for i, row in enumerate(rows):
        real = inputs["attention_mask"][i].bool()
        last = taken + len(row.images)
        single = {key: value[i : i + 1, real] for key, value in inputs.items()
                  if key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")}
        if per_image is None:
            single["pixel_values"] = inputs["pixel_values"][taken:last]
        else:
            single["pixel_values"] = inputs["pixel_values"][sum(per_image[:taken]) : sum(per_image[:last])]
            single["image_grid_thw"] = inputs["image_grid_thw"][taken:last]
        taken = last
        result.append(single)
    return result
