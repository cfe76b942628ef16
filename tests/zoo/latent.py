"""Architectures whose decoder has multi-head latent attention (MLA): keys of a part made from a latent, which knows no
position, and a part that all heads share and that rotates.

The unit of an image size is the visual token: (h, w) gives V = h * w.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Kimi_K25Config, PreTrainedConfig

from . import common as c
from .common import Architecture, Row, Size
from .grids import MERGE, SIZES

LATENT = {"q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
EXPERTS = {
    "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip


class KimiK25(Architecture):
    name = "kimi_k25"
    image_sizes = SIZES

    def config(self, layers: int) -> PreTrainedConfig:
        return Kimi_K25Config(
            text_config=c.text_config(
                layers, model_type="deepseek_v3", num_key_value_heads=c.HEADS, head_dim=8, **LATENT, **EXPERTS
            ),
            vision_config={
                "hidden_size": c.VISION_WIDTH,
                "intermediate_size": 48,
                "num_hidden_layers": c.VISION_LAYERS,
                "num_attention_heads": c.VISION_HEADS,
                "patch_size": c.PATCH,
                "pos_emb_height": 8,
                "pos_emb_width": 8,
                "pos_emb_time": 1,
                "merge_kernel_size": [MERGE, MERGE],
            },
            projection_hidden_size=c.VISION_WIDTH,
            image_token_id=c.IMAGE,
            video_token_id=c.VIDEO,
            vision_start_token_id=c.VISION_START,
            vision_end_token_id=c.VISION_END,
            tie_word_embeddings=False,
        )

    def image_ids(self, size: Size, count: int) -> list[int]:
        return [c.VISION_START, *[c.IMAGE] * (size[0] * size[1]), c.VISION_END]

    def pixels(self, rows: Sequence[Row], generator: torch.Generator) -> dict[str, Tensor]:
        grids = [(1, h * MERGE, w * MERGE) for row in rows for h, w in row.images]
        patches = sum(h * w for _, h, w in grids)
        return {
            "pixel_values": torch.randn(patches, 3, c.PATCH, c.PATCH, generator=generator),
            "image_grid_thw": torch.tensor(grids),
        }
