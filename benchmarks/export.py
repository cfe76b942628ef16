"""Exported models beside PyTorch: do they answer alike, and how much faster is a prefill with visual tokens removed.

    python benchmarks/export.py agreement [--formats onnx aoti openvino executorch int8] [--questions 200]
    python benchmarks/export.py architectures [--formats onnx aoti openvino executorch] [--names qwen2_5_vl ...]
    python benchmarks/export.py speed

`agreement` asks the shipped model held-out questions about images of six sizes, in batches of 1, 2 and 4, through every
format and through the optimised model in PyTorch: ids and kept tokens are compared, the largest difference of a logit
and the accuracy are given. Formats are exported from one prompt of one image. "int8" is ONNX with int8 weights in the
decoder.

`architectures` exports a tiny model of each architecture, with random weights, from one prompt of one image, and
compares it at three shapes that it was not exported from: another image, two rows with several images, three rows.

`speed` times the prefill of a Qwen2.5-VL with random weights in ONNX Runtime, exported without pruning and with it: in
one process, in turns, medians.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

import hawk_compile
from hawk_compile.exporting import onnx
from hawk_compile.exporting.caches import held_by
from hawk_compile.exporting.check import Agreement, compare
from hawk_compile.exporting.components import Component
from hawk_compile.exporting.parts import write_part
from hawk_compile.exporting.prefill import prefill_component, prune
from hawk_compile.tools.benchmarking import prompts
from hawk_compile.tools.benchmarking.images import picture
from hawk_compile.tools.benchmarking.models import load
from hawk_compile.tools.benchmarking.profiles import qwen2_5_vl_scaled
from hawk_compile.tools.demo.scenes import make_scene

SIZES = ((336, 336), (336, 364), (392, 336), (448, 336), (336, 420), (420, 392))
BATCHES = (1, 2, 4)
ARCHITECTURES = ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl", "gemma3", "smolvlm"]
EXTRA: dict[str, dict[str, Any]] = {
    "int8": {"quantization": "int8"},
    "executorch": {
        "sizes": {"batch": (1, 1, 4), "prompt": (2, 256, 512), "visual": (2, 200, 1024), "images": (1, 1, 4)},
    },
}
"""Settings of formats beyond the common ones: ExecuTorch plans its memory for the largest batch."""
VISUAL, TEXT = 1024, 64
"""Tokens of the prompt that is timed."""
RATIOS = (0.5, 0.8, 0.9)


def agreement(formats: list[str], questions: int, ratio: float) -> None:
    folder = str(resources.files("hawk_compile.tools.demo").joinpath("model"))
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    batches = list(asked(processor, questions))
    print("| format | export s | MB | same ids | same kept tokens | largest logit difference | accuracy |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    optimized = hawk_compile.optimize(model, ratio=ratio, backend="eager")
    print(f"| PyTorch | | | | | | {accuracy(optimized.generate, batches, processor):.3f} |", flush=True)
    for name in formats:
        with tempfile.TemporaryDirectory() as parent:
            out, started = Path(parent) / name, time.perf_counter()
            kind = "onnx" if name == "int8" else name
            hawk_compile.export(model, batches[0][0], out, format=kind, ratio=ratio, **EXTRA.get(name, {}))
            seconds, size = time.perf_counter() - started, sum(file.stat().st_size for file in out.iterdir())
            runner = hawk_compile.load(out)
            found = Agreement()
            for inputs, _ in batches:
                one = compare(runner, model, [inputs], max_new_tokens=4)
                found = replace(
                    found, rows=found.rows + one.rows, same_ids=found.same_ids + one.same_ids,
                    same_kept=found.same_kept + one.same_kept, logits=max(found.logits, one.logits),
                )  # fmt: skip
            right = accuracy(runner.generate, batches, processor)
            print(
                f"| {name} | {seconds:.0f} | {size / 1e6:.1f} | {found.same_ids} / {found.rows} | "
                f"{found.same_kept} / {found.rows} | {found.logits:.1e} | {right:.3f} |",
                flush=True,
            )


def asked(processor: Any, questions: int) -> Any:
    """(inputs, answers) of held-out questions, one about each scene, in batches of each size in turn."""
    scene, counts = 0, itertools.cycle(BATCHES)
    while scene < questions:
        count = min(next(counts), questions - scene)
        texts, images, answers = [], [], []
        for index in range(scene, scene + count):
            shown = make_scene("test", index, SIZES[index % len(SIZES)])
            question = shown.questions[index % len(shown.questions)]
            turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
            texts.append(processor.apply_chat_template(turn, add_generation_prompt=True))
            images.append([shown.pil()])
            answers.append(question.answer)
        scene += count
        inputs = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
        yield dict(inputs), answers


def accuracy(generate: Any, batches: Any, processor: Any) -> float:
    right = total = 0
    for inputs, answers in batches:
        out = generate(**inputs, max_new_tokens=1, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        found = [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in out]
        right += sum(one == answer for one, answer in zip(found, answers, strict=True))
        total += len(answers)
    return right / total


def architectures(formats: list[str], names: list[str], dtype: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests import zoo

    print("| architecture | format | same ids | same kept tokens | largest logit difference |")
    print("| --- | --- | ---: | ---: | ---: |")
    for name, kind in itertools.product(names, formats):
        model = zoo.build(name, layers=2 if name in ("qwen3_vl", "gemma3") else 1).to(getattr(torch, dtype))
        rows = zoo.sizes(name)
        batches = ([rows[1]], [rows[2]], [rows[3], rows[6]], [rows[0], rows[4], rows[5]])
        first, *others = (
            {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in each.items()}
            for each in (zoo.inputs(name, model, rows=batch) for batch in batches)
        )
        with tempfile.TemporaryDirectory() as parent:
            out = Path(parent) / "out"
            hawk_compile.export(model, first, out, format=kind, ratio=0.6, **EXTRA.get(kind, {}))
            found = compare(hawk_compile.load(out), model, others, max_new_tokens=4)
        print(f"| {name} | {kind} | {found.same_ids} / {found.rows} | {found.same_kept} / {found.rows} | "
              f"{found.logits:.1e} |", flush=True)  # fmt: skip


class Unpruned(nn.Module):
    """The same prefill as it is exported, without a plan and without passes."""

    def __init__(self, prefill: Any):
        super().__init__()
        self.prefill = prefill

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, image_features: Tensor) -> Any:
        outputs = {"image": self.prefill.encoded("image", {"image_features": image_features})}
        cache = DynamicCache()
        result = self.prefill.run(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, mm_encoder_outputs=outputs,
            past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True,
        )  # fmt: skip
        return {"logits": result.logits[:, -1], **held_by(cache)}


def speed(layers: int, width: int, rounds: int) -> None:
    cpu = torch.device("cpu")
    shape = qwen2_5_vl_scaled(layers, width, vision_layers=1, vision_width=32)
    model, _ = load(shape, cpu, torch.float32, None, scoring_only=False)
    prompt = prompts.make(model, picture(shape, VISUAL), TEXT, 1, cpu)
    visual, ids = prompt.image.tokens, prompt.ids
    inputs = {name: value for name, value in prompt.whole.items() if name != "logits_to_keep"}
    inputs["attention_mask"] = torch.ones_like(ids)
    config = hawk_compile.HawkConfig(ratio=0.8)
    weights = torch.full((width // 64,), 64 / width)
    prefill = prefill_component(model, inputs, config, weights)
    names = ("input_ids", "attention_mask", "position_ids", "image_features")
    plain = Component(
        "unpruned", Unpruned(prefill.module), {name: prefill.sample[name] for name in names},
        {name: prefill.shapes[name] for name in names},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as parent:
        folder, sessions = Path(parent), {}
        for component in (plain, prune(prefill, config, portable=True, selection="sort")):
            part = write_part(onnx, component, folder, onnx.Options())
            sessions[component.name] = onnx.open_session(folder, part.file, part)
    single = {name: prefill.sample[name][..., :1, :] if name == "position_ids" else prefill.sample[name][:1]
              for name in names[:3]}  # fmt: skip
    single["image_features"] = prefill.sample["image_features"][:visual]
    single = {name: value.contiguous() for name, value in single.items()}
    calls: dict[float | None, Any] = {None: lambda: sessions["unpruned"](single)}
    for ratio in (0.0, *RATIOS):
        kept = hawk_compile.HawkConfig(ratio=ratio).kept(visual)
        feed = {**single, "budget": torch.tensor([kept]), "kept_slots": torch.arange(ids.shape[1] - visual + kept)}
        calls[ratio] = lambda feed=feed: sessions["prefill"](feed)
    spent: dict[float | None, list[float]] = {key: [] for key in calls}
    for number in range(rounds + 2):
        for key, call in calls.items():
            started = time.perf_counter()
            call()
            if number >= 2:
                spent[key].append(time.perf_counter() - started)
    medians = {key: 1e3 * statistics.median(seconds) for key, seconds in spent.items()}
    print("| ratio | S -> S' | unpruned ms | pruned ms | pruned / unpruned | S' / S |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for ratio in (0.0, *RATIOS):
        after = ids.shape[1] - visual + hawk_compile.HawkConfig(ratio=ratio).kept(visual)
        print(f"| {ratio:g} | {ids.shape[1]} -> {after} | {medians[None]:.1f} | {medians[ratio]:.1f} | "
              f"{medians[ratio] / medians[None]:.3f} | {after / ids.shape[1]:.3f} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    first = kinds.add_parser("agreement")
    first.add_argument("--formats", nargs="+", default=["onnx", "aoti", "openvino", "executorch", "int8"])
    first.add_argument("--questions", type=int, default=200)
    first.add_argument("--ratio", type=float, default=0.8, help="fraction of visual tokens removed")
    second = kinds.add_parser("architectures")
    second.add_argument("--formats", nargs="+", default=["onnx", "aoti", "openvino", "executorch"])
    second.add_argument("--names", nargs="+", default=ARCHITECTURES)
    second.add_argument("--dtype", default="float32")
    third = kinds.add_parser("speed")
    third.add_argument("--layers", type=int, default=6)
    third.add_argument("--width", type=int, default=512)
    third.add_argument("--rounds", type=int, default=15)
    chosen = vars(parser.parse_args())
    {"agreement": agreement, "architectures": architectures, "speed": speed}[chosen.pop("kind")](**chosen)


if __name__ == "__main__":
    main()
