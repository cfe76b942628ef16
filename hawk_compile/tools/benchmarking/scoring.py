"""HAWK's own share of a prefill by itself, and the method as its authors wrote it, both from a decoder's first layer.

    s[h, v]  = mean_t( q[t, h] . k[v, kv(h)] ) / sqrt(d);   score[v] = sum_h w[h] * s[h, v] / ||s[h, :]||

The authors' form makes q and k of the whole prompt and all [H, T, V] products; the operators of this package take the
mean of the queries first, and where q and k are linear in the hidden states they make no k.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import hawk_compile.kernels.gather.op
import hawk_compile.kernels.score.op
import hawk_compile.kernels.select.op  # noqa: F401  these register operators
from hawk_compile.errors import UnsupportedModelError
from hawk_compile.tools.benchmarking.prompts import Prompt


@dataclass(frozen=True)
class Selection:
    """What both forms need beside the hidden states of a prompt.

    Attributes:
        weights: [H] float32, of the heads.
        visual, question_mask: [B, S] bool.
        kept: visual tokens that each row keeps.
        budget: [B] int64, the same for each row.
    """

    prompt: Prompt
    weights: Tensor
    visual: Tensor
    question_mask: Tensor
    kept: int
    budget: Tensor

    @property
    def length(self) -> int:
        """S'."""
        return self.prompt.length - self.prompt.image.tokens + self.kept


def selection(model: Any, prompt: Prompt, kept: int) -> Selection:
    """Equal head weights, and where a prompt's visual tokens and question stand."""
    heads = model.config.get_text_config().num_attention_heads
    masks = []
    for where in (prompt.visual, prompt.question):
        mask = torch.zeros_like(prompt.ids, dtype=torch.bool)
        mask[:, where] = True
        masks.append(mask)
    device = prompt.ids.device
    budget = torch.full((prompt.rows,), kept, device=device)
    return Selection(prompt, torch.full((heads,), 1 / heads, device=device), masks[0], masks[1], kept, budget)


def first_layer(model: Any) -> Any:
    """The decoder's first layer.

    Raises:
        UnsupportedModelError: its queries and keys come from no linears of the usual names.
    """
    layer = model.get_decoder().layers[0]
    attention = getattr(layer, "self_attn", None)
    if not all(hasattr(attention, name) for name in ("q_proj", "k_proj")) or not hasattr(layer, "input_layernorm"):
        raise UnsupportedModelError(
            f"bench needs input_layernorm, self_attn.q_proj and self_attn.k_proj in {type(layer).__name__}: "
            "take a profile, such as qwen2.5-vl-7b"
        )
    return layer


def heads_of(attention: Any, name: str, normed: Tensor) -> Tensor:
    """[B, heads, S, d]: 'q' or 'k' before RoPE, behind its norm if it has one."""
    made = getattr(attention, f"{name}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    return (made if norm is None else norm(made)).transpose(1, 2)


def authors_keep(layer: Any, chosen: Selection, hidden: Tensor) -> Tensor:
    """[B, S'] int64, ascending: the positions kept of hidden [B, S, D], by the authors' form."""
    prompt = chosen.prompt
    normed = layer.input_layernorm(hidden)
    query, key = (heads_of(layer.self_attn, name, normed) for name in ("q", "k"))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    every = query[:, :, prompt.question] @ key[:, :, prompt.visual].mT / math.sqrt(query.shape[-1])  # [B, H, T, V]
    raw = every.float().mean(2)
    scores = torch.einsum("h,bhv->bv", chosen.weights, nn.functional.normalize(raw, dim=2))
    best = scores.topk(chosen.kept, dim=1).indices + prompt.visual.start
    around = ((0, prompt.visual.start), (prompt.visual.stop, prompt.length))
    text = torch.cat([torch.arange(*each, device=hidden.device) for each in around]).expand(prompt.rows, -1)
    return torch.cat([text, best], dim=1).sort(dim=1).values


def take(hidden: Tensor, keep: Tensor) -> Tensor:
    """[B, S', D]: the kept rows of hidden [B, S, D]."""
    return hidden.gather(1, keep.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def hawk(
    layer: Any, hidden: Tensor, visual: Tensor, question_mask: Tensor, weights: Tensor, budget: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """(keep [B, S'], kept rows [B, S', D]) by the operators that the pass inserts; to be compiled.

    Args:
        layer: the decoder's first.
        hidden: [B, S, D]. visual, question_mask: [B, S] bool. weights: [H] float32. budget: [B] int64. length: S'.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    if getattr(attention, "q_norm", None) is None:
        linears = (attention.q_proj, attention.k_proj)
        parameters = [each for linear in linears for each in (linear.weight, linear.bias)]
        scores = torch.ops.hawk.score_folded(normed, visual, question_mask, *parameters, weights, "l2")
    else:
        query, key = (heads_of(attention, name, normed) for name in ("q", "k"))
        scores = torch.ops.hawk.score_projected(query, key, visual, question_mask, weights, "l2")
    keep, _ = torch.ops.hawk.select(scores, visual, torch.ones_like(visual), budget, length)
    return keep, torch.ops.hawk.gather(hidden, keep)


def take_positions(positions: Tensor, keep: Tensor) -> Tensor:
    """[..., B, S']: the kept ones of positions [..., B, S], whose rows may be one for all."""
    ahead = positions.shape[:-2]
    return positions.expand(*ahead, keep.shape[0], -1).gather(-1, keep.expand(*ahead, -1, -1))


@contextlib.contextmanager
def pruned_by_hand(model: Any, keep_of: Callable[[Tensor], Tensor], prompt: Prompt) -> Iterator[None]:
    """Let an eager model's decoder run on the rows of its merged embeddings that `keep_of` (them [B, S, D]) chooses."""

    def gather(module: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        keep = keep_of(given["inputs_embeds"])
        changed = dict(given, inputs_embeds=take(given["inputs_embeds"], keep))
        positions = given.get("position_ids")
        changed["position_ids"] = keep if positions is None else take_positions(positions, keep)
        if given.get("deepstack_visual_embeds") is not None:
            places = given["visual_pos_masks"].gather(1, keep)
            first = torch.arange(prompt.rows, device=keep.device)[:, None] * prompt.image.tokens - prompt.visual.start
            kept = (keep + first)[places]
            changed["visual_pos_masks"] = places
            changed["deepstack_visual_embeds"] = [level[kept] for level in given["deepstack_visual_embeds"]]
        return args, changed

    handle = model.get_decoder().register_forward_pre_hook(gather, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
