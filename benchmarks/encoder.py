"""What `image_cache` saves of the time to the first token, and what it costs where a picture is new.

    OMP_NUM_THREADS=1 python benchmarks/encoder.py [--tokens 256,1024] [--rounds 11] [--config small]
    OMP_NUM_THREADS=1 python benchmarks/encoder.py --together [--tokens 256]
    OMP_NUM_THREADS=1 python benchmarks/encoder.py --precisions [--tokens 256]

"without" is the pruned model, "again" the same with `image_cache` asked another question about a picture that it has
seen, "new" about one that it has not. All in turns, medians; ratios are medians of the turns' ratios. `--together`
encodes several images of one call at once, as models do, and one by one, as `image_cache` has it. `--precisions` runs
the encoder alone in other precisions than the model's fp32: bf16, and int8 weights and activations (dynamic, torchao).
"""

import functools
import statistics
from typing import Annotated, Any

import torch
import typer

import hawk_compile
from hawk_compile.capture.features import features_of
from hawk_compile.capture.one_by_one import apart
from hawk_compile.capture.vision import CompiledVision
from hawk_compile.runtime.cached_images import digest_of
from hawk_compile.runtime.state import RUNTIME
from hawk_compile.tools.benchmarking import prompts
from hawk_compile.tools.benchmarking.images import picture
from hawk_compile.tools.benchmarking.models import load
from hawk_compile.tools.benchmarking.profiles import profile, qwen2_5_vl_scaled
from hawk_compile.tools.benchmarking.timing import Call, in_turns, spread
from hawk_compile.tools.environment import measured_on

CPU = torch.device("cpu")
TOWER = "tower"
"""Two decoder layers of width 512 behind an encoder of 24 such layers, as large towers are to their pictures."""


@torch.no_grad()
def main(
    config: Annotated[str, typer.Option(help="profile, or tower")] = "small",
    tokens: Annotated[str, typer.Option(help="visual tokens")] = "256,1024",
    ratio: Annotated[float, typer.Option(help="fraction of them removed")] = 0.8,
    rounds: Annotated[int, typer.Option(help="turns")] = 11,
    together: Annotated[bool, typer.Option(help="compare several images at once with one by one")] = False,
    precisions: Annotated[bool, typer.Option(help="run the encoder in other precisions")] = False,
) -> None:
    print(measured_on("cpu"))
    if precisions:
        for count in map(int, tokens.split(",")):
            compare_precisions(config, count, rounds)
        return
    for count in map(int, tokens.split(",")):
        if together:
            compare(config, count, rounds)
        else:
            first_token(config, count, ratio, rounds)


def first_token(config: str, count: int, ratio: float, rounds: int) -> None:
    made = qwen2_5_vl_scaled(2, 512, 24, 512) if config == TOWER else profile(config)
    without, caching = (load(made, CPU, torch.float32, None, False)[0] for _ in range(2))
    prompt = prompts.make(without, picture(made, count), 64, 1, CPU)
    settings: dict[str, Any] = {"ratio": ratio, "compile_vision": True, "head_weights": "uniform"}
    hawk_compile.optimize(without, **settings)
    hawk_compile.optimize(caching, **settings, image_cache="1GB")
    words = prompts.plain_ids(without)
    asked = slice(prompt.question.start, prompt.question.stop)

    def another() -> dict[str, Any]:
        """Another question about the picture."""
        ids = prompt.ids.clone()
        ids[:, asked] = words[torch.randint(len(words), (asked.stop - asked.start,))]
        return {**prompt.whole, "input_ids": ids}

    def new() -> dict[str, Any]:
        pixels = prompt.whole["pixel_values"]
        return {**another(), "pixel_values": pixels + 1e-3 * torch.randn(pixels.shape)}

    inputs = another()
    expected = without(**inputs).logits
    assert all(caching(**inputs).logits.equal(expected) for _ in range(2))
    calls = [
        Call("without", ratio, lambda: functools.partial(without, **another())),
        Call("again", ratio, lambda: functools.partial(caching, **another())),
        Call("new", ratio, lambda: functools.partial(caching, **new())),
    ]
    in_turns(calls, 2, CPU)
    times = dict(zip(("without", "again", "new"), in_turns(calls, rounds, CPU), strict=True))
    images = caching.__dict__[RUNTIME].images
    use, weights = images.use(), [*next(reversed(images.structures.values())).tensors()]
    assert not use.passed_over and use.hits >= rounds and use.misses >= rounds
    print(
        f"{config}, {prompt.length} tokens of which {count} visual, {ratio:g} removed, {rounds} turns; pixels "
        f"{megabytes(prompt.whole['pixel_values'])}, encoder {megabytes(*weights)}, kept of an image "
        f"{use.bytes / use.images / 1e6:.2f} MB"
    )
    for name, seconds in times.items():
        share = spread([one / other for one, other in zip(seconds, times["without"], strict=True)])
        median = 1e3 * statistics.median(seconds)
        print(f"  {name} {median:.1f} ms, over without {share.median:.3f} (iqr {share.iqr:.3f})", flush=True)
    structure = next(reversed(images.structures.values()))
    taken = {name: prompt.whole[name] for name in ("pixel_values", "image_grid_thw")}
    parts = {
        "modules and code": lambda: structure.holds(caching), "numbers": structure.numbers,
        "pixels": lambda: digest_of(taken),
    }  # fmt: skip
    spent = in_turns([Call(name, None, lambda part=part: part) for name, part in parts.items()], rounds, CPU)  # type: ignore[misc]
    told = (f"{name} {1e3 * statistics.median(seconds):.1f} ms" for name, seconds in zip(parts, spent, strict=True))
    print(f"  of again, to look at: {', '.join(told)}", flush=True)


def megabytes(*tensors: torch.Tensor) -> str:
    return f"{sum(each.nbytes for each in tensors) / 1e6:.1f} MB"


def compare(config: str, count: int, rounds: int) -> None:
    """Images of one call at once against one by one: times, and how far the features are from each other."""
    made = profile(config)
    for dtype in (torch.float32, torch.bfloat16):
        model = load(made, CPU, dtype, None, False)[0]
        for images in (2, 4):
            prompt = prompts.make(model, picture(made, count), 64, images, CPU)
            pixels = {name: value for name, value in prompt.whole.items() if name in ("pixel_values", "image_grid_thw")}
            pixels["pixel_values"] = torch.randn(pixels["pixel_values"].shape).to(dtype)
            alone = apart(pixels)
            assert len(alone) == images

            def features(given: dict[str, Any], model: Any = model) -> torch.Tensor:
                output = model.base_model.get_image_features(**given, return_dict=True)
                return torch.cat([*features_of(output)])

            at_once, one_by_one = in_turns([
                Call("at once", None, lambda given=pixels: lambda: features(given)),  # type: ignore[misc]
                Call("one by one", None, lambda given=alone: lambda: [*map(features, given)]),  # type: ignore[misc]
            ], rounds, CPU)  # fmt: skip
            whole, apart_too = features(pixels), torch.cat([*map(features, alone)])
            off = float((whole - apart_too).abs().max() / whole.abs().max())
            share = spread([one / other for one, other in zip(one_by_one, at_once, strict=True)])
            print(
                f"{config} in {str(dtype).partition('.')[2]}, {images} images of {count} tokens: one by one / at once "
                f"{share.median:.3f} (iqr {share.iqr:.3f}), features off by {off:.1e} of the largest", flush=True,
            )  # fmt: skip


def compare_precisions(config: str, count: int, rounds: int) -> None:
    """The encoder in other precisions over that in fp32, compiled and not: times, and how far features are off."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    made = qwen2_5_vl_scaled(2, 512, 24, 512) if config == TOWER else profile(config)
    loaded = {name: load(made, CPU, torch.float32, None, False)[0] for name in ("fp32", "bf16", "int8")}
    prompt = prompts.make(loaded["fp32"], picture(made, count), 64, 1, CPU)
    loaded["bf16"].base_model.visual.to(torch.bfloat16)
    quantize_(loaded["int8"].base_model.visual, Int8DynamicActivationInt8WeightConfig())
    pixels = torch.randn(prompt.whole["pixel_values"].shape)
    grid = prompt.whole["image_grid_thw"]

    def call(tower: Any, dtype: torch.dtype) -> Any:
        return functools.partial(tower, pixels.to(dtype), grid_thw=grid)

    for how in ("eager", "compiled"):
        calls = {}
        for name, model in loaded.items():
            visual = model.base_model.visual
            ran = visual if how == "eager" else CompiledVision("inductor").twin(model).base_model.visual
            calls[name] = call(ran, torch.bfloat16 if name == "bf16" else torch.float32)
        outputs = {name: one().pooler_output.float() for name, one in calls.items()}
        timed = [Call(name, None, lambda one=one: one) for name, one in calls.items()]  # type: ignore[misc]
        in_turns(timed, 1, CPU)
        seconds = dict(zip(calls, in_turns(timed, rounds, CPU), strict=True))
        for name in ("bf16", "int8"):
            share = spread([one / other for one, other in zip(seconds[name], seconds["fp32"], strict=True)])
            off = float((outputs[name] - outputs["fp32"]).abs().max() / outputs["fp32"].abs().max())
            print(
                f"{config}, {how}, {count} tokens: encoder in {name} over fp32 {share.median:.3f} (iqr "
                f"{share.iqr:.3f}), features off by {off:.1e} of the largest", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
