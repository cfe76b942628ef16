"""A hand-written pruned decoding loop, to compare the runtime with. Nothing here comes from hawk_compile.

One row, one conversation. The plain model's own decoder is run on embeddings and positions that are gathered by hand; a
step is one token with explicit positions on an ordinary cache, which holds kept tokens only.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from tests.zoo import common

VISUAL = (common.IMAGE, common.VIDEO)


class Conversation:
    """The state of one conversation with a plain model that prunes by hand.

    Attributes:
        keep: positions of the last prompt that were kept, [S'] int64.
        next_position: the position of the next text token (the same in all dimensions of mRoPE).
        seen: tokens of the conversation so far, removed ones included.
        logits: [n, VOCAB], of what ran last.
    """

    def __init__(self, model: PreTrainedModel, ratio: float, cache: Cache | None = None):
        self.model = model
        self.decoder = model.base_model.get_decoder()
        self.ratio = ratio
        self.cache = DynamicCache(config=model.config.get_text_config()) if cache is None else cache
        self.next_position = 0
        self.seen = 0
        self.dimensions = 0
        self.keep: Tensor = torch.empty(0)
        self.logits: Tensor = torch.empty(0)

    @torch.no_grad()
    def prompt(self, inputs: dict[str, Tensor]) -> Tensor:
        """Prefill one unpadded row with pictures, pruned: logits [S', VOCAB]."""
        assert inputs["input_ids"].shape[0] == 1
        return self.prefill(decoder_inputs(self.model, inputs), inputs["input_ids"][0].tolist(), inputs)

    def prefill(self, merged: dict[str, Any], ids: list[int], inputs: dict[str, Tensor]) -> Tensor:
        """The same of what reaches the decoder."""
        visual = [i for i, each in enumerate(ids) if each in VISUAL]
        kept = best(scores(self.decoder, merged["inputs_embeds"][0], visual, voters(self.model, ids)), self.ratio)
        keep = torch.tensor(sorted({*range(len(ids))} - {*visual} | {visual[i] for i in kept}))
        return self.gathered(merged, ids, inputs, keep)

    @torch.no_grad()
    def gathered(self, merged: dict[str, Any], ids: list[int], inputs: dict[str, Tensor], keep: Tensor) -> Tensor:
        """The same with these positions kept, [S'] ascending."""
        length = len(ids)
        positions = merged.get("position_ids")
        positions = torch.arange(length)[None] if positions is None else positions
        self.dimensions = positions.shape[0] if positions.ndim == 3 else 0
        positions = positions + (self.next_position if self.seen else 0)
        arguments = {
            "inputs_embeds": merged["inputs_embeds"][:, keep],
            "position_ids": positions[..., keep],
            "attention_mask": self.mask(inputs, keep),
        }
        if self.dimensions == 4:
            arguments["position_ids"][0] = keep + self.seen
        if merged.get("deepstack_visual_embeds") is not None:
            visual = torch.isin(torch.tensor(ids), torch.tensor(VISUAL))
            ranks = visual.long().cumsum(0) - 1
            arguments["visual_pos_masks"] = visual[keep][None]
            arguments["deepstack_visual_embeds"] = [
                level[ranks[keep[visual[keep]]]] for level in merged["deepstack_visual_embeds"]
            ]
        self.next_position = int(positions[1:].max() if self.dimensions == 4 else positions.max()) + 1
        self.seen += length
        self.keep = keep
        return self.run(arguments)

    @torch.no_grad()
    def feed(self, ids: list[int]) -> Tensor:
        """Run text tokens behind what the cache holds: logits [n, VOCAB]."""
        positions = (torch.arange(len(ids)) + self.next_position)[None]
        if self.dimensions:
            positions = positions.expand(self.dimensions, 1, -1).clone()
            if self.dimensions == 4:
                positions[0] = torch.arange(len(ids)) + self.seen
        embeds = self.model.get_input_embeddings()(torch.tensor([ids]))
        self.next_position += len(ids)
        self.seen += len(ids)
        return self.run({"inputs_embeds": embeds, "position_ids": positions, "attention_mask": None})

    def greedy(self, count: int) -> list[int]:
        """The next `count` tokens; the last of them is not fed, as in generate."""
        tokens = []
        for _ in range(count):
            tokens.append(int(self.logits[-1].argmax()))
            if len(tokens) < count:
                self.feed(tokens[-1:])
        return tokens

    def run(self, arguments: dict[str, Any]) -> Tensor:
        hidden = self.decoder(**arguments, past_key_values=self.cache, use_cache=True).last_hidden_state
        self.logits = self.model.get_output_embeddings()(hidden)[0].float()
        return self.logits

    def mask(self, inputs: dict[str, Tensor], keep: Tensor) -> Any:
        """None where the decoder masks causally; else what it reads, [1, 1, S', S'] bool, by the papers' rules."""
        kinds = inputs.get("token_type_ids")
        if kinds is None:
            return None
        assert self.seen == 0, "a later prompt of a model that attends both ways is not written here"
        kinds = kinds[0]
        row, column = torch.arange(len(keep))[:, None], torch.arange(len(keep))
        causal = column <= row
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        if window is None:  # PaliGemma: the whole prompt is a prefix, which attends both ways
            return torch.ones_like(causal)[None, None]
        blocks = torch.cumsum((kinds == 1) & (kinds.roll(1) != 1), 0).where(kinds == 1, -1)[keep]  # Gemma 3
        together = (blocks[:, None] == blocks) & (blocks >= 0)
        return {
            "full_attention": (causal | together)[None, None],
            "sliding_attention": ((causal & (column > row - window)) | together)[None, None],
        }


@torch.no_grad()
def decoder_inputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What generate makes the plain model hand to its decoder in the prefill: embeddings, positions, features."""
    seen: dict[str, Any] = {}

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update({name: given for name, given in kwargs.items() if name not in seen})

    hook = model.base_model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    finally:
        hook.remove()
    return seen


def scores(decoder: torch.nn.Module, merged: Tensor, visual: list[int], votes: list[int]) -> Tensor:
    """The paper's formula, query by query and head by head, equal head weights: [V] float64."""
    layer = decoder.layers[0]
    attention = layer.self_attn
    normed = layer.input_layernorm(merged[None])[0]
    width = attention.head_dim
    query = attention.q_proj(normed).unflatten(-1, (-1, width))
    key = attention.k_proj(normed).unflatten(-1, (-1, width))
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = query.double(), key.double()
    group = query.shape[1] // key.shape[1]
    total = torch.zeros(len(visual), dtype=torch.float64)
    for head in range(query.shape[1]):
        each = torch.stack([key[visual, head // group] @ query[vote, head] for vote in votes]).mean(0) / width**0.5
        total += each / each.norm() / query.shape[1]
    return total


def best(found: Tensor, ratio: float) -> list[int]:
    """Indices of the ceil(V * (1 - ratio)) best, ascending; the ratio is meant as it is written in decimals."""
    count = max(1, math.ceil(len(found) * (1 - Decimal(repr(ratio)))))
    return sorted(sorted(range(len(found)), key=lambda i: -float(found[i]))[:count])


def voters(model: PreTrainedModel, ids: list[int]) -> list[int]:
    """The text after the last image, up to the last end of a turn behind it; a start id is no text."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    start = max(i for i, each in enumerate(ids) if each in (*VISUAL, *vision_ends(model)))
    stops = [i for i, each in enumerate(ids) if each in ends and i > start]
    found = [i for i in range(start + 1, stops[-1] if stops else len(ids)) if ids[i] != common.START]
    assert found, "a prompt that ends with its image has another rule, which tests/runtime/test_query.py covers"
    return found


def vision_ends(model: PreTrainedModel) -> tuple[int, ...]:
    config = model.config
    names = ("vision_end_token_id", "eoi_token_index", "image_end_token_id", "video_end_token_id")
    return tuple(getattr(config, name) for name in names if getattr(config, name, None) is not None)
