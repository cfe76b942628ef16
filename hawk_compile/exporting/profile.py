"""Sizes that a component is built for, where a target asks for them: minimum, usual and maximum of each dimension.

A user knows four of them, and gives those that differ from the defaults:

    batch     rows                                     1, 1, 4
    prompt    length of the longest row                2, 512, 3840
    visual    visual tokens of all rows together       1, 3/4 of the usual rows, the usual rows at their longest
    images    images of all rows together              1, usual batch, largest batch

The others follow from these, and from the proportions of the sample that a component was traced with; see `Sizes`.
Each of them can be given too, by the name that it has in the manifest.
"""

import shlex
from collections.abc import Mapping
from fractions import Fraction
from math import ceil
from typing import Any

from torch import Tensor

from hawk_compile.errors import ConfigError, InputError
from hawk_compile.exporting.components import NAMED, RELATED, Component
from hawk_compile.exporting.manifest import Part

Range = tuple[int, int, int]

LONGEST_SORT = 3840
"""Elements that TensorRT's TopK can take. (It builds an engine for more, and that engine fails.)"""

LEAST = {**NAMED, **dict.fromkeys(sorted(RELATED), 1)}
"""Every size that has a name, with the smallest value that graphs hold for."""


class Sizes:
    """Ranges of a component's sizes by name: as given, else by rule.

    Args:
        component: gives the proportions.
        given: ranges by name, as `checked` returns them.
    """

    def __init__(self, component: Component, given: dict[str, Range]):
        self.given = given
        self.sample = component.sizes
        self.visual = component.visual

    def of(self, name: str) -> Range:
        return self.given[name] if name in self.given else known(self.given).get(name) or self.derived(name)

    def derived(self, name: str) -> Range:
        """A size that was not given. The smallest is rounded down and the others up."""
        prompt, visual, images = self.of("prompt"), self.of("visual"), self.of("images")
        match name:
            case "kept":  # up to all: a request may set ratio 0
                return ordered(name, 0, prompt[1] * self.share("kept", "prompt"), prompt[2])
            case "kept_visual":
                return ordered(name, 0, visual[1] * self.share("kept_visual", "visual"), visual[2])
            case "new":  # a token of every row; at most a prompt without images, which runs without a cache
                return ordered(name, 0, 1, prompt[2])
            case "past":  # a prompt, and as much again that was generated or said
                return ordered(name, 0, prompt[1], 2 * prompt[2])
            case "total":
                past, new = self.of("past"), self.of("new")
                return ordered(name, *(before + now for before, now in zip(past, new, strict=True)))
            case "segments":  # one per image; a video has one per pair of frames
                return images
            case "longest_segment":  # from images of one size to a single image
                patches = self.of("patches")
                return ordered(name, Fraction(patches[0], images[2]), Fraction(patches[1], images[1]), patches[2])
            case "windows":  # images whose sides are no multiples of a window have up to 2.6 times as many
                share = self.per_visual(name)
                return ordered(name, visual[0] * share / 4, visual[1] * share, visual[2] * share * 4)
            case "longest_window":  # of a fixed area; smaller in an image that is smaller than a window
                return ordered(name, 0, self.sample[name], self.sample[name])
            case _:  # patches, merged patches and tiles, of which every visual token takes the same number
                return ordered(name, *(size * self.per_visual(name) for size in visual))

    def share(self, name: str, whole: str) -> Fraction:
        return Fraction(self.sample[name], self.sample[whole])

    def per_visual(self, name: str) -> Fraction:
        return Fraction(self.sample[name], self.visual)


def known(given: dict[str, Range]) -> dict[str, Range]:
    """The four sizes that a user knows, by default what fits the others."""
    batch = given.get("batch", (1, 1, 4))
    prompt = given.get("prompt", (2, 512, LONGEST_SORT))
    defaults = {
        "batch": batch,
        "prompt": prompt,
        "visual": ordered("visual", 0, Fraction(3, 4) * batch[1] * prompt[1], batch[1] * prompt[2]),
        "images": ordered("images", 0, batch[1], batch[2]),
    }
    return {name: given.get(name, size) for name, size in defaults.items()}


def ordered(name: str, low: Fraction | int, usual: Fraction | int, high: Fraction | int) -> Range:
    """Whole numbers, none below the least value of the size, the usual one between the other two."""
    most = max(LEAST[name], ceil(high))
    least = min(most, max(LEAST[name], int(low)))
    return least, min(most, max(least, ceil(usual))), most


def checked(sizes: Any) -> dict[str, Range]:
    """The setting `sizes` as given to `export`.

    Raises:
        ConfigError: no mapping, a name that is no size, or a range that is none.
    """
    if not isinstance(sizes, Mapping):
        raise ConfigError(
            f"sizes must map names of sizes to (minimum, usual, maximum), got {sizes!r}; give for example "
            'sizes={"prompt": (16, 512, 2048)}'
        )
    for name, given in sizes.items():
        if name not in LEAST:
            raise ConfigError(f"sizes names {name!r}; the sizes are {', '.join(LEAST)}")
        rule = f'sizes["{name}"] must be three whole numbers, minimum <= usual <= maximum, from {LEAST[name]} on'
        triple = isinstance(given, (tuple, list)) and len(given) == 3
        whole = triple and all(isinstance(size, int) and not isinstance(size, bool) for size in given)
        if not whole or not LEAST[name] <= given[0] <= given[1] <= given[2]:
            raise ConfigError(f'{rule}, got {given!r}; give for example "{name}": {known({}).get(name, (4, 64, 256))}')
    return {name: (given[0], given[1], given[2]) for name, given in sizes.items()}


def ranges(component: Component, given: dict[str, Range]) -> dict[str, Range]:
    """The range of every symbolic size of a component's inputs.

    Raises:
        ConfigError: a minimum below what the component's graph holds for.
    """
    sizes = Sizes(component, given)
    for name, least in component.least.items():
        if name in given and given[name][0] < least:
            raise ConfigError(
                f'sizes["{name}"] must be from {least} on for {component.name} of this model, got {given[name]}; raise '
                "the minimum"
            )
    found = {name: sizes.of(name) for name in component.sizes}
    return {name: (max(component.least.get(name, 0), size[0]), *size[1:]) for name, size in found.items()}


def shapes(component: Component, ranges: dict[str, Range]) -> dict[str, list[tuple[int, ...]]]:
    """Minimum, usual and maximum shape of every input with a symbolic size."""
    return {
        name: [
            tuple(size if isinstance(size, int) else ranges[size][which] for size in shape) for which in range(3)
        ]
        for name, shape in component.shapes.items()
        if not all(isinstance(size, int) for size in shape)
    }  # fmt: skip


def trtexec(name: str, shapes: dict[str, list[tuple[int, ...]]]) -> str:
    """The command that builds a component by TensorRT's server edition, in the exported folder, on the GPU's machine.

    Types are those of the ONNX file: 10.x needs to be told so, 11 knows no other way and ignores the flag.
    """
    options = [f"--onnx={name}.onnx", "--stronglyTyped"]
    for which, option in enumerate(("minShapes", "optShapes", "maxShapes")):
        each = (f"{given}:{'x'.join(map(str, sizes[which]))}" for given, sizes in shapes.items())
        options.append(f"--{option}={','.join(each)}")
    return shlex.join(["trtexec", *options, f"--saveEngine={name}.engine"])


def check_sizes(part: Part, inputs: dict[str, Tensor]) -> None:
    """Compare inputs with the profile that the engine of a component was built for.

    Raises:
        InputError: a size outside of it.
    """
    profile = part.details["profile"]
    for spec in part.inputs:
        for dim, (name, size) in enumerate(zip(spec.shape, inputs[spec.name].shape, strict=True)):
            if isinstance(name, int):
                continue
            low, usual, high = profile[name]
            if not low <= size <= high:
                needed = (min(low, size), usual, max(high, size))
                raise InputError(
                    f"{spec.name} of {part.name} has size {size} in dimension {dim} ({name}), and {part.name} was "
                    f"built for {low} to {high}: give inputs of that size, or export again with "
                    f'sizes={{"{name}": {needed}}}'
                )
