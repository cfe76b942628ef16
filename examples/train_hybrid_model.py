"""Train a hybrid decoder on the demo's task: Qwen3.5's layers, linear attention first, in the demo model's size.

    python examples/train_hybrid_model.py --out out/hybrid      # five minutes on a GPU
    python examples/measure_hybrid_model.py out/hybrid

Data, stages and losses are the demo model's (`train_demo_model.py`). Two things differ, because a linear layer keeps
one state of all that it has read: every question stands in a row of its own, and where the tokens after a question may
not see the picture, they may not in the softmax layers alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from demo_checkpoint import ENDS, PLACES, VOCABULARY, save_checkpoint
from demo_losses import QUESTIONS, SEGMENT, patches
from torch import Tensor, nn
from train_demo_model import Family, arguments, train
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

KINDS = {"L": "linear_attention", "F": "full_attention"}


def make_hybrid(options: argparse.Namespace) -> Qwen3_5ForConditionalGeneration:
    """Qwen3.5 of the demo model's width, one letter of `options.layer_types` a layer: L linear, F full attention."""
    config = Qwen3_5Config(
        text_config={
            "vocab_size": len(VOCABULARY),
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": len(options.layer_types),
            "layer_types": [KINDS[letter] for letter in options.layer_types],
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "max_position_embeddings": 4096,
            "initializer_range": 0.07,  # see make_config
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [12, 10, 10],
                "mrope_interleaved": True,
                "partial_rotary_factor": 1.0,
            },
            "tie_word_embeddings": True,
            **ENDS,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_heads": 4,
            "patch_size": 14,
            "out_hidden_size": 192,
            "num_position_embeddings": 1024,
        },
        **PLACES,
        tie_word_embeddings=True,
    )
    model = Qwen3_5ForConditionalGeneration(config)
    # Queries and keys are normalised: with scales of 1 a softmax over 200 tokens hardly singles one out, and nothing is
    # learnt of looking things up.
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            nn.init.constant_(parameter, 0.5)  # added to 1
    return model


def see(visual: Any, images: Tensor) -> Tensor:
    """The vision tower's features [B, V, D] of equally large images."""
    grid = torch.tensor([[1, images.shape[1] // 14, images.shape[2] // 14]] * len(images), device=images.device)
    return visual(patches(images).flatten(0, 1), grid_thw=grid).pooler_output.view(len(images), -1, 192)


def answer_loss(
    model: Any, features: Tensor, batch: dict[str, Tensor], by_words: bool, questions: int = QUESTIONS
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the answers (and of the end of turn after them), and the share of right answers.

    Args:
        by_words: in the softmax layers, tokens after a question do not see the picture.
        questions: how many of each picture's are asked, each in a row [prefix, picture, question, answer].
    """
    device, (b, visual, _) = features.device, features.shape
    segments = layout_segments(batch)[:, :questions].flatten(0, 1)
    ids = VOCABULARY
    head = torch.tensor([ids["<|im_start|>"], ids["user"], ids["<|vision_start|>"]], device=device)
    end = torch.tensor([ids["<|vision_end|>"]], device=device)
    embed = model.get_input_embeddings()
    rows = b * questions
    x = torch.cat(
        [
            embed(head).expand(rows, -1, -1),
            features.to(embed.weight.dtype).repeat_interleave(questions, 0),
            embed(end).expand(rows, -1, -1),
            embed(segments),
        ],
        1,
    )
    place = positions(batch["images"], device)
    index = torch.arange(x.shape[1], device=device)
    mask = index[:, None] >= index
    if by_words:
        late = index >= 4 + visual + 2
        mask = mask & ~(late[:, None] & (index >= 3) & (index < 3 + visual))
    hidden = model.model.language_model(
        inputs_embeds=x,
        position_ids=place[:, None].expand(3, rows, -1),
        attention_mask={"full_attention": mask.expand(rows, 1, -1, -1), "linear_attention": None},
        use_cache=False,
    ).last_hidden_state[:, -2:]
    logits, stops = model.lm_head(hidden).float().unbind(1)
    answers = segments[:, -1]
    loss = F.cross_entropy(logits, answers) + 0.1 * F.cross_entropy(stops, torch.full_like(answers, ids["<|im_end|>"]))
    return loss, (logits.argmax(-1) == answers).float().mean()


def layout_segments(batch: dict[str, Tensor]) -> Tensor:
    """What stands behind the picture, [B, Q, 6] ids: a question's two words, the turn's end, the answer."""
    ids = VOCABULARY
    tail = torch.tensor([ids["<|im_end|>"], ids["<|im_start|>"], ids["assistant"]], device=batch["answers"].device)
    tail = tail.expand(len(batch["answers"]), QUESTIONS, 3)
    return torch.cat([batch["questions"], tail, batch["answers"].unsqueeze(-1)], -1)


def positions(images: Tensor, device: torch.device) -> Tensor:
    """[3, S]: time, row and column of the visual tokens, and the text around them."""
    rows, columns = (side // 28 for side in images.shape[1:3])
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    after = 3 + max(rows, columns)
    parts = [
        torch.arange(3).expand(3, 3),
        3 + torch.stack([grid[:, 0] * 0, *grid.T]),
        after + torch.arange(1 + SEGMENT).expand(3, -1),
    ]
    return torch.cat(parts, 1).to(device)


def check_against_model(model: Any, batch: dict[str, Tensor]) -> None:
    """The positions laid out here are those that the model gives the same prompt."""
    images, segments = batch["images"][:1], layout_segments(batch)[0, 0]
    ids, visual = VOCABULARY, images.shape[1] * images.shape[2] // 28**2
    prompt = [ids["<|im_start|>"], ids["user"], ids["<|vision_start|>"]] + [ids["<|image_pad|>"]] * visual
    tokens = torch.tensor([[*prompt, ids["<|vision_end|>"], *segments.tolist()]], device=images.device)
    grid = torch.tensor([[1, images.shape[1] // 14, images.shape[2] // 14]], device=images.device)
    theirs, _ = model.model.get_rope_index(tokens, (tokens == ids["<|image_pad|>"]).int(), grid)
    torch.testing.assert_close(theirs[:, 0], positions(images, theirs.device))


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(out="out/hybrid", language_steps=1200, steps=650, by_words=0.3)
    parser.add_argument("--layer-types", default="LFLF", help="one letter a layer: L linear, F full attention")
    options = parser.parse_args()
    model, record = train(options, Family(make_hybrid, see, answer_loss, check_against_model))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model.cpu().bfloat16(), out)
    record = {**record, "layers": options.layer_types}
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
