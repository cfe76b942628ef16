"""Visual-token pruning for vision-language models, inside the compiled graph (HAWK, arXiv 2604.07812).

    model = hawk_compile.optimize(model, ratio=0.8)   # remove 80 % of the visual tokens of every prompt
    out = model.generate(**inputs)                    # nothing else changes
    hawk_compile.report(model)                        # what the last prefill kept
    model = hawk_compile.restore(model)               # exactly the model it was
    hawk_compile.inspect("folder/of/a/checkpoint")    # what would be pruned, from the configuration alone
    hawk_compile.calibrate(model, processor, "questions.jsonl").write("head_weights.json")
    hawk_compile.evaluate(model, processor, "questions.jsonl", ratios=(0.6, 0.8))
    hawk_compile.bench("small").write("bench/")       # what pruning saves on this machine
    hawk_compile.export(model, inputs, "out/", format="onnx", ratio=0.8)
    hawk_compile.load("out/").generate(**inputs)      # the same, in ONNX Runtime

What this package refuses, it refuses with a `hawk_compile.HawkError`.
"""

from hawk_compile.errors import (
    CaptureError,
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
from hawk_compile.runtime.api import optimize, report, restore
from hawk_compile.runtime.records import Report
from hawk_compile.settings.budgets import Adaptive
from hawk_compile.settings.config import HawkConfig
from hawk_compile.settings.selectors import register_selector
from hawk_compile.tools.benchmarking.bench import Benchmark, bench
from hawk_compile.tools.calibration.calibrate import Calibration, calibrate
from hawk_compile.tools.evaluation.evaluate import Evaluation, evaluate
from hawk_compile.tools.inspection import Inspection
from hawk_compile.tools.inspection import inspect_model as inspect

__version__ = "0.1.0"
__all__ = [
    "Adaptive",
    "Benchmark",
    "Calibration",
    "CaptureError",
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
    "Report",
    "Runner",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "bench",
    "calibrate",
    "evaluate",
    "export",
    "inspect",
    "load",
    "optimize",
    "register_selector",
    "report",
    "restore",
]
