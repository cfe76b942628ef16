"""ExecuTorch programs by transformers' exporter, with XNNPACK on the CPU.

Memory is planned when a program is written, for the largest sizes that it may meet: those of the setting `sizes`, which
says how in `profile.py`. The session refuses larger inputs.

Wrapped, because ExecuTorch 1.5 needs it:

- checks of sizes, for which it has no kernels, are removed: `profile.check_sizes` stands in for them;
- sizes that are minima or maxima of others (slices make them) are let through to the pass that translates them, which
  comes after its verifier;
- XNNPACK gets products with weights only: given more, a pruned prefill fails when it runs ("Propagating input shapes
  failed"). What is left runs on ExecuTorch's own kernels;
- a view keeps memory of its own: where it shares its base's, a tower's program does not load, because a tensor as
  large as all windows ends beyond the planned memory;
- a convolution over whole patches in three dimensions, for which there is no kernel, becomes the product that it is.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram

from hawk_compile.compat.dynamo import bound_sympy, tree_leaves
from hawk_compile.compat.exporters import executorch_lowered
from hawk_compile.exporting import profile
from hawk_compile.exporting.components import Component
from hawk_compile.exporting.profile import Range
from hawk_compile.passes.remove_assertions import CHECKS, remove_assertions

PACKAGES: tuple[str, ...] = ("executorch",)
RUN_BY = PACKAGES
EXTRA = "executorch"
SETTINGS = ("sizes",)
RANGES = ("sym_constrain_range", "sym_constrain_range_for_size")
"""Checks of sizes in a program, beside assertions."""


@dataclass(frozen=True)
class Options:
    """`sizes`: (minimum, usual, maximum) by name, where the user gave them; see `profile.py`."""

    sizes: dict[str, Range]
    selection = "threshold"
    """How the prefill selects: ExecuTorch has no kernel for a sort."""


def options(settings: dict[str, Any]) -> Options:
    """This format's own settings, as `export` was given them.

    Raises:
        ConfigError: sizes that are none.
    """
    return Options(profile.checked(settings.get("sizes", {})))


def write(component: Component, folder: Path, options: Options) -> tuple[list[str], dict[str, Any]]:
    """Write one component; returns the name of its file, and as details the `profile` (sizes by name)."""
    from transformers.exporters.exporter_executorch import ExecutorchConfig, ExecutorchExporter

    sizes = bounded(component, profile.ranges(component, options.sizes))
    component = replace(component, most={name: size[2] for name, size in sizes.items()})
    with adapted():
        program = component.program(ExecutorchExporter, ExecutorchConfig, backend="xnnpack")
    name = f"{component.name}.pte"
    ExecutorchExporter.save_program(program, folder / name)
    return [name], {"profile": {name: list(size) for name, size in sizes.items()}}


@contextlib.contextmanager
def adapted() -> Iterator[None]:
    """Let transformers' exporter lower as the module's docstring says."""
    from executorch.backends.xnnpack.partition.config.gemm_configs import AddmmConfig, LinearConfig, MMConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig

    def products_only(module: Any, sample: Any, prepared: Callable[..., Any]) -> Any:
        module, sample, _ = prepared(module, sample)
        return module, sample, [XnnpackPartitioner(configs=[AddmmConfig, LinearConfig, MMConfig])]

    own_memory = ExecutorchBackendConfig(remove_view_copy=False, sym_shape_eval_pass=largest_shapes())
    extremes = [torch.sym_max, torch.sym_min]
    convolution = (torch.nn.functional, "conv3d", as_product)
    with executorch_lowered(products_only, extremes, own_memory, remove_checks, [convolution]):
        yield


def largest_shapes() -> Any:
    """The pass that plans memory for the largest shapes."""
    from executorch.exir.pass_base import PassBase, PassResult
    from executorch.exir.tensor import TensorSpec

    class LargestShapes(PassBase):
        def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
            specs = [spec for node in graph_module.graph.nodes for spec in tree_leaves(node.meta.get("spec"))]
            for spec in specs:
                if isinstance(spec, TensorSpec):
                    spec.shape = [largest(size) for size in spec.shape]
                    spec.stride = [largest(size) for size in spec.stride]
            return PassResult(graph_module, True)

    return LargestShapes()


def largest(size: int | torch.SymInt) -> int:
    """The largest value of a size: its bound, or its value where all that it depends on is largest.

    The second is for quotients, whose bound is infinite as soon as the divisor might be 0 for all that is known.
    """
    if isinstance(size, int):
        return size
    ranges = size.node.shape_env.var_to_range
    bound = bound_sympy(size.node.expr, ranges).upper
    if not isinstance(bound, sympy.Integer):
        bound = size.node.expr.subs({symbol: ranges[symbol].upper for symbol in size.node.expr.free_symbols})
    return int(bound)


def as_product(convolution: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The convolution [N, C, T, H, W] -> [N, D, 1, 1, 1] as a product, where its kernel is as large as its input."""

    def convolve(values: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        padding = args[1] if len(args) > 1 else kwargs.get("padding", 0)
        if values.shape[1:] != weight.shape[1:] or padding not in (0, (0, 0, 0), "valid"):
            return convolution(values, weight, bias, *args, **kwargs)
        rows = torch.nn.functional.linear(values.flatten(1), weight.flatten(1), bias)
        return rows[:, :, None, None, None]

    return convolve


def remove_checks(program: ExportedProgram) -> None:
    """Erase the checks in a program, in place, and what only they use."""
    remove_assertions(program.graph_module, [], checks=(*CHECKS, *RANGES)).recompile()


def bounded(component: Component, ranges: dict[str, Range]) -> dict[str, Range]:
    """The ranges, each wider than the sample that the component is traced with: torch.export fixes other sizes."""
    return {name: (low, usual, max(high, component.sizes[name] + 1)) for name, (low, usual, high) in ranges.items()}


def open_session(folder: Path, file: str, part: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Run a program on the CPU.

    Raises:
        InputError: when run, for a size outside of those that the program was written for.
    """
    from executorch.runtime import Runtime

    running = threading.Lock()  # the planned memory of a method is that of one call
    method = Runtime.get().load_program(folder / file).load_method("forward")
    assert method is not None

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        profile.check_sizes(part, inputs)
        with running:
            results = method.execute([inputs[each.name] for each in part.inputs])
        return {each.name: result for each, result in zip(part.outputs, results, strict=True)}

    return run
