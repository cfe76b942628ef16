"""What is exported of a model: modules with tensors in and tensors out, and how they are traced.

    encoder   the modules that `get_image_features` runs, see `encoder.py`
    prefill   input_ids and question_mask [B, S], features [V, D], budget [B]
              -> logits [B, vocabulary], keys and values [B, Hkv, S', d]
    decode    input_ids [B, T], past keys and values [B, Hkv, P, d] -> logits, keys and values [B, Hkv, P + T, d]

What models keep beside keys and values is handed on with them, see `caches.py`.
"""

import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from hawk_compile.capture.attention import capturing
from hawk_compile.capture.diagnosis import capture_error, diagnosed, shown, user_stack
from hawk_compile.capture.mixers import mixers_stood_for
from hawk_compile.capture.patches import exporting, overridden
from hawk_compile.compat.exporters import traced_portably
from hawk_compile.errors import CaptureError, HawkError
from hawk_compile.exporting.quiet import quiet

PREFILL, DECODE = "prefill", "decode"

NAMED = {"batch": 1, "prompt": 2, "visual": 1, "kept": 2, "kept_visual": 1, "new": 1, "past": 0}
"""Sizes that are equal wherever they have the same name, with the least value of each."""

MOST = 2**31 - 1
"""No size is larger."""

RELATED = {
    "total", "patches", "merged_patches", "tiles", "images", "segments", "longest_segment", "windows", "longest_window",
}  # fmt: skip
"""Sizes that may depend on one another (patches on merged patches); torch.export finds out how."""

REMEDY = "prune the model with hawk_compile.optimize, which may compile what torch.export cannot"
"""What to do about a component that cannot be traced."""

FIXED = re.compile(r"static shape of (\d+) for dimension inputs\['(\w+)'\]\.shape\[(\d+)\]")
"""In what torch.export says of a size that was to be symbolic: its value, the input, the dimension."""

TROUBLE = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)
"""What a model's code raises where it meets a symbolic size and cannot go on."""

Shape = tuple[str | int, ...]


@dataclass
class Component:
    """One part of a model, ready to be exported.

    Attributes:
        name: 'prefill', 'decode', or that of an encoder.
        module: takes `sample` as keyword arguments and returns a dict of tensors.
        sample: inputs to trace it with: no two symbolic sizes are equal by need, none is 0 or 1.
        shapes: of each input: numbers, and names from `NAMED` or `RELATED` where it is symbolic.
        around: a context that tracing the module needs.
        least: the least values of sizes, where they are not those in `NAMED`.
        most: the largest values of sizes, for targets that need them; no limit where a size is not named.
        visual: visual tokens that an encoder's sample makes; 0 for other components.
    """

    name: str
    module: nn.Module
    sample: dict[str, Tensor]
    shapes: dict[str, Shape]
    around: Callable[[], Any] = field(default=torch.no_grad)
    least: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    visual: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """The symbolic sizes by name, as they are in the sample."""
        return {
            size: self.sample[name].shape[dim]
            for name, shape in self.shapes.items()
            for dim, size in enumerate(shape)
            if isinstance(size, str)
        }

    @property
    def least_sizes(self) -> dict[str, int]:
        """The smallest values of the symbolic sizes that have a name of their own."""
        return {name: self.least.get(name, NAMED[name]) for name in self.sizes if name in NAMED}

    @property
    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        sizes: dict[str, Any] = {
            name: Dim(name, min=least, max=self.most.get(name, MOST)) for name, least in self.least_sizes.items()
        }
        sizes |= {name: Dim.DYNAMIC(max=self.most[name]) if name in self.most else Dim.DYNAMIC for name in RELATED}
        return {
            name: {dim: sizes.get(size, Dim.DYNAMIC) for dim, size in enumerate(shape) if isinstance(size, str)}
            for name, shape in self.shapes.items()
        }

    @functools.cached_property
    def results(self) -> dict[str, Tensor]:
        """The module's outputs for the sample."""
        with torch.no_grad(), self.around():
            return self.module(**self.sample)

    def trace(self) -> ExportedProgram:
        """The module as an ExportedProgram, by transformers' exporter and its patches."""
        from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

        with quiet(), traced_portably():
            return self.program(DynamoExporter, DynamoConfig)

    def program(self, exporter: Any, config: Any, **settings: Any) -> Any:
        """The module as one of transformers' exporters writes it, every named size symbolic.

        Args:
            exporter, config: the exporter's class and that of its settings.
            **settings: more of its settings.

        Raises:
            CaptureError: torch.export cannot trace it, or not for all sizes.
        """
        made = config(
            dynamic=True, dynamic_shapes=self.dynamic_shapes, prefer_deferred_runtime_asserts_over_guards=True,
            **settings,
        )  # fmt: skip
        what = f"the component {self.name}"
        try:
            # torch.export prints the graph that it has so far, where it fails.
            with self.around(), exporting(), diagnosed(self.module, what, REMEDY), redirect_stderr(io.StringIO()):
                return exporter().export_program(self.module, dict(self.sample), made)[0]
        except HawkError:
            raise
        except TROUBLE as error:
            if fixed := self.fixed_size(str(error)):
                raise CaptureError(
                    f"{what} cannot be captured for other sizes than those of the inputs: its code fixes {fixed}, as a "
                    f"loop in Python over them does; {REMEDY}"
                ) from shown(error)
            if user_stack(error):  # raised by a line of the model; what writes the graph has none left
                raise capture_error(error, self.module, what, REMEDY) from shown(error)
            raise

    def fixed_size(self, message: str) -> str:
        """Which symbolic size torch.export found to be a number, by its message; empty if it says none."""
        names = {(name, str(dim)): size for name, shape in self.shapes.items() for dim, size in enumerate(shape)}
        fixed = [(names.get((name, dim)), number, name) for number, name, dim in FIXED.findall(message)]
        return ", ".join(f"the size {size} of {name} to {number}" for size, number, name in fixed)


@contextlib.contextmanager
def attending(model: PreTrainedModel) -> Iterator[None]:
    """What tracing the decoder needs: no gradients, an attention that can be exported, and mixers without a loop."""
    use = Use()
    mixers_stood_for.begin(use, model)
    try:
        with torch.no_grad(), overridden(model), capturing(model):
            yield
    finally:
        mixers_stood_for.end(use)


class Use:
    """Of `mixers_stood_for`, while something is traced."""
