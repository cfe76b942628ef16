"""The demo model's training losses, with a batched forward: equal to the model's own, many times faster.

The vision tower's forward loops over attention windows; here pictures of one size go through its modules as one batch.
Each picture's questions stand in one row behind it, kept apart by the attention mask.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from demo_checkpoint import VOCABULARY
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from hawk_compile.tools.demo.scenes import COLORS, DIGITS, SHAPES

QUESTIONS = 8
"""Questions packed behind each picture."""
SEGMENT = 6
"""Tokens of a packed question: two words, <|im_end|>, <|im_start|>, assistant, the answer."""
GROUPS = (("digit", "shape"), tuple(COLORS), DIGITS + SHAPES)
"""A caption's words: one of each group."""


def patches(images: Tensor) -> Tensor:
    """What the processor makes of uint8 images [B, H, W, 3]: float32 [B, H / 14 * W / 14, 1176]."""
    mean, std = (torch.tensor(v, device=images.device) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    x = (images.float() / 255 - mean) / std
    b, height, width, _ = x.shape
    x = x.view(b, height // 28, 2, 14, width // 28, 2, 14, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    x = x.unsqueeze(6).expand(*x.shape[:6], 2, 14, 14)  # a picture is a video of two equal frames
    return x.reshape(b, -1, 1176)


def word_embeddings(model: Qwen2_5_VLForConditionalGeneration) -> nn.Embedding:
    """The word embeddings, which are the output layer's weights too."""
    return cast(nn.Embedding, model.get_input_embeddings())


@cache
def layout(size: tuple[int, int], device: str) -> dict[str, Any]:
    """What depends on the picture's size alone: patch positions, window order and which patches share a window."""
    grid = torch.tensor([[1, size[0] // 14, size[1] // 14]])
    order, ends = get_vision_window_index(grid, spatial_merge_size=2, window_size=112, patch_size=14)
    order = order.to(torch.int64)
    lengths = ends.diff()
    window = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    even = bool((lengths == lengths[0]).all())
    return {
        "positions": get_vision_position_ids(grid, 2).to(device),
        "order": order.to(device),
        "back": order.argsort().to(device),
        "window": int(lengths[0]) if even else None,
        "mask": None if even else (window[:, None] == window[None]).to(device),
    }


def see(visual: Any, images: Tensor) -> Tensor:
    """The vision tower's features [B, V, D] of equally large images: the model's own modules, batched (its forward
    loops over windows)."""
    plan = layout((images.shape[1], images.shape[2]), str(images.device))
    x = visual.patch_embed(patches(images).flatten(0, 1)).view(len(images), -1, visual.config.hidden_size)
    b, n, width = x.shape

    def windowed(t: Tensor) -> Tensor:
        return t.view(-1, n // 4, 4, t.shape[-1])[:, plan["order"]].view(-1, n, t.shape[-1])

    x = windowed(x)
    cos, sin = (windowed(t)[0] for t in visual.rotary_pos_emb(x, plan["positions"]))
    for i, block in enumerate(visual.blocks):
        qkv = block.attn.qkv(block.norm1(x)).view(b, n, 3, block.attn.num_heads, -1)
        q, k = apply_rotary_pos_emb_vision(qkv[:, :, 0], qkv[:, :, 1], cos, sin)
        local = i not in visual.fullatt_block_indexes
        length = plan["window"] if local and plan["window"] else n
        q, k, v = (t.reshape(b * n // length, length, *t.shape[2:]).transpose(1, 2) for t in (q, k, qkv[:, :, 2]))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=plan["mask"] if local and not plan["window"] else None)
        x = x + block.attn.proj(out.transpose(1, 2).reshape(b, n, width))
        x = x + block.mlp(block.norm2(x))
    return visual.merger(x.flatten(0, 1)).view(b, n // 4, -1)[:, plan["back"]]


def caption_sums(captions: Tensor, embeddings: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The sums [B, V, D] of the captions' words (captions [B, V, 3], 0 for none) and each group's words [N, D], all of
    length 1 before summing.

    The embeddings get no gradient: pictures move to words.
    """
    table = F.normalize(embeddings.detach().float(), dim=-1)
    words = [table[torch.tensor([VOCABULARY[word] for word in group], device=table.device)] for group in GROUPS]
    parts = [F.pad(group, (0, 0, 1, 0))[captions[..., column]] for column, group in enumerate(words)]
    return torch.stack(parts).sum(0), words


def told(captions: Tensor, embeddings: Tensor, noise: float) -> Tensor:
    """Visual tokens [B, V, D] as the vision tower is to give them one day, with noise of length `noise` times an
    embedding's."""
    total, _ = caption_sums(captions, embeddings)
    length = embeddings.detach().norm(dim=-1).mean()
    return (total + noise * torch.randn_like(total) / total.shape[-1] ** 0.5) * length


def alignment_loss(features: Tensor, captions: Tensor, embeddings: Tensor) -> Tensor:
    """How far visual tokens [B, V, D] are from their captions' words (captions [B, V, 3], 0 for none).

    Contrastive in each group of words (against its other words and a fixed "none"), and for objects the squared
    distance to the words' sum.
    """
    total, words = caption_sums(captions, embeddings)
    unit = F.normalize(features.float(), dim=-1)
    loss = features.new_zeros(())
    for column, group in enumerate(words):
        logits = 16 * F.pad(unit @ group.T, (1, 0), value=0.25)
        loss = loss + F.cross_entropy(logits.flatten(0, 1), captions[..., column].flatten())
    thing = captions[..., 0] > 0
    length = embeddings.detach().norm(dim=-1).mean()
    return loss + (features.float()[thing] / length - total[thing]).square().sum(-1).mean()


def answer_loss(
    model: Qwen2_5_VLForConditionalGeneration, features: Tensor, batch: dict[str, Tensor], by_words: bool
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the answers (and of the end of turn after them), and the share of right answers.

    The prompt [prefix, picture, question 0, ..., question Q-1] lets a question see the prefix, the picture and itself,
    each at the position it has in a prompt of its own: equal to Q separate prompts. `by_words`: tokens after a
    question do not see the picture.
    """
    device, (b, visual, _) = features.device, features.shape
    rows, columns = (side // 28 for side in batch["images"].shape[1:3])
    ids = VOCABULARY
    tail = torch.tensor([ids["<|im_end|>"], ids["<|im_start|>"], ids["assistant"]], device=device)
    tail = tail.expand(b, QUESTIONS, 3)
    segments = torch.cat([batch["questions"], tail, batch["answers"].unsqueeze(-1)], -1).flatten(1)
    head = torch.tensor([ids["<|im_start|>"], ids["user"], ids["<|vision_start|>"]], device=device).expand(b, 3)
    end = torch.full((b, 1), ids["<|vision_end|>"], device=device)
    embed = word_embeddings(model)
    x = torch.cat([embed(head), features.to(embed.weight.dtype), embed(end), embed(segments)], 1)

    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    after = 3 + max(rows, columns)
    text = after + 1 + torch.arange(SEGMENT).repeat(QUESTIONS)
    place = torch.cat(
        [
            torch.arange(3).expand(3, 3),
            3 + torch.stack([grid[:, 0] * 0, *grid.T]),
            torch.full((3, 1), after),
            text.expand(3, -1),
        ],
        1,
    ).to(device)
    owner = torch.cat([torch.full((4 + visual,), -1), torch.arange(QUESTIONS).repeat_interleave(SEGMENT)]).to(device)
    index = torch.arange(x.shape[1], device=device)
    mask = (index[:, None] >= index) & ((owner == -1) | (owner[:, None] == owner))
    if by_words:
        late = (owner >= 0) & ((index - 4 - visual) % SEGMENT >= 2)
        mask &= ~(late[:, None] & (index >= 3) & (index < 3 + visual))
    hidden = (
        model.model.language_model(
            inputs_embeds=x,
            position_ids=place[:, None].expand(3, b, -1),
            attention_mask={"full_attention": mask.expand(b, 1, -1, -1)},
            use_cache=False,
        )
        .last_hidden_state[:, 4 + visual :]
        .view(b, QUESTIONS, SEGMENT, -1)
    )
    logits = model.lm_head(hidden[:, :, 4]).float().flatten(0, 1)
    stops = model.lm_head(hidden[:, :, 5]).float().flatten(0, 1)
    answers = batch["answers"].flatten()
    loss = F.cross_entropy(logits, answers) + 0.1 * F.cross_entropy(stops, torch.full_like(answers, ids["<|im_end|>"]))
    return loss, (logits.argmax(-1) == answers).float().mean()


def check_against_model(model: Qwen2_5_VLForConditionalGeneration, batch: dict[str, Tensor]) -> None:
    """The batched vision tower must be the model's own."""
    images = batch["images"][:2]
    grid = torch.tensor([[1, images.shape[1] // 14, images.shape[2] // 14]] * len(images), device=images.device)
    with torch.no_grad():
        theirs = model.model.get_image_features(patches(images).flatten(0, 1), grid).pooler_output
        torch.testing.assert_close(see(model.model.visual, images), torch.stack(list(theirs)), rtol=2e-2, atol=2e-3)
