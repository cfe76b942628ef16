"""Measure the demo model with and without pruning, and write its head weights and model card.

    python examples/measure_demo_model.py --model hawk_compile/tools/demo/model           # print the table
    python examples/measure_demo_model.py --model hawk_compile/tools/demo/model --write   # also its files

Plain eager code: HAWK's score by its formula (arXiv 2604.07812), the kept tokens gathered by hand in front of the
decoder, their positions as they were. It shares nothing with the compiler, so it can serve as a check on it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from hawk_compile.tools.demo.scenes import COLORS, DIGITS, pick_questions, scene_size, token_cover

RATIOS = (0.6, 0.8, 0.9)
PER_SCENE = 4
Score = Callable[["Prepared"], Tensor]


@dataclass(frozen=True)
class Cut:
    """Where tokens are removed, and by whose scores.

    Attributes:
        relevance: raw relevance [B, H, V] of the decoder's input embeddings [B, S, D] and positions [3, B, S], the
            question's words and the visual tokens.
        decode: the decoder's last hidden states [B, D], of the same and of the places to keep [B, S'], all if None.
    """

    relevance: Callable[[Any, Tensor, Tensor, slice, slice], Tensor]
    decode: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]


@dataclass
class Prepared:
    """Questions about pictures of one size, up to the decoder's input. Visual tokens stand in one run, so each row has
    the same layout."""

    embeds: Tensor  # [B, S, D], features in place
    positions: Tensor  # [3, B, S]
    first: int  # where the V visual tokens start
    raw: Tensor  # [B, H, V]: HAWK's raw relevance of layer 0
    cover: Tensor  # [B, V]: how much of each visual token the asked-for object covers, 0 to 1
    answers: Tensor  # [B] token ids
    groups: list[tuple[str, str]]  # [B]: the picture's size, and what was asked for
    chance: Tensor  # [B, V] uniform noise, the same in every run


def relevance(model: Any, embeds: Tensor, positions: Tensor, text: slice, visual: slice) -> Tensor:
    """mean over the question's words of q . k / sqrt(d), before RoPE, per query head: [B, H, V]."""
    layer = model.model.language_model.layers[0]
    x, heads = layer.input_layernorm(embeds), layer.self_attn
    q = heads.q_proj(x[:, text]).unflatten(-1, (-1, heads.head_dim)).mean(1)  # [B, H, d]
    k = heads.k_proj(x[:, visual]).unflatten(-1, (-1, heads.head_dim))  # [B, V, KV, d]
    k = k.repeat_interleave(heads.num_key_value_groups, dim=2)
    return torch.einsum("bhd,bvhd->bhv", q, k) / math.sqrt(heads.head_dim)


def gathered(values: Tensor, keep: Tensor) -> Tensor:
    """Places [B, S'] of values [B, S, D]."""
    return values.gather(1, keep.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def decode(model: Any, embeds: Tensor, positions: Tensor, keep: Tensor | None) -> Tensor:
    """The decoder on what is kept of its input."""
    if keep is not None:
        embeds, positions = gathered(embeds, keep), positions.gather(2, keep.expand(3, -1, -1))
    out = model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False)
    return out.last_hidden_state[:, -1]


AT_MERGE = Cut(relevance, decode)
"""In front of the decoder, by its first layer."""


def what(answer: str) -> str:
    """The kind of an answer."""
    return "color" if answer in COLORS else "digit" if answer in DIGITS else "shape"


@torch.no_grad()
def prepare(
    model: Any, processor: Any, split: str, count: int, batch: int = 32, cut: Cut = AT_MERGE
) -> list[Prepared]:
    """`count` questions of `split`, batched by picture size; a scene's `PER_SCENE` questions stand side by side in a
    batch."""
    pairs = pick_questions(split, count - count % PER_SCENE, PER_SCENE)
    by_size: dict[tuple[int, int], list] = {}
    for pair in pairs:
        by_size.setdefault(scene_size(split, pair[0].index), []).append(pair)
    noise = np.random.default_rng(0)
    device, found, pad = model.device, [], processor.image_token
    for size, group in by_size.items():
        for at in range(0, len(group), batch):
            part = group[at : at + batch]
            # Each picture is seen once for all of its questions.
            images = processor.image_processor([scene.pil() for scene, _ in part[::PER_SCENE]], return_tensors="pt")
            images = images.to(device)
            grids = images["image_grid_thw"]
            features = torch.stack(list(model.model.get_image_features(images["pixel_values"], grids).pooler_output))
            visual = features.shape[1]
            turns = [
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
                for _, question in part
            ]
            prompts = processor.apply_chat_template(turns, add_generation_prompt=True)
            prompts = [prompt.replace(pad, pad * visual) for prompt in prompts]
            ids = processor.tokenizer(prompts, return_tensors="pt")["input_ids"].to(device)
            is_visual = ids == model.config.image_token_id
            features = features.repeat_interleave(PER_SCENE, 0).flatten(0, 1)
            embeds = model.get_input_embeddings()(ids)
            embeds = embeds.masked_scatter(is_visual.unsqueeze(-1), features.to(embeds.dtype))
            positions, _ = model.model.get_rope_index(ids, is_visual.int(), grids.repeat_interleave(PER_SCENE, 0))
            first = int(is_visual[0].int().argmax())
            stop = int((ids[0] == model.generation_config.eos_token_id).nonzero()[-1])
            text = slice(first + visual + 1, stop)  # behind <|vision_end|>
            cover = np.stack([token_cover(scene.objects[question.target].box, size) for scene, question in part])
            answers = [processor.tokenizer.convert_tokens_to_ids(question.answer) for _, question in part]
            found.append(
                Prepared(
                    embeds,
                    positions,
                    first,
                    cut.relevance(model, embeds, positions, text, slice(first, first + visual)).float(),
                    torch.tensor(cover, dtype=torch.float32, device=device),
                    torch.tensor(answers, device=device),
                    [(f"{size[0]} x {size[1]}", what(question.answer)) for _, question in part],
                    torch.tensor(noise.random((len(part), visual)), dtype=torch.float32, device=device),
                )
            )
    return found


@torch.no_grad()
def right_answers(
    model: Any, data: list[Prepared], ratio: float, score: Score | None, cut: Cut = AT_MERGE
) -> np.ndarray:
    """Which questions are answered rightly with `ratio` of the visual tokens removed, those with the lowest `score`
    [B, V]: bool [N]."""
    right = []
    for part in data:
        keep = None
        if ratio and score is not None:
            visual = part.raw.shape[-1]
            keep = score(part).topk(math.ceil(visual * (1 - ratio)), dim=1).indices.sort(1).values + part.first
            rows, length = part.embeds.shape[:2]
            before = torch.arange(part.first, device=keep.device).expand(rows, -1)
            after = torch.arange(part.first + visual, length, device=keep.device).expand(rows, -1)
            keep = torch.cat([before, keep, after], 1)
        last = cut.decode(model, part.embeds, part.positions, keep)
        right.append((model.lm_head(last).argmax(-1) == part.answers).cpu())
    return torch.cat(right).numpy()


def hawk(weights: Tensor) -> Score:
    """sum over heads of w[h] * s[h] / ||s[h]||."""
    return lambda part: torch.einsum(
        "h,bhv->bv", weights.to(part.raw.device), torch.nn.functional.normalize(part.raw, dim=-1)
    )


def another_question(score: Score) -> Score:
    """The scores of the next question about the same scene (another object's): how much of a score the question
    makes."""
    return lambda part: score(part).unflatten(0, (-1, PER_SCENE)).roll(1, 1).flatten(0, 1)


def random_choice(part: Prepared) -> Tensor:
    return part.chance


def oracle(part: Prepared) -> Tensor:
    """The asked-for object's tokens first, then random ones."""
    return part.cover + 1e-3 * part.chance


def calibrate(model: Any, data: list[Prepared], cut: Cut = AT_MERGE) -> dict[str, Any]:
    """Head weights: what accuracy under pruning loses, averaged over `RATIOS`, when one head is left out of the score;
    below 0 counts as 0."""
    heads = data[0].raw.shape[1]
    everyone = torch.ones(heads)

    def accuracy(weights: Tensor) -> float:
        return float(np.mean([right_answers(model, data, ratio, hawk(weights), cut).mean() for ratio in RATIOS]))

    base = accuracy(everyone)
    drops = [base - accuracy(everyone - torch.eye(heads)[head]) for head in range(heads)]
    kept = np.clip(drops, 0, None)
    weights = kept / kept.sum() if kept.sum() else np.full(heads, 1 / heads)
    return {
        "weights": [round(float(w), 5) for w in weights],
        "drops": [round(d, 5) for d in drops],
        "how": (
            "python examples/measure_demo_model.py --write: drop of the accuracy (mean over the ratios) on the "
            "calibration split when the head is left out of the layer-0 score, the others weighted equally; "
            "negative drops count as 0; divided by their sum"
        ),
        "ratios": list(RATIOS),
        "questions": sum(len(part.answers) for part in data),
    }


@dataclass
class Measurement:
    """Calibrated head weights; accuracy on the test split (name -> [unpruned] or one number per ratio); the unpruned
    accuracy of each kind of answer and each picture size.
    """

    weights: dict[str, Any]
    table: dict[str, list[float]]
    parts: dict[str, float]


def measure(model: Any, processor: Any, questions: int, calibration: int, cut: Cut = AT_MERGE) -> Measurement:
    """Calibrate on the calibration split, measure on the test split."""
    weights = calibrate(model, prepare(model, processor, "calibration", calibration, cut=cut), cut)
    data = prepare(model, processor, "test", questions, cut=cut)
    equal, tuned = hawk(torch.ones(len(weights["weights"]))), hawk(torch.tensor(weights["weights"]))
    rows = {
        "HAWK, calibrated weights": tuned,
        "HAWK, equal weights": equal,
        "another question's scores (calibrated)": another_question(tuned),
        "random": random_choice,
        "oracle (the object's own tokens)": oracle,
    }
    right = right_answers(model, data, 0, None, cut)
    groups = [group for part in data for group in part.groups]
    parts = {
        name: float(np.mean([r for r, group in zip(right, groups, strict=True) if name in group]))
        for name in sorted({name for group in groups for name in group}, reverse=True)
    }
    table = {"unpruned": [float(right.mean())]}
    for name, score in rows.items():
        table[name] = [float(right_answers(model, data, ratio, score, cut).mean()) for ratio in RATIOS]
    return Measurement(weights, table, parts)


def markdown(table: dict[str, list[float]]) -> str:
    """The table, accuracy by the share of visual tokens removed."""
    lines = ["| | " + " | ".join(f"{ratio:.0%} removed" for ratio in RATIOS) + " |", "|---|" + "---|" * len(RATIOS)]
    for name, values in table.items():
        row = values * len(RATIOS) if len(values) == 1 else values
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row) + " |")
    return "\n".join(lines)


def load(folder: Path, device: str = "cpu") -> tuple[Any, Any]:
    """Model (float32, on `device`) and processor of a checkpoint folder."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).eval(), AutoProcessor.from_pretrained(folder)


def write_measurements(folder: Path, device: str = "cpu", questions: int = 1200, calibration: int = 1200) -> None:
    """Measure the checkpoint in `folder`; write its head_weights.json and README.md (the model card)."""
    found = measure(*load(folder, device), questions, calibration)
    (folder / "head_weights.json").write_text(json.dumps(found.weights, indent=2) + "\n", encoding="utf-8")
    figures = json.loads((folder / "training.json").read_text(encoding="utf-8")) | {
        "table": markdown(found.table),
        "parts": ", ".join(f"{name} {value:.3f}" for name, value in found.parts.items()),
        "questions": questions,
        "calibration": calibration,
        "unpruned": f"{found.table['unpruned'][0]:.3f}",
        "megabytes": f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f}",
    }
    card = (Path(__file__).parent / "demo_model_card.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(card.format_map(figures), encoding="utf-8")
    show(found)


def show(found: Measurement) -> None:
    print(markdown(found.table), found.parts, json.dumps(found.weights), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("hawk_compile/tools/demo/model"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--questions", type=int, default=1200, help="test questions")
    parser.add_argument("--calibration", type=int, default=1200, help="calibration questions")
    parser.add_argument(
        "--write", action="store_true", help="write head_weights.json and README.md into the model's folder"
    )
    options = parser.parse_args()
    if options.write:
        write_measurements(options.model, options.device, options.questions, options.calibration)
    else:
        show(measure(*load(options.model, options.device), options.questions, options.calibration))


if __name__ == "__main__":
    main()
