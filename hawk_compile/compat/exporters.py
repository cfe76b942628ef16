"""Private names of transformers' exporters, and of onnxscript's and ExecuTorch's settings behind them."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

SEGMENTED = "_patch_chunked_vision_attention"
"""Makes what the exporters put in the place of attention within segments."""
VMAP, INDEXING = "_vmap_expansion_sdpa", "TransformGetItemToIndex"
COUNTS = "histc"
SORT_FIX = "_fix_sort_stable"


@contextlib.contextmanager
def traced_portably() -> Iterator[None]:
    """Let masks be built by broadcasting, as the ONNX exporter does: no pass can work out vmap's shapes.

    What turns a mask function's indexing into an operator of its own, for vmap's sake, is left out with it. Tokens of
    experts are counted without histc, as the exporters do, since OpenVINO has none.
    """
    from transformers import masking_utils
    from transformers.exporters import utils

    owners = {VMAP: masking_utils, COUNTS: torch}
    patches = [(owners[name], name, make) for _, name, make in utils._PATCHES["onnx"] if name in owners]
    with utils.patch_attributes([*patches, (masking_utils, INDEXING, lambda original: contextlib.nullcontext)]):
        yield


@contextlib.contextmanager
def own_vision_attention() -> Iterator[None]:
    """Leave towers the attention that they are set to, and their inputs as they are.

    The exporters have an attention for segments of a single length, which a graph outside of PyTorch does not check;
    and they add inputs of their own, by the names of those that there are.
    """
    from transformers.exporters import exporter_dynamo, utils  # noqa: F401  the first fills the second's tables

    precompute()  # while it is the original
    patches = utils._PATCHES["dynamo"]
    # Each is (owner, attribute, factory); the owner is a class, from transformers 5.21 or so on its dotted path.
    utils._PATCHES["dynamo"] = [
        patch for patch in patches
        if "VisionAttention" not in str(patch[0]) and getattr(patch[2], "__name__", "") != SEGMENTED
    ]  # fmt: skip
    added: list[Any] = [(utils, precompute().__name__, lambda original: lambda model, inputs: None)]
    try:
        with utils.patch_attributes(added):
            yield
    finally:
        utils._PATCHES["dynamo"] = patches


@functools.cache
def precompute() -> Callable[[torch.nn.Module, dict[str, Any]], None]:
    """What adds the inputs that towers ask for where nothing may depend on data, to those that there are."""
    from transformers.exporters.utils import precompute_export_inputs

    return precompute_export_inputs


@contextlib.contextmanager
def translated_sort(sort: Callable[..., Any]) -> Iterator[None]:
    """Let torch.onnx translate aten.sort.stable by a function of ours, and not rewrite it before.

    And let it see no complex number that gets another dimension, for which alone it has no translation, and no view of
    nothing, of which it makes a shape that ONNX Runtime refuses.
    """
    from transformers.exporters import exporter_onnx, utils

    fixes, table = utils._FX_NODE_FIXES["onnx"], exporter_onnx._ONNX_TRANSLATION_TABLE
    kept = [fix for fix in fixes if getattr(fix, "__name__", "") != SORT_FIX]
    utils._FX_NODE_FIXES["onnx"] = [*kept, unsqueeze_pairs, make_empty_views]
    exporter_onnx._ONNX_TRANSLATION_TABLE = {**table, torch.ops.aten.sort.stable: sort}
    try:
        yield
    finally:
        utils._FX_NODE_FIXES["onnx"] = fixes
        exporter_onnx._ONNX_TRANSLATION_TABLE = table


def make_empty_views(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """Make a view without elements, as of a part of heads that is 0 wide, anew by its sizes.

    Returns whether the node is gone.
    """
    aten = torch.ops.aten
    if node.target not in (aten.view.default, aten.reshape.default):
        return False
    sizes = cast(list[Any], node.args[1])
    numbers = [size for size in sizes if isinstance(size, int)]
    if 0 not in numbers or -1 in numbers:
        return False
    with graph_module.graph.inserting_before(node):
        made = graph_module.graph.call_function(aten.full.default, (sizes, 0), {"dtype": node.meta["val"].dtype})
    made.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(made)
    graph_module.graph.erase_node(node)
    return True


def unsqueeze_pairs(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """Unsqueeze complex numbers as the pairs of real ones that they are. Returns whether the node is gone."""
    aten = torch.ops.aten
    if node.target is not aten.unsqueeze.default or not node.meta["val"].is_complex():
        return False
    numbers, dim = cast(tuple[torch.fx.Node, int], node.args)
    value = numbers.meta["val"]
    with graph_module.graph.inserting_before(node):
        for operator, more in (
            (aten.view_as_real.default, ()), (aten.unsqueeze.default, (dim % (value.ndim + 1),)),
            (aten.view_as_complex.default, ()),
        ):  # fmt: skip
            numbers = graph_module.graph.call_function(operator, (numbers, *more))
            value = numbers.meta["val"] = operator(value, *more)
    node.replace_all_uses_with(numbers)
    graph_module.graph.erase_node(node)
    return True


@contextlib.contextmanager
def executorch_lowered(
    prepare: Callable[[Any, Any, Callable[..., Any]], Any], exceptions: list[Any], backend_config: Any,
    fix: Callable[[Any], None], attributes: list[tuple[Any, str, Any]],
) -> Iterator[None]:  # fmt: skip
    """Let the ExecuTorch exporter lower as we say.

    Args:
        prepare: (module, sample, the exporter's own preparation for XNNPACK) -> (module, sample, partitioners).
        exceptions: operators that its verifier lets through.
        backend_config: an `ExecutorchBackendConfig`.
        fix: what is done to a program, in place, before the exporter's own fixes.
        attributes: more (object, attribute, factory) to be replaced.
    """
    from transformers.exporters import exporter_executorch, utils

    def preparations(original: dict[str, Any]) -> dict[str, Any]:
        return {**original, "xnnpack": lambda module, sample: prepare(module, sample, original["xnnpack"])}

    def edge_config(original: Callable[[str], Any]) -> Callable[[str], Any]:
        def with_exceptions(backend: str) -> Any:
            config = original(backend)
            config._core_aten_ops_exception_list += exceptions
            return config

        return with_exceptions

    def fixes(original: dict[str, Any]) -> dict[str, Any]:
        return {**original, "executorch": [fix, *original["executorch"]]}

    patches = [
        (exporter_executorch, "_BACKEND_PREPARE", preparations),
        (exporter_executorch, "_get_edge_compile_config", edge_config),
        (exporter_executorch, "_get_backend_config", lambda original: lambda config: backend_config),
        (utils, "_FX_PROGRAM_FIXES", fixes),
    ]
    with utils.patch_attributes([*attributes, *patches]):
        yield
