"""The definition that the compiled path is held to: the eager model, with its visual tokens gathered by hand.

Nothing here uses the passes or the kernels. Scores are worked out from the weights of the first decoder layer, in plain
PyTorch, and the pruned run is the model's own eager forward on the kept rows of its merged embeddings.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel

from tests.zoo import common


def language_model(model: PreTrainedModel) -> nn.Module:
    base = model.base_model
    return next(getattr(base, name) for name in ("language_model", "text_model") if hasattr(base, name))


@contextlib.contextmanager
def changed_inputs(module: nn.Module, change: Any) -> Iterator[None]:
    """Let `change(kwargs)` see, and alter, the keyword arguments of a module's forward."""
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: (args, change(kwargs)), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def merged_inputs(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the language model is given in an eager run: merged embeddings [B, S, D] and what goes with them."""
    seen: dict[str, Any] = {}

    def look(kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.update(kwargs)
        return kwargs

    with torch.no_grad(), changed_inputs(language_model(model), look):
        model(**inputs, past_key_values=DynamicCache())
    return seen


def first_layer_query_key(model: PreTrainedModel, merged: Tensor) -> tuple[Tensor, Tensor]:
    """Query [B, H, S, d] and key [B, Hkv, S, d] of decoder layer 0 before RoPE."""
    layer = language_model(model).layers[0]
    attention = layer.self_attn
    normed = layer.input_layernorm(merged)
    if hasattr(attention, "kv_b_proj"):
        return latent_query_key(attention, normed)
    width = attention.head_dim
    query, key = (projection(normed).unflatten(-1, (-1, width)) for projection in (attention.q_proj, attention.k_proj))
    if getattr(attention, "q_norm", None) is not None:
        query, key = attention.q_norm(query), attention.k_norm(key)
    return query.transpose(1, 2), key.transpose(1, 2)


def latent_query_key(attention: nn.Module, normed: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key [B, H, S, n + r] of latent attention before RoPE: what knows no position, and what rotates, which
    all heads of the key share."""
    query = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(normed)))
    query = query.unflatten(-1, (-1, attention.qk_head_dim)).transpose(1, 2)
    sizes = [attention.kv_lora_rank, attention.qk_rope_head_dim]
    latent, rotating = attention.kv_a_proj_with_mqa(normed).split(sizes, dim=-1)
    made = attention.kv_b_proj(attention.kv_a_layernorm(latent)).unflatten(-1, (query.shape[1], -1)).transpose(1, 2)
    fixed = made[..., : attention.qk_nope_head_dim]
    return query, torch.cat([fixed, rotating.unsqueeze(1).expand(*fixed.shape[:-1], -1)], dim=-1)


def rotated_query_key(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Query [B, H, S, d] and key [B, H, S, d] of the first attention over a prompt's tokens, as it gets them."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            over_prompt = function is scaled_dot_product_attention and args[0].shape[2] == inputs["input_ids"].shape[1]
            if over_prompt:
                seen.append((args[0], args[1]))
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Watching():
        model(**inputs)
    return seen[0]


def scores(query: Tensor, key: Tensor, visual: Tensor, votes: Tensor, head_weights: Tensor) -> Tensor:
    """HAWK's score [V] of one row, in fp64: query [H, S, d], key [Hkv, S, d], visual and votes [S] bool."""
    query, key = query.double(), key.double().repeat_interleave(query.shape[0] // key.shape[0], dim=0)
    relevance = (query[:, votes] @ key[:, visual].mT).mean(1) / math.sqrt(query.shape[-1])  # [H, V]
    relevance = relevance / relevance.norm(dim=1, keepdim=True)
    return head_weights.double() @ relevance


def scores_of_each(query: Tensor, key: Tensor, visual: Tensor, votes: Tensor, head_weights: Tensor) -> Tensor:
    """The mean of every voting token's own attention [V] of one row, in fp64; arguments as for `scores`."""
    query, key = query.double(), key.double().repeat_interleave(query.shape[0] // key.shape[0], dim=0)
    raw = query[:, votes] @ key[:, visual].mT / math.sqrt(query.shape[-1])  # [H, T, V]
    return torch.tensordot(head_weights.double(), raw.softmax(-1).mean(1), 1)


def voters(ids: list[int], visual: list[bool], vision_end: int, end_of_turn: set[int]) -> list[bool]:
    """The ids behind the last image and the id that closes it, up to the last end-of-turn id; a start id is no text."""
    start = 1 + max(position for position, each in enumerate(ids) if visual[position] or each == vision_end)
    ends = [position for position, each in enumerate(ids) if each in end_of_turn and position >= start]
    stop = ends[-1] if ends else len(ids)
    return [start <= position < stop and each != common.START for position, each in enumerate(ids)]


def kept_positions(row_scores: Tensor, visual: Tensor, count: int) -> Tensor:
    """Ascending positions of a row that keeps all text and the `count` best visual tokens.

    Tokens that are the same vector (the end of each line of tiles) score the same: the first of them is kept first, and
    rounding to 1e-9 keeps fp64 noise from deciding between them.
    """
    best = torch.zeros_like(visual)
    places = visual.nonzero().squeeze(1)
    order = row_scores.round(decimals=9).argsort(descending=True, stable=True)
    best[places[order[:count]]] = True
    return (best | ~visual).nonzero().squeeze(1)


def pruned_forward(
    model: PreTrainedModel, inputs: dict[str, Any], keep: Tensor, visual: Tensor, **kwargs: Any
) -> tuple[Any, DynamicCache]:
    """The eager model on the kept positions of a one-row prompt with explicit position_ids: (output, filled cache).

    The merged embeddings are gathered and given as inputs_embeds, so that masks are built anew by the model; features
    that later layers add are gathered too.
    """
    seen = merged_inputs(model, inputs)
    ranks = visual.long().cumsum(0) - 1
    kept_visual = ranks[keep[visual[keep]]]

    def with_layer_features(given: dict[str, Any]) -> dict[str, Any]:
        if seen.get("deepstack_visual_embeds") is not None:
            given["visual_pos_masks"] = seen["visual_pos_masks"][:, keep]
            given["deepstack_visual_embeds"] = [level[kept_visual] for level in seen["deepstack_visual_embeds"]]
        return given

    cache = DynamicCache(config=model.config.get_text_config())
    gathered = {"inputs_embeds": seen["inputs_embeds"][:, keep], "position_ids": inputs["position_ids"][..., keep]}
    if inputs.get("token_type_ids") is not None:
        gathered["token_type_ids"] = inputs["token_type_ids"][:, keep]
    with torch.no_grad(), changed_inputs(language_model(model), with_layer_features):
        return model(**gathered, **kwargs, past_key_values=cache, use_cache=True), cache
