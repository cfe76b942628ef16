"""What a drawn model is: the plain one and the one to be optimised, or the folder it was exported to."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import hawk_compile
from hawk_compile.exporting.settings import TAKEN
from tests import zoo
from tests.fuzz import prompts
from tests.zoo import ARCHITECTURES

Case = dict[str, Any]
LAYERS = 2


@lru_cache(maxsize=1)
def models(name: str, layers: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(plain, to be optimised), made at once: captured graphs are guarded by how many models there are."""
    torch._dynamo.reset()
    return zoo.build(name, layers=layers), zoo.build(name, layers=layers)


def settings_of(case: Case) -> dict[str, Any]:
    made, call = case["model"], case["call"]
    budget = made.get("mass")
    selector = made.get("selector", "hawk")
    settings = {
        "ratio": call["ratio"], "backend": made.get("backend", "eager"),
        "selector": selector, "normalization": made.get("normalization"), "query": made.get("query"),
        "min_per_image": call.get("min_per_image", 0), "quota": call.get("quota", "prompt"),
        "bucket": call.get("bucket", 1),
        "normalize_per": call.get("normalize_per", "prompt"), "question": call.get("question", "newest"),
        "compile_decode": made.get("compile_decode", False), "compile_vision": made.get("compile_vision", False),
        "head_weights": tuple(made["head_weights"]) if made.get("head_weights") else "uniform",
    }  # fmt: skip
    if budget is not None:
        settings["budget"] = hawk_compile.Adaptive(budget, **(call.get("bounds") or {}))
    if made["name"] in zoo.AUDIO_NAMES:
        settings["modalities"] = tuple(call.get("modalities") or ("image", "video", "audio"))
        if made["name"] != "qwen2_5_omni":
            settings["modalities"] = ("audio",)
    return settings


class Exported:
    """A folder's runner, called as a model whose ratio is set beforehand."""

    def __init__(self, runner: hawk_compile.Runner) -> None:
        self.runner, self.ratio = runner, 0.0
        self.generation_config = runner.model.generation_config

    def at(self, ratio: float) -> Exported:
        self.ratio = ratio
        return self

    def generate(self, **inputs: Any) -> Any:
        return self.runner.generate(**inputs, ratio=self.ratio)


@lru_cache(maxsize=1)
def exported(made: str) -> tuple[PreTrainedModel, Exported]:
    """(the plain model, the folder that one like it was exported to): the folder goes with the process."""
    model = json.loads(made)
    plain, other = models(model["name"], LAYERS)
    size = list(ARCHITECTURES[model["name"]].image_sizes[0])
    row: Case = {"turns": [{"after": 4, "images": [size]}], "seed": 0}
    settings = settings_of({"model": model, "call": {"ratio": 0.5}})
    folder = Path(tempfile.mkdtemp(prefix="hawk_fuzz_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    inputs = prompts.inputs_of(model["name"], row, prompts.line_of(model["name"], row))
    taken = {name: settings[name] for name in TAKEN if name in settings}
    hawk_compile.export(other, inputs, folder / "exported", format=model["format"], **taken)
    return plain, Exported(hawk_compile.load(folder / "exported"))
