"""The demo model with larger heads: the same function, written with more zeros.

It is trained with heads of 24, for which vLLM has no attention kernels on CPUs, and shipped with heads of 32. A head of
Qwen2.5-VL is its width over its number of heads, so the width D = 192 grows to E = 256 as the head d = 24 grows to
e = 32. What has to be made up for, and how:

- The residual stream gains E - D entries. What writes to it (word embeddings, the picture's last projection, o_proj,
  down_proj) writes zeros there, and what reads it (q, k, v, gate, up and the output layer) has columns of zeros.
- RMSNorm divides by sqrt(mean of squares + eps). Over E entries that mean is D/E of what it is over D; with eps * D/E
  in place of eps the root is sqrt(D/E) of what it was, so the norm's weights are multiplied by sqrt(D/E).
- Attention divides q . k by sqrt(e) in place of sqrt(d), so q_proj, weight and bias, is multiplied by sqrt(e/d).
- RoPE turns entry i of a head with entry i + d/2, by position * theta^(-2i/d). In a head of e the other entry is
  i + e/2, so each half of a head of q and k stands at the start of the larger half; with theta^(e/d) in place of theta
  the frequencies stay. Those that follow turn zeros; they join M-RoPE's last axis.
- Heads of v have no order to keep: zeros follow each, and o_proj has columns of zeros there.

All of this is exact but for the two square roots, which no half precision holds: norms and q_proj become float32. The
other tensors keep the precision they have.
"""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any, NamedTuple, cast

from torch import Tensor
from torch.nn.functional import pad
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

TOWER = "model.visual."
PROJECTION = "model.visual.merger.mlp.2"
"""What writes a picture to the residual stream."""


class Part(NamedTuple):
    """How a module's parameters grow.

    Attributes:
        rows, columns: into how many equal blocks each dimension is cut that grows, each block by e/d and by zeros at
            its end; 0 for a dimension that stays.
        factor: what the values are multiplied by.
    """

    rows: int
    columns: int = 0
    factor: float = 1.0


AS_IT_IS = Part(rows=0)


def parts_of(config: Qwen2_5_VLConfig, head: int) -> dict[str, Part]:
    """By the names of the modules that read or write the residual stream."""
    text: Any = config.text_config
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    growth = head / (text.hidden_size // heads)
    norm = Part(rows=1, factor=growth**-0.5)
    return {
        "embed_tokens": Part(rows=0, columns=1),
        "lm_head": Part(rows=0, columns=1),
        PROJECTION: Part(rows=1),
        "input_layernorm": norm,
        "post_attention_layernorm": norm,
        "norm": norm,
        "q_proj": Part(rows=2 * heads, columns=1, factor=growth**0.5),
        "k_proj": Part(rows=2 * kv_heads, columns=1),
        "v_proj": Part(rows=kv_heads, columns=1),
        "o_proj": Part(rows=1, columns=heads),
        "gate_proj": Part(rows=0, columns=1),
        "up_proj": Part(rows=0, columns=1),
        "down_proj": Part(rows=1),
    }


def grown(values: Tensor, part: Part, growth: Fraction) -> Tensor:
    """Parameters [rows] or [rows, columns] with each block of the part `growth` times as large."""
    for dim, blocks in enumerate((part.rows, part.columns)[: values.ndim]):
        if blocks:
            block = values.shape[dim] // blocks
            more = int(block * growth) - block
            after = (0, 0) * (values.ndim - 1 - dim)
            values = pad(values.unflatten(dim, (blocks, block)), (*after, 0, more)).flatten(dim, dim + 1)
    return values if part.factor == 1 else values.float() * part.factor


def widened_config(config: Qwen2_5_VLConfig, head: int) -> Qwen2_5_VLConfig:
    """The config of the same function with heads of size `head`."""
    wide = copy.deepcopy(config)
    text, vision = cast(Any, wide.text_config), cast(Any, wide.vision_config)
    narrow = text.hidden_size // text.num_attention_heads
    text.hidden_size = vision.out_hidden_size = text.num_attention_heads * head
    text.rms_norm_eps *= narrow / head
    rope = text.rope_parameters
    # Rounded, so that a power of ten is written as one: float32, in which frequencies are computed, holds less.
    rope["rope_theta"] = round(rope["rope_theta"] ** (head / narrow), 6)
    rope["mrope_section"] = [*rope["mrope_section"][:-1], rope["mrope_section"][-1] + (head - narrow) // 2]
    return wide


def widened(model: Qwen2_5_VLForConditionalGeneration, head: int = 32) -> Qwen2_5_VLForConditionalGeneration:
    """The same function with heads of size `head`. The model stays as it is.

    Raises:
        ValueError: a size that is odd, or smaller than the model's own.
    """
    config: Any = model.config
    text = config.text_config
    growth = Fraction(head * text.num_attention_heads, text.hidden_size)
    if head % 2 or growth < 1:
        raise ValueError(f"head must be even and at least {head / growth}, the model's own, got {head}")
    parts = parts_of(config, head)
    state = {}
    for name, values in model.state_dict().items():
        module = name.rpartition(".")[0]
        in_tower = module.startswith(TOWER)
        part = parts.get(module, AS_IT_IS) if in_tower else parts[module.rpartition(".")[2]]
        state[name] = grown(values, part, growth)
    wide = Qwen2_5_VLForConditionalGeneration(widened_config(config, head))
    wide.load_state_dict(state, assign=True)  # each in a precision of its own
    wide.tie_weights()
    wide.generation_config = copy.deepcopy(model.generation_config)
    return wide.train(model.training)
