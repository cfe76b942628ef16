"""The vision encoder as components: the modules that a model's `get_image_features` runs, and nothing of its Python.

Each direct child of the model's body that is called there (a tower, a projector) is exported by itself; what lies
between them (splitting by images, packing of tiles) runs on the host, by the model's own code, see `runner.py`.

A module that lays out rows by the sizes of images, and runs others on rows alone, is itself run on the host, and those
in it are exported. Outputs that nobody reads are left out; which are read is found by autograd, see `recording.py`.
"""

import re
from collections.abc import Set
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hawk_compile.capture import segments
from hawk_compile.capture.modalities import modalities_of, visual_places
from hawk_compile.errors import UnsupportedModelError
from hawk_compile.exporting.components import Component
from hawk_compile.exporting.modules import component_of_tiles, component_with_sizes, packed_component
from hawk_compile.exporting.recording import REMEDY, recorded_calls

IMAGE_SIZES = re.compile("(grid|shape|size)s?(_|$)")
"""In the name of whole numbers that say how large images are, by which a module lays out their patches."""


def encoder_components(
    model: PreTrainedModel, inputs: dict[str, Any], opened: Set[str] = frozenset()
) -> list[Component]:  # fmt: skip
    """The components of the encoder that encodes these inputs, each named like the module of the model's body.

    Args:
        opened: modules in the place of which those in them are components.

    Raises:
        UnsupportedModelError: an encoder whose module is called more than once, takes no tensor, or reads the sizes
            of images in a way that cannot be exported.
    """
    calls = recorded_calls(model, inputs, opened)
    components = []
    places = visual_places(model, inputs["input_ids"], modalities_of(model, inputs))
    visual = 2 * int(places.sum())  # the sample is the inputs twice
    for name, call in calls.items():
        child, owner = model.base_model.get_submodule(name), type(model).__name__
        taken = [key for key, value in call[0].items() if isinstance(value, Tensor)]
        sizes = [key for key in taken if key != segments.GRID and are_sizes(key, call[0][key])]
        packed = segments.GRID in taken and not sizes
        component = packed_component(name, child, call, visual) if packed else None
        if (sizes or (packed and component is None)) and is_made_of_rows(model, inputs, {*opened, name}, name):
            return encoder_components(model, inputs, {*opened, name})
        if not taken or sizes:
            reason = f"takes {sizes[0]}, which would be fixed in its graph" if sizes else "takes no tensor"
            raise UnsupportedModelError(f"{owner} cannot be exported: its encoder's {name} {reason}; {REMEDY}")
        if packed:
            component = component or component_with_sizes(name, child, call, visual, owner)
        else:
            component = component_of_tiles(name, child, call, visual, owner)
        components.append(component)
    return components


def is_made_of_rows(model: PreTrainedModel, inputs: dict[str, Any], opened: Set[str], name: str) -> bool:
    """Whether the modules in one take rows [n, D] and nothing else.

    Any number of them is then the same to each, and how rows belong to images is the business of what runs them.
    """
    try:
        calls = recorded_calls(model, inputs, opened)
    except UnsupportedModelError:
        return False
    taken = [value for each, (given, _) in calls.items() if each.startswith(f"{name}.") for value in given.values()]
    return bool(taken) and all(isinstance(value, Tensor) and is_rows(value) for value in taken)


def is_rows(value: Tensor) -> bool:
    return value.ndim == 2 and value.is_floating_point()


def are_sizes(name: str, value: Tensor) -> bool:
    """Whether an encoder's argument says how large images are."""
    return not value.is_floating_point() and IMAGE_SIZES.search(name) is not None
