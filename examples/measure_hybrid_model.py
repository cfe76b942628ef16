"""Where to cut a hybrid decoder: in front of its first softmax layer, or at the merge with that layer's projections.

    python examples/measure_hybrid_model.py out/hybrid [--check]

Plain eager code on a model of `train_hybrid_model.py`, as in `measure_demo_model.py`. "In front of the layer" is what
`optimize` does: the layers before it read every token, their output is scored and gathered. "At the merge" scores the
merged embeddings by the same layer's norm and projections, and gathers them, so that every layer reads what is kept.
`--check` holds the first way to `optimize`: the same tokens kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measure_demo_model import PER_SCENE, RATIOS, Cut, decode, gathered, load, markdown, measure
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerFast

import hawk_compile
from hawk_compile.tools.demo import evaluate
from hawk_compile.tools.demo.scenes import pick_questions


def scoring_layer(model: Any) -> int:
    """The first layer of softmax attention."""
    return model.config.text_config.layer_types.index("full_attention")


def scored(model: Any, hidden: Tensor, text: slice, visual: slice) -> Tensor:
    """[B, H, V]: mean over the question's words of q . k / sqrt(d), before RoPE, of what enters that layer."""
    layer = model.model.language_model.layers[scoring_layer(model)]
    heads, x = layer.self_attn, layer.input_layernorm(hidden)
    q = heads.q_proj(x[:, text]).unflatten(-1, (-1, 2 * heads.head_dim))[..., : heads.head_dim]  # the rest is a gate
    q = heads.q_norm(q).mean(1)  # [B, H, d]
    k = heads.k_norm(heads.k_proj(x[:, visual]).unflatten(-1, (-1, heads.head_dim)))  # [B, V, KV, d]
    k = k.repeat_interleave(heads.num_key_value_groups, dim=2)
    return torch.einsum("bhd,bvhd->bhv", q, k) * heads.scaling


def run_layers(model: Any, hidden: Tensor, positions: Tensor, layers: slice) -> Tensor:
    decoder = model.model.language_model
    cosine_sine = decoder.rotary_emb(hidden, positions)
    for layer in decoder.layers[layers]:
        hidden = layer(hidden, position_embeddings=cosine_sine, attention_mask=None)
    return hidden


def relevance_in_front(model: Any, embeds: Tensor, positions: Tensor, text: slice, visual: slice) -> Tensor:
    return scored(model, run_layers(model, embeds, positions, slice(scoring_layer(model))), text, visual)


def decode_in_front(model: Any, embeds: Tensor, positions: Tensor, keep: Tensor | None) -> Tensor:
    """All tokens through the layers before, what is kept of them through the others."""
    hidden = run_layers(model, embeds, positions, slice(scoring_layer(model)))
    if keep is not None:
        hidden, positions = gathered(hidden, keep), positions.gather(2, keep.expand(3, -1, -1))
    hidden = run_layers(model, hidden, positions, slice(scoring_layer(model), None))
    return model.model.language_model.norm(hidden)[:, -1]


def relevance_at_merge(model: Any, embeds: Tensor, positions: Tensor, text: slice, visual: slice) -> Tensor:
    return scored(model, embeds, text, visual)


IN_FRONT = "in front of the layer"
CUTS = {
    IN_FRONT: Cut(relevance_in_front, decode_in_front),
    "at the merge": Cut(relevance_at_merge, decode),
}


@torch.no_grad()
def cost(model: Any, name: str, visual: int, ratio: float, repeats: int = 9) -> float:
    """Milliseconds of scoring and decoding a prompt of random embeddings, one row; the median."""
    around, front = 8, slice(scoring_layer(model) if name == IN_FRONT else 0)
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, around + visual + around, 192, generator=generator).to(model.device)
    every = torch.arange(embeds.shape[1], device=model.device)
    times = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        positions = every.expand(3, 1, -1)
        hidden = run_layers(model, embeds, positions, front)
        if ratio:
            score = scored(model, hidden, slice(around + visual, None), slice(around, around + visual)).sum(1)
            best = score.topk(round(visual * (1 - ratio))).indices.sort().values + around
            keep = torch.cat([every[None, :around], best, every[None, -around:]], 1)
            hidden, positions = gathered(hidden, keep), positions.gather(2, keep.expand(3, -1, -1))
        run_layers(model, hidden, positions, slice(front.stop, None)).sum().item()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[2:])


@torch.no_grad()
def check(model: Any, processor: Any, ratio: float = 0.8, questions: int = 40) -> None:
    """What `optimize` scores and answers is what the first way scores and answers."""
    prompts = evaluate.prepare(model, processor, pick_questions("test", questions, PER_SCENE))
    answers, scores = evaluate.by_pass(model, prompts, ratio=ratio, head_weights="uniform", backend="eager")
    hawk_compile.restore(model)
    for prompt, answer, score in zip(prompts, answers, scores, strict=True):
        start, stop = prompt.first, prompt.first + prompt.visual
        embeds = model.get_input_embeddings()(prompt.input_ids)
        embeds[0, start:stop] = prompt.features
        places = prompt.positions[1:]
        end = int((prompt.input_ids[0] == model.generation_config.eos_token_id).nonzero()[-1])
        raw = relevance_in_front(model, embeds, places, slice(stop + 1, end), slice(start, stop))
        ours = normalize(raw[0], dim=-1).mean(0)
        torch.testing.assert_close(score, ours, rtol=1e-4, atol=1e-5)
        best = ours.topk(hawk_compile.HawkConfig(ratio=ratio).kept(prompt.visual)).indices.sort().values + start
        keep = torch.cat([torch.arange(start), best, torch.arange(stop, embeds.shape[1])])[None]
        assert int(model.lm_head(decode_in_front(model, embeds, places, keep)).argmax()) == answer
    print(f"optimize scores and answers {questions} questions the same way")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--questions", type=int, default=1200)
    parser.add_argument("--calibration", type=int, default=400)
    parser.add_argument("--visual", type=int, default=1024, help="visual tokens of the prompt that is timed")
    parser.add_argument("--check", action="store_true", help="hold the first way to `optimize`, and measure nothing")
    options = parser.parse_args()
    model, processor = load(options.model, options.device)
    # Of a folder with this model type transformers loads Qwen3.5's tokenizer, whatever the folder holds.
    processor.tokenizer = PreTrainedTokenizerFast.from_pretrained(options.model)
    if options.check:
        return check(model, processor)
    print((options.model / "training.json").read_text(encoding="utf-8"))
    for name, cut in CUTS.items():
        found = measure(model, processor, options.questions, options.calibration, cut)
        times = {ratio: round(cost(model, name, options.visual, ratio), 2) for ratio in (0, *RATIOS)}
        print(f"## Cut {name}\n", markdown(found.table), json.dumps(found.weights["weights"]), f"ms: {times}", sep="\n")


if __name__ == "__main__":
    main()
