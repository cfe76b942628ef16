"""How long the decoder's prefill takes with visual tokens removed, over the same model compiled without pruning.

    python benchmarks/prefill.py [--device cuda --dtype bfloat16 --sides 32 64] [--markdown]

A Qwen2.5-VL with random weights (times do not depend on them), one prompt with one encoded image: the vision tower is
not timed, since pruning leaves it as it is. Called in turns in one process, medians given: the plain model through
`torch.compile(dynamic=True)` ("compiled"), the optimised model with ratio=0 ("ratio 0") and with each ratio. Each call
is the whole forward: planning, graph, and filling the cache. Nothing is timed before the pruned logits have been
compared with a plain decoder that runs on inputs gathered by hand.
"""

import argparse
import copy
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

import hawk_compile
from hawk_compile.environment import gpus, processor

SIDES = (16, 24, 32)
"""Visual tokens along one side of the image where none are named: 256, 576 and 1,024 of them."""
RATIOS = (0.5, 0.8, 0.9)
TEXT = 64
"""Text tokens of the prompt: half before the image, half behind it."""
DTYPES = ("float32", "bfloat16", "float16")
NOISE_FACTOR = 3
"""How much more than compiling alone pruning may change the logits: it sums over other tokens in another order."""
IMAGE, VISION_START, VISION_END, END_OF_TURN, VOCABULARY = 1, 2, 3, 4, 1024


def build(layers: int, width: int, device: str, dtype: torch.dtype) -> Any:
    """Qwen2.5-VL with heads of 64, a KV head for four query heads, and a vision tower too small to matter."""
    heads = width // 64
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 4),
            "bos_token_id": 0,
            "eos_token_id": END_OF_TURN,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 1, "out_hidden_size": width,
            "fullatt_block_indexes": [0],
        },
        image_token_id=IMAGE, video_token_id=5, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = END_OF_TURN
    return model.eval()


def prompt(model: Any, side: int) -> Callable[[], dict[str, Any]]:
    """The arguments of a forward: text, an image of side x side visual tokens, text. Each call has its own dict."""
    generator = torch.Generator().manual_seed(side)
    visual, width = side * side, model.config.get_text_config().hidden_size
    words = torch.randint(8, VOCABULARY, (TEXT - 4,), generator=generator).tolist()
    before, behind = words[: len(words) // 2], words[len(words) // 2 :]
    ids = torch.tensor([[*before, VISION_START, *[IMAGE] * visual, VISION_END, *behind, END_OF_TURN, words[0]]])
    positions, _ = model.model.get_rope_index(ids, (ids == IMAGE).int(), torch.tensor([[1, 2 * side, 2 * side]]))
    features = torch.randn(visual, width, generator=generator).to(model.device, model.dtype)
    ids, positions = ids.to(model.device), positions.to(model.device)

    def arguments() -> dict[str, Any]:
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=[features])}
        return {"input_ids": ids, "position_ids": positions, "mm_encoder_outputs": encoded, "logits_to_keep": 1}

    return arguments


def distance(found: Any, expected: Any) -> float:
    """The largest difference of logits over the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def check(model: Any, plain: Any, compiled: Any, arguments: Callable[[], dict[str, Any]]) -> None:
    """Stop if the optimised model's logits are not those of the plain decoder on the tokens that it kept.

    What rounding does in this dtype is measured, not assumed: by how much compiling the plain model changes its logits.
    """
    noise = distance(compiled(**arguments()).logits, plain(**arguments()).logits)
    logits = model(**arguments()).logits
    given = arguments()
    embeds = plain.get_input_embeddings()(given["input_ids"])
    embeds[given["input_ids"] == IMAGE] = given["mm_encoder_outputs"]["image"].pooler_output[0]
    keep = hawk_compile.report(model).keep_indices[0].to(embeds.device)
    hidden = plain.model.language_model(
        inputs_embeds=embeds[:, keep], position_ids=given["position_ids"][:, :, keep], use_cache=False
    ).last_hidden_state
    off = distance(logits, plain.lm_head(hidden[:, -1:]))
    if not off <= NOISE_FACTOR * noise + torch.finfo(logits.dtype).eps:
        sys.exit(f"the pruned logits are off by {off:.1e}, those of compiling alone by {noise:.1e}: nothing is timed")


def measure(model: Any, plain: Any, compiled: Any, side: int, rounds: int, backend: str) -> dict[float | None, float]:
    """Median seconds of a call: None for the plain model compiled, else by ratio."""
    arguments = prompt(model, side)
    for ratio in (0.0, *RATIOS):
        hawk_compile.optimize(model, ratio=ratio, backend=backend)
        check(model, plain, compiled, arguments)
    spent: dict[float | None, list[float]] = {None: [], **{ratio: [] for ratio in (0.0, *RATIOS)}}
    for number in range(rounds + 3):
        for ratio, seconds in spent.items():
            if ratio is not None:
                hawk_compile.optimize(model, ratio=ratio, backend=backend)
            call, given = compiled if ratio is None else model, arguments()
            synchronize(model.device)
            started = time.perf_counter()
            call(**given)
            synchronize(model.device)
            if number >= 3:
                seconds.append(time.perf_counter() - started)
    return {ratio: statistics.median(seconds) for ratio, seconds in spent.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows(model: Any, side: int, medians: dict[float | None, float]) -> list[tuple[str, ...]]:
    """One line for each ratio."""
    lines = []
    compiled, unpruned = medians[None], medians[0.0]
    for ratio in RATIOS:
        work = hawk_compile.inspect(model, ratio=ratio, image_tokens=side * side, text_tokens=TEXT, layers=1)
        assert work.flop_ratio is not None
        times = (f"{1e3 * seconds:.2f}" for seconds in (compiled, unpruned, medians[ratio]))
        shares = (medians[ratio] / compiled, work.kept_tokens / work.prompt_tokens, work.flop_ratio)
        lengths = f"{work.prompt_tokens} -> {work.kept_tokens}"
        lines.append((f"{side * side}", f"{ratio:g}", lengths, *times, *(f"{share:.3f}" for share in shares)))
    return lines


HEADINGS = (
    "V",
    "ratio",
    "S -> S'",
    "compiled ms",
    "ratio 0 ms",
    "pruned ms",
    "pruned / compiled",
    "S' / S",
    "FLOP ratio",
)


def machine(device: str) -> str:
    where = gpus() if device.startswith("cuda") else f"{processor()}, {torch.get_num_threads()} threads"
    today = datetime.date.today().isoformat()
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}; {today}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--backend", default="inductor", choices=["inductor", "aot_eager", "eager"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="visual tokens along an image's side")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown", action="store_true", help="lines for benchmarks/RESULTS.md")
    given = parser.parse_args()
    with torch.no_grad():
        model = build(given.layers, given.width, given.device, getattr(torch, given.dtype))
        # A second set of modules over the same parameters, which stays as it is.
        plain = copy.deepcopy(model, {id(each): each for each in model.parameters()})
        compiled = torch.compile(plain, backend=given.backend, dynamic=True)
        found = []
        for side in given.sides:
            found += rows(model, side, measure(model, plain, compiled, side, given.rounds, given.backend))
            print(f"{side * side} visual tokens: done", file=sys.stderr)
    if given.markdown:
        print(f"{machine(given.device)}\n\n`python {' '.join(sys.argv)}`\n")
        print("\n".join(f"| {' | '.join(line)} |" for line in (HEADINGS, ("---:",) * len(HEADINGS), *found)))
        return
    print(machine(given.device))
    widths = [max(len(line[column]) for line in (HEADINGS, *found)) for column in range(len(HEADINGS))]
    for line in (HEADINGS, *found):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


if __name__ == "__main__":
    main()
