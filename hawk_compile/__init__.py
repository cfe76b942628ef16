"""Visual-token pruning for vision-language models, inside the compiled graph (HAWK, arXiv 2604.07812).

    model = hawk_compile.optimize(model, ratio=0.8)   # remove 80 % of the visual tokens of every prompt
    out = model.generate(**inputs)                    # nothing else changes
    hawk_compile.report(model)                        # what its last prefill kept; so of an output or of a cache
    with hawk_compile.pruned(model, ratio=0.5): ...   # only in here, by these settings
    hawk_compile.warm_up(model, inputs)               # compile ahead what the first prompts would wait for
    model = hawk_compile.restore(model)               # exactly the model it was
    hawk_compile.inspect("folder/of/a/checkpoint")    # what would be pruned, from the configuration alone
    hawk_compile.calibrate(model, processor, "questions.jsonl").write("head_weights.json")
    hawk_compile.evaluate(model, processor, "questions.jsonl", ratios=(0.6, 0.8))
    hawk_compile.show(model, processor, "photo.png", "What is this?", ratio=0.8).write("kept.png")
    hawk_compile.bench("small").write("bench/")       # what pruning saves on this machine
    hawk_compile.export(model, inputs, "out/", format="onnx", ratio=0.8)
    hawk_compile.load("out/").generate(**inputs)      # the same, in ONNX Runtime
    hawk_compile.save_compiled(model, "compiled/")    # for load_compiled in a new process, which compiles nothing then

Settings are given by name or as one `HawkConfig`, to all alike; what takes a while tells `progress=` how far it is.
What this package refuses, it refuses with a `hawk_compile.HawkError`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hawk_compile import errors, selectors
    from hawk_compile.errors import (
        CaptureError,
        CompileError,
        ConfigError,
        ExportError,
        GraphError,
        HawkError,
        HeadWeightsError,
        InputError,
        ManifestError,
        UnsupportedCallError,
        UnsupportedModelError,
    )
    from hawk_compile.exporting.runner import Runner, load
    from hawk_compile.exporting.write import export
    from hawk_compile.progress import Progress
    from hawk_compile.runtime.api import optimize, pruned, report, restore
    from hawk_compile.runtime.records import Report
    from hawk_compile.runtime.warming import warm_up
    from hawk_compile.saved.load import load_compiled
    from hawk_compile.saved.save import save_compiled
    from hawk_compile.settings.budgets import Adaptive
    from hawk_compile.settings.config import HawkConfig
    from hawk_compile.settings.selectors import register_selector
    from hawk_compile.tools.benchmarking.bench import bench
    from hawk_compile.tools.benchmarking.result import Benchmark
    from hawk_compile.tools.calibration.calibrate import calibrate
    from hawk_compile.tools.calibration.result import Calibration
    from hawk_compile.tools.evaluation.evaluate import evaluate
    from hawk_compile.tools.evaluation.result import Evaluation
    from hawk_compile.tools.inspection.inspect import Inspection
    from hawk_compile.tools.inspection.inspect import inspect_model as inspect
    from hawk_compile.tools.pictures.seen import Seen
    from hawk_compile.tools.pictures.show import show

__version__ = "0.1.0"
__all__ = [
    "Adaptive",
    "Benchmark",
    "Calibration",
    "CaptureError",
    "CompileError",
    "ConfigError",
    "Evaluation",
    "ExportError",
    "GraphError",
    "HawkConfig",
    "HawkError",
    "HeadWeightsError",
    "InputError",
    "Inspection",
    "ManifestError",
    "Progress",
    "Report",
    "Runner",
    "Seen",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "bench",
    "calibrate",
    "errors",
    "evaluate",
    "export",
    "inspect",
    "load",
    "load_compiled",
    "optimize",
    "pruned",
    "register_selector",
    "report",
    "restore",
    "save_compiled",
    "selectors",
    "show",
    "warm_up",
]

SUBMODULES = ("errors", "selectors")
HOMES = {
    "Adaptive": "settings.budgets",
    "Benchmark": "tools.benchmarking.result",
    "Calibration": "tools.calibration.result",
    "CaptureError": "errors",
    "CompileError": "errors",
    "ConfigError": "errors",
    "Evaluation": "tools.evaluation.result",
    "ExportError": "errors",
    "GraphError": "errors",
    "HawkConfig": "settings.config",
    "HawkError": "errors",
    "HeadWeightsError": "errors",
    "InputError": "errors",
    "Inspection": "tools.inspection.inspect",
    "ManifestError": "errors",
    "Progress": "progress",
    "Report": "runtime.records",
    "Runner": "exporting.runner",
    "Seen": "tools.pictures.seen",
    "UnsupportedCallError": "errors",
    "UnsupportedModelError": "errors",
    "bench": "tools.benchmarking.bench",
    "calibrate": "tools.calibration.calibrate",
    "evaluate": "tools.evaluation.evaluate",
    "export": "exporting.write",
    "inspect": "tools.inspection.inspect:inspect_model",
    "load": "exporting.runner",
    "load_compiled": "saved.load",
    "optimize": "runtime.api",
    "pruned": "runtime.api",
    "register_selector": "settings.selectors",
    "report": "runtime.api",
    "restore": "runtime.api",
    "save_compiled": "saved.save",
    "show": "tools.pictures.show",
    "warm_up": "runtime.warming",
}
"""The module of each public name, and its name there where that is another: imported when it is first used, since torch
and transformers take seconds."""

if not TYPE_CHECKING:  # a type checker would believe in any name

    def __getattr__(name: str) -> Any:
        if name in SUBMODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, inner_name = HOMES[name].partition(":")
        try:
            home = importlib.import_module(f"{__name__}.{module}")
        except ImportError as error:
            from hawk_compile.versions import explain

            explain(error)
            raise
        value = globals()[name] = getattr(home, inner_name or name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
