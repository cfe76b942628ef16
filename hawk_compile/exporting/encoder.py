"""The vision encoder as components: the modules that a model's `get_image_features` runs, and nothing of its Python.

Each direct child of the model's body that is called there (a tower, a projector) is exported by itself; what lies
between them (splitting by images, packing of tiles) runs on the host, by the model's own code, see `runner.py`.

Wrapped, because transformers' exporters or their targets need it:

- Towers over a packed row of patches (`grid_thw`) get their indices precomputed, as the exporters do. The exporters'
  attention then needs images of one size and gives wrong results for others. Here attention is handed the segments as
  an index [segments, longest], made on the host, so that images of any sizes share a graph. It is registered as an
  attention implementation; its name holds "flash", which makes models pass the segments on instead of splitting them.
- A tower undoes its window order by sorting the index that made it; a target's sort may be limited in length. The index
  is a permutation, so a scatter gives the same.
- Outputs that nobody reads (hidden states of all layers) are left out; which are read is found by autograd.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface
from transformers.utils import ModelOutput

from hawk_compile import capture
from hawk_compile.errors import UnsupportedModelError
from hawk_compile.exporting.components import Component, Shape
from hawk_compile.query import is_any

ATTENTION = "hawk_flash_segments"
GRID = "grid_thw"
IMAGE_SIZES = "image_sizes"
WINDOW_INDEX = "window_index"
SIZES: dict[str, Shape] = {
    "segments": ("segments", "longest_segment"),
    "segment_places": ("patches",),
    "windows": ("windows", "longest_window"),
    "window_places": ("patches",),
    WINDOW_INDEX: ("merged_patches",),
}
TOLERANCE = 0.02
"""Of the largest output, between attention by segments and by the tower's own: half precision over a tower's layers."""
STANDARD_OUTPUTS = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")
"""Fields that every encoder's output has, so that a model can set them."""
ARGUMENTS = {
    "segments": "cu_seqlens", "segment_places": "max_seqlen",
    "windows": "cu_window_seqlens", "window_places": "max_window_seqlen",
}  # fmt: skip
"""Under which arguments a tower hands these inputs on to its attention."""


class Encoder(nn.Module):
    """One child of the model's body, with its tensors as inputs and the outputs that are read by name.

    Args:
        fixed: arguments that are no tensors.
        outputs: names of outputs, as `named` gives them; None for all.
    """

    def __init__(self, child: nn.Module, fixed: dict[str, Any], outputs: list[str] | None):
        super().__init__()
        self.child, self.fixed, self.outputs = child, fixed, outputs

    def forward(self, **tensors: Tensor) -> dict[str, Tensor]:
        renamed = {ARGUMENTS.get(name, name): given for name, given in tensors.items()}
        with sorted_by_scatter(tensors.get(WINDOW_INDEX)):
            found = named(self.child(**self.fixed, **renamed))
        return {name: found[name] for name in self.outputs or found}


@contextlib.contextmanager
def sorted_by_scatter(permutation: Tensor | None) -> Iterator[None]:
    """Let `torch.argsort` of this very tensor [n] int64, a permutation of 0 ... n-1, be its inverse by a scatter."""
    argsort = torch.argsort

    def inverse(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if values is not permutation or args or kwargs:
            return argsort(values, *args, **kwargs)
        places = torch.arange(values.shape[0], device=values.device)
        return torch.zeros_like(values).scatter(0, values, places)

    torch.argsort = inverse  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.argsort = argsort


def named(output: Any) -> dict[str, Tensor]:
    """The tensors of an output by name: `features` of a tensor, `name` of a field, `name.i.n` of a field of n."""
    if isinstance(output, Tensor):
        return {"features": output}
    found: dict[str, Tensor] = {}
    for name, value in output.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, (tuple, list)):
            parts = [(f"{name}.{index}.{len(value)}", each) for index, each in enumerate(value)]
            found |= {part: each for part, each in parts if isinstance(each, Tensor)}
    return found


def unnamed(tensors: dict[str, Tensor]) -> Any:
    """The output that `named` took apart; parts of a tuple that were left out are None."""
    if list(tensors) == ["features"]:
        return tensors["features"]
    fields: dict[str, Any] = {}
    for name, value in tensors.items():
        whole, *place = name.split(".")
        if place:
            index, count = map(int, place)
            fields.setdefault(whole, [None] * count)[index] = value
        else:
            fields[whole] = value
    return output_class(tuple(dict.fromkeys((*STANDARD_OUTPUTS, *fields))))(**fields)


@functools.cache
def output_class(names: tuple[str, ...]) -> type[ModelOutput]:
    fields = [(name, Any, dataclasses.field(default=None)) for name in names]
    return dataclasses.make_dataclass("EncoderOutput", fields, bases=(ModelOutput,))


def attention_over_segments(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float | None = None, dropout: float = 0.0, cu_seq_lens_q: Any = None, max_length_q: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention [1, H, N, d] within segments.

    `cu_seq_lens_q` holds the patches of each segment [segments, longest], -1 behind its last; `max_length_q` holds the
    place of each patch in that layout [N].
    """
    segments, longest = cu_seq_lens_q.shape
    real = cu_seq_lens_q >= 0
    places = cu_seq_lens_q.clamp_min(0).flatten()

    def batched(values: Tensor) -> Tensor:
        heads, width = values.shape[1], values.shape[3]
        return values[0].index_select(1, places).reshape(heads, segments, longest, width).transpose(0, 1)

    mixed = torch.nn.functional.scaled_dot_product_attention(
        batched(query), batched(key), batched(value), attn_mask=real[:, None, None, :], scale=scaling
    )
    heads, patches, width = query.shape[1:]
    rows = mixed.transpose(1, 2).reshape(segments * longest, heads * width)
    return rows.index_select(0, max_length_q).reshape(1, patches, heads, width), None


@contextlib.contextmanager
def segmented(child: nn.Module) -> Iterator[None]:
    """Let a tower over packed patches attend by segments, while it is traced."""
    from transformers.exporters import exporter_dynamo, utils  # noqa: F401  the first fills the second's tables

    AttentionInterface.register(ATTENTION, attention_over_segments)
    configs: list[Any] = list(
        {id(part.config): part.config for part in child.modules() if hasattr(part, "config")}.values()
    )
    before = [config._attn_implementation for config in configs]
    patches = utils._PATCHES["dynamo"]
    utils._PATCHES["dynamo"] = [patch for patch in patches if "VisionAttention" not in patch[0]]
    try:
        for config in configs:
            config._attn_implementation = ATTENTION
        with torch.no_grad():
            yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
        utils._PATCHES["dynamo"] = patches


def prepared(child: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of an encoder component for the tensors that its module would get: grids become indices."""
    if GRID not in tensors:
        return tensors
    from transformers.exporters.utils import precompute_export_inputs

    given = dict(tensors)
    precompute_export_inputs(child, given)
    del given[GRID]
    for name, places in (("segments", "segment_places"), ("windows", "window_places")):
        bounds = given.pop(ARGUMENTS[name], None)
        given.pop(ARGUMENTS[places], None)  # the length of the longest, which the index holds
        if bounds is not None:
            given[name] = patches_of(bounds)
            given[places] = torch.nonzero(given[name].flatten() >= 0).squeeze(1)
    return {name: value for name, value in given.items() if isinstance(value, Tensor)}


def patches_of(bounds: Tensor) -> Tensor:
    """[segments, longest] int64 from cumulative lengths [segments + 1]; -1 behind a segment's last patch."""
    starts, lengths = bounds[:-1].long(), (bounds[1:] - bounds[:-1]).long()
    step = torch.arange(int(lengths.max()), device=bounds.device)
    return torch.where(step < lengths[:, None], starts[:, None] + step, -1)


def encoder_components(model: PreTrainedModel, inputs: dict[str, Any]) -> list[Component]:
    """The components of the encoder that encodes these inputs, each named like the module of the model's body.

    Raises:
        UnsupportedModelError: an encoder whose module is called more than once, takes no tensor, or reads the sizes
            of images in a way that cannot be exported.
    """
    calls = recorded_calls(model, inputs)
    components = []
    placeholders = capture.placeholder_ids(model)
    visual = 2 * int(is_any(inputs["input_ids"], tuple(placeholders)).sum())  # the sample is the inputs twice
    for name, (arguments, outputs) in calls.items():
        child = model.base_model.get_submodule(name)
        tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
        if not tensors or IMAGE_SIZES in tensors:
            reason = f"takes {IMAGE_SIZES}, which would be fixed in its graph" if tensors else "takes no tensor"
            raise UnsupportedModelError(f"{type(model).__name__} cannot be exported: its encoder's {name} {reason}")
        fixed = {key: value for key, value in arguments.items() if not isinstance(value, Tensor)}
        sample = prepared(child, {key: torch.cat([value, value]).detach() for key, value in tensors.items()})
        packed = GRID in tensors
        rows = next(iter(sample.values())).shape[0]
        shapes: dict[str, Shape] = {
            key: SIZES.get(key) or (("patches" if packed else "tiles"), *value.shape[1:])
            if key in SIZES or value.shape[0] == rows else tuple(value.shape)
            for key, value in sample.items()
        }  # fmt: skip
        if packed:
            fixed[GRID] = None
        around = (lambda child=child: segmented(child)) if packed else torch.no_grad
        encoder = Encoder(child, fixed, list(outputs))
        component = Component(name, encoder, sample, shapes, around, visual=visual)
        if packed:
            check_segments(component, outputs, type(model).__name__)
        components.append(component)
    return components


def check_segments(component: Component, expected: dict[str, Tensor], model: str) -> None:
    """Refuse a tower that gives something else by segments than by the grid, which it then reads elsewhere too.

    Args:
        expected: its outputs for the first half of the component's sample.
    """
    reason = "its outputs differ by {:.2g}"
    try:
        furthest = max(
            float((component.results[name][: len(rows)] - rows).abs().max()) for name, rows in expected.items()
        )
        if furthest <= TOLERANCE * max(float(rows.abs().max()) for rows in expected.values()):
            return
        reason = reason.format(furthest)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = str(error)
    raise UnsupportedModelError(
        f"{model} cannot be exported: its encoder's {component.name} reads the sizes of images elsewhere than in its "
        f"attention and positions, which an index of patches cannot give it ({reason})"
    )


def recorded_calls(
    model: PreTrainedModel, inputs: dict[str, Any]
) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Of each module of the body that encodes: its arguments by name, and those of its outputs that are read."""
    calls: dict[str, dict[str, Any]] = {}
    results: dict[str, dict[str, Tensor]] = {}

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if name in calls:
            raise UnsupportedModelError(
                f"{type(model).__name__} runs {name} more than once to encode its images, which cannot be exported as "
                "one component: give inputs with images only"
            )
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        calls[name] = flat(bound)

    def after(name: str, output: Any) -> None:
        results[name] = named(output)
        for value in results[name].values():
            if value.is_floating_point() and not value.requires_grad:
                value.requires_grad_()

    handles = []
    for name, child in model.base_model.named_children():
        handles.append(
            child.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: before(name, module, args, kwargs), with_kwargs=True
            )
        )
        handles.append(child.register_forward_hook(lambda module, args, output, name=name: after(name, output)))
    try:
        with torch.enable_grad():
            encoded = model._prepare_multimodal_encoder_kwargs_for_generation(dict(inputs))["mm_encoder_outputs"]  # type: ignore[operator]
            total = sum(part.sum() for output in encoded.values() if output is not None for part in parts_of(output))
            tensors = [value for result in results.values() for value in result.values()]
            gradients = torch.autograd.grad(total, tensors, allow_unused=True)  # type: ignore[arg-type]
    finally:
        for handle in handles:
            handle.remove()
    read = {id(value) for value, gradient in zip(tensors, gradients, strict=True) if gradient is not None}
    return {
        name: (given, {key: value.detach() for key, value in results[name].items() if id(value) in read})
        for name, given in calls.items()
    }


def flat(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Arguments by name, those under ** among them."""
    rest = next((each.name for each in bound.signature.parameters.values() if each.kind is each.VAR_KEYWORD), None)
    named_arguments = dict(bound.arguments)
    more = named_arguments.pop(rest, {}) if rest else {}
    return {**named_arguments, **more}


def parts_of(output: ModelOutput) -> list[Tensor]:
    held = [output[capture.FEATURES], *(output.get(capture.LAYER_FEATURES) or [])]
    return [part for parts in held for part in ([parts] if isinstance(parts, Tensor) else parts)]
