"""The decode step of a model as a component."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from hawk_compile.exporting.components import (
    DECODE,
    KEY,
    PAST_KEY,
    PAST_VALUE,
    VALUE,
    Component,
    Shape,
    cache_tensors,
)
from hawk_compile.runtime.overrides import original


class Decode(nn.Module):
    """Text behind a filled cache: one token per row and step, or a whole text turn."""

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any]):
        super().__init__()
        self.model = model
        self.run = forward

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **past: Tensor) -> Any:
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[PAST_KEY.format(layer)], past[PAST_VALUE.format(layer)], layer)
        result = self.run(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True, logits_to_keep=1, return_dict=True,
        )  # fmt: skip
        return {"logits": result.logits[:, -1], **cache_tensors(cache)}


def decode_component(model: PreTrainedModel, prefill: Component) -> Component:
    """The decode step; its sample stands behind a cache of three slots, shaped as the prefill's."""
    rows, new, past = len(prefill.sample["input_ids"]), 2, 3
    positions = prefill.shapes["position_ids"]
    device = prefill.sample["input_ids"].device
    ids = prefill.sample["input_ids"][:, -new:].contiguous()
    sample = {"input_ids": ids, "attention_mask": torch.ones((rows, past + new), dtype=torch.int64, device=device)}
    counted = torch.arange(past, past + new, device=device)
    sample["position_ids"] = counted.expand(
        *(size for size in positions[:-2] if isinstance(size, int)), rows, new
    ).contiguous()
    shapes: dict[str, Shape] = {
        "input_ids": ("batch", "new"),
        "attention_mask": ("batch", "total"),
        "position_ids": (*positions[:-2], "batch", "new"),
    }  # fmt: skip
    for layer in range(model.config.get_text_config().num_hidden_layers):
        for name, held in ((PAST_KEY, KEY), (PAST_VALUE, VALUE)):
            made = prefill.results[held.format(layer)]
            _, heads, _, width = made.shape
            sample[name.format(layer)] = made.new_zeros((rows, heads, past, width))
            shapes[name.format(layer)] = ("batch", heads, "past", width)
    return Component(DECODE, Decode(model, original(model, "forward")).eval(), sample, shapes, prefill.around)
