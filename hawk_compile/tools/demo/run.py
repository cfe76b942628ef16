"""`hawk-compile demo`: the shipped model answers questions about scenes it has never seen, with and without pruning.

Every number printed is measured in the run that prints it.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import hawk_compile
from hawk_compile.errors import ConfigError, InputError
from hawk_compile.tools.demo import evaluate
from hawk_compile.tools.demo.evaluate import Prompt, by_hand, by_pass, chat, inputs_of, prepare
from hawk_compile.tools.demo.picture import Panel, write
from hawk_compile.tools.demo.scenes import Question, Scene, make_scene, pick_questions
from hawk_compile.tools.environment import compiler
from hawk_compile.tools.inspection.inspect import inspect_model

MODEL = Path(__file__).with_name("model")
PER_SCENE = 4
RATIOS = (0.6, 0.8)
"""Fractions removed in the table of accuracies, beside 0."""
LARGE = (784, 784)
"""A picture of 784 visual tokens to time, the processor's largest; training pictures had at most 196."""
ROUNDS = 15
SHOWN = 4


def run(console: Console, *, questions: int, ratio: float, seed: int, backend: str, out: Path) -> None:
    """The whole demo.

    Args:
        questions: held-out questions for the table of accuracies, a multiple of 4 is taken; at least 8.
        ratio: fraction of visual tokens removed where one is shown and timed.
        seed: chooses the scene that is shown and the random tokens.
        backend: what compiles the prefill.
        out: where the picture goes.

    Raises:
        ConfigError, InputError: settings that cannot be used.
    """
    hawk_compile.HawkConfig(ratio=ratio, backend=backend)  # refuses what is out of range before anything is loaded
    if questions < 2 * PER_SCENE:
        raise InputError(f"questions must be at least {2 * PER_SCENE}, got {questions}")
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")
    if not out.parent.is_dir() or out.is_dir():
        raise InputError(f"out must be a file in a folder that exists, got {out}: make the folder, or name a file")
    if backend == "inductor" and compiler().startswith("none"):
        raise ConfigError(
            "inductor compiles for the CPU with a C++ compiler, and there is none: install g++, or give "
            "--backend aot_eager"
        )
    started = time.perf_counter()
    model, processor = load()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"Model: {type(model).__name__}, {parameters / 1e6:.1f} M parameters, trained from scratch on pictures of "
        f"digits and shapes. It shows how pruning works; it says nothing about large models. Card: {MODEL}/README.md"
    )
    show_answers(console, model, processor, ratio, seed, backend, out)
    show_times(console, model, processor, ratio, seed, backend)
    show_accuracy(console, model, processor, questions, seed, backend)
    console.print(f"\nThe demo took {time.perf_counter() - started:.0f} s.")


def load() -> tuple[Any, Any]:
    """The shipped model in float32, and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(MODEL, local_files_only=True)


def ask(model: Any, processor: Any, scene: Scene, question: Question) -> str:
    """One question, as any user of transformers asks it."""
    inputs = processor(text=[chat(processor, question.text)], images=[scene.pil()], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def show_answers(
    console: Console, model: Any, processor: Any, ratio: float, seed: int, backend: str, out: Path
) -> None:
    """Questions about one held-out scene through `generate`, and the picture of what was kept for each."""
    scene = make_scene("test", 10_000 + seed)
    rng = np.random.default_rng(seed)
    things = rng.permutation(len(scene.questions) // 2)[:SHOWN]
    asked = [scene.questions[2 * int(thing) + int(rng.integers(2))] for thing in things]
    plain = [ask(model, processor, scene, question) for question in asked]
    hawk_compile.optimize(model, ratio=ratio, backend=backend)
    table = Table(box=None, pad_edge=False)
    for heading in ("question", "right", "unpruned", f"{percent(ratio)} removed", "visual tokens", "prompt"):
        table.add_column(heading)
    panels = [Panel(scene, ("a scene that was never trained on", f"{scene.size[0]} x {scene.size[1]} pixels"))]
    started, first = time.perf_counter(), 0.0
    for question, before in zip(asked, plain, strict=True):
        after = ask(model, processor, scene, question)
        first = first or time.perf_counter() - started
        report = hawk_compile.report(model)
        visual, kept = int(report.visual_tokens[0]), int(report.kept_visual_tokens[0])
        table.add_row(
            question.text,
            question.answer,
            before,
            after,
            f"{visual} -> {kept}",
            f"{report.prompt_tokens} -> {report.kept_tokens}",
        )
        panels.append(
            Panel(
                scene,
                (f'"{question.text}": {after}', f"{kept} of {visual} visual tokens kept"),
                kept_of(processor, scene, question, report),
            )
        )
    hawk_compile.restore(model)
    write(panels, out)
    console.print(
        f"\nOne scene, with and without pruning (backend {backend}; the first pruned answer took "
        f"{first:.0f} s, compilation included):"
    )
    console.print(table)
    console.print(f"Head weights: {report.head_weights}. Picture of the kept tokens: {out}")


def kept_of(processor: Any, scene: Scene, question: Question, report: hawk_compile.Report) -> np.ndarray:
    """Which visual tokens of the scene were kept: indices into its grid, row by row."""
    ids = processor(text=[chat(processor, question.text)], images=[scene.pil()], return_tensors="pt")["input_ids"][0]
    visual = ids == processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    first = int(visual.int().argmax())
    kept = report.keep_indices[0]
    return (kept[visual[kept]] - first).numpy()


def show_times(console: Console, model: Any, processor: Any, ratio: float, seed: int, backend: str) -> None:
    """The decoder's prefill, pruned over unpruned: one compiled graph, in turns, medians."""
    table = Table(box=None, pad_edge=False)
    headings = ("prompt tokens", "unpruned", "pruned", "time ratio", "token ratio", "FLOP ratio")
    for heading in headings:
        table.add_column(heading, justify="right")
    for size in (None, LARGE):
        scene = make_scene("test", 10_000 + seed, size)
        prompt = prepare(model, processor, [(scene, scene.questions[0])], seed)[0]
        work = inspect_model(
            model,
            ratio=ratio,
            image_tokens=prompt.visual,
            text_tokens=prompt.input_ids.shape[1] - prompt.visual,
            layers=1,
        )
        before, after = time_prefill(model, prompt, ratio, backend)
        flops = "unknown" if work.flop_ratio is None else f"{work.flop_ratio:.2f}"
        table.add_row(
            f"{work.prompt_tokens} -> {work.kept_tokens}",
            f"{1e3 * before:.1f} ms",
            f"{1e3 * after:.1f} ms",
            f"{after / before:.2f}",
            f"{work.kept_tokens / work.prompt_tokens:.2f}",
            flops,
        )
    console.print(
        f"\nTime of the decoder's prefill, {percent(ratio)} of the visual tokens removed, over the same compiled "
        f"graph with ratio=0 ({ROUNDS} calls each, in turns, medians; {torch.get_num_threads()} threads):"
    )
    console.print(table)


def time_prefill(model: Any, prompt: Prompt, ratio: float, backend: str) -> tuple[float, float]:
    """Median seconds of a prefill with ratio=0 and with `ratio`."""
    spent: dict[float, list[float]] = {0.0: [], ratio: []}
    with torch.no_grad():
        for number in range(ROUNDS + 2):
            for each, seconds in spent.items():
                hawk_compile.optimize(model, ratio=each, backend=backend)
                started = time.perf_counter()
                model(**inputs_of(prompt))
                if number >= 2:  # the first calls compile and warm up
                    seconds.append(time.perf_counter() - started)
    hawk_compile.restore(model)
    return statistics.median(spent[0.0]), statistics.median(spent[ratio])


def show_accuracy(console: Console, model: Any, processor: Any, questions: int, seed: int, backend: str) -> None:
    """Accuracy on held-out questions by the share of visual tokens removed, for HAWK and for other choices."""
    prompts = prepare(model, processor, pick_questions("test", questions - questions % PER_SCENE, PER_SCENE), seed)
    answers = np.array([prompt.answer for prompt in prompts])
    unpruned, _ = by_pass(model, prompts, ratio=0.0, backend=backend)
    by_eager = by_hand(model, prompts, 0.0, evaluate.random_choice)
    diverse = evaluate.diverse(prompts)
    rows: dict[str, dict[float, np.ndarray]] = {}
    for ratio in RATIOS:
        weighted, scores = by_pass(model, prompts, ratio=ratio, backend=backend)
        equal, _ = by_pass(model, prompts, ratio=ratio, backend=backend, head_weights="uniform")
        by_name = {"HAWK": weighted, "HAWK, equal head weights": equal}
        others = {
            "HAWK with another question's scores": evaluate.another_question(prompts, scores),
            "random": evaluate.random_choice,
            "DivPrune (looks at the picture alone)": diverse,
            "oracle (the object's own tokens first)": evaluate.oracle,
        }
        by_name |= {name: by_hand(model, prompts, ratio, score) for name, score in others.items()}
        for name, given in by_name.items():
            rows.setdefault(name, {})[ratio] = given == answers
    hawk_compile.restore(model)
    same = int((unpruned == by_eager).sum())
    table = Table(box=None, pad_edge=False)
    for heading in ("visual tokens removed", "0 %", *(percent(ratio) for ratio in RATIOS)):
        table.add_column(heading, justify="left" if heading.startswith("visual") else "right")
    for name, right in rows.items():
        table.add_row(name, f"{(unpruned == answers).mean():.3f}", *(f"{right[ratio].mean():.3f}" for ratio in RATIOS))
    console.print(f"\nAccuracy over {len(prompts)} held-out questions about {len(prompts) // PER_SCENE} scenes:")
    console.print(table)
    for ratio in RATIOS:
        low, high = interval(rows["HAWK"][ratio], rows["random"][ratio])
        console.print(f"HAWK - random at {percent(ratio)}: {low:+.3f} to {high:+.3f} (95 %, paired by scene)")
    console.print(
        f"With nothing removed, the pass and a plain eager decoder agree on {same} of {len(prompts)} answers."
    )


def percent(ratio: float) -> str:
    return f"{100 * ratio:g} %"


def interval(left: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """95 % interval of the difference of two accuracies on the same questions; a scene's questions are one draw."""
    difference = (left.astype(float) - right).reshape(-1, PER_SCENE).mean(1)
    spread = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
    return float(difference.mean() - spread), float(difference.mean() + spread)
