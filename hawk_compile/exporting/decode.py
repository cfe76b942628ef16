"""The decode step of a model as a component."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hawk_compile.exporting.caches import PAST, fill, held_by, is_held, length_dim
from hawk_compile.exporting.components import DECODE, Component, Shape
from hawk_compile.runtime.handover import scratch_cache, scratch_layers
from hawk_compile.runtime.originals import original


class Decode(nn.Module):
    """Text behind a filled cache: one token per row and step, or a whole text turn."""

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any]):
        super().__init__()
        self.model = model
        self.run = forward
        self.layers = scratch_layers(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **past: Tensor) -> Any:
        cache = scratch_cache(None, self.layers)
        fill(cache, {name.removeprefix(PAST): tensor for name, tensor in past.items()})
        result = self.run(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True, logits_to_keep=1, return_dict=True,
        )  # fmt: skip
        return {"logits": result.logits[:, -1], **held_by(cache)}


def decode_component(model: PreTrainedModel, prefill: Component) -> Component:
    """The decode step; its sample stands behind a cache of three slots, shaped as the prefill's.

    With states it takes one token: several go another way through the model, by a loop in Python over chunks of them.
    """
    kept = {name: made for name, made in prefill.results.items() if is_held(name)}
    stateful = any(length_dim(name) is None for name in kept)
    rows, new, past = len(prefill.sample["input_ids"]), 1 if stateful else 2, 3
    positions = prefill.shapes["position_ids"]
    device = prefill.sample["input_ids"].device
    ids = prefill.sample["input_ids"][:, -new:].contiguous()
    sample = {"input_ids": ids, "attention_mask": torch.ones((rows, past + new), dtype=torch.int64, device=device)}
    counted = torch.arange(past, past + new, device=device)
    sample["position_ids"] = counted.expand(
        *(size for size in positions[:-2] if isinstance(size, int)), rows, new
    ).contiguous()
    step = 1 if stateful else "new"
    shapes: dict[str, Shape] = {
        "input_ids": ("batch", step),
        "attention_mask": ("batch", "total"),
        "position_ids": (*positions[:-2], "batch", step),
    }  # fmt: skip
    for name, made in kept.items():
        sizes, names = [*made.shape], ["batch", *made.shape[1:]]
        if (dim := length_dim(name)) is not None:
            sizes[dim], names[dim] = past, "past"
        sample[PAST + name], shapes[PAST + name] = made.new_zeros(sizes), tuple(names)
    return Component(DECODE, Decode(model, original(model, "forward")).eval(), sample, shapes, prefill.around)
