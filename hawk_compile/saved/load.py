"""`load_compiled`: graphs that were saved, in the place of those that would be compiled."""

import os
from pathlib import Path
from typing import Any

import torch

from hawk_compile.capture.dynamo import capture_lock
from hawk_compile.compat.dynamo import open_flat
from hawk_compile.errors import ManifestError
from hawk_compile.files import path_of, shown
from hawk_compile.runtime.originals import original
from hawk_compile.saved import manifest as manifests
from hawk_compile.saved.calls import builder
from hawk_compile.saved.key import key_of, modules_key
from hawk_compile.saved.manifest import REMEDY, Manifest, Part
from hawk_compile.saved.model import optimised
from hawk_compile.saved.served import SavedPrefill, Served, place_of_weight

MOST_RUNNERS = 8
"""Calls of one graph that run side by side; more wait. Each has its own memory."""


def load_compiled(model: Any, folder: str | os.PathLike[str]) -> int:
    """Let an optimised model answer by the graphs of a folder, instead of compiling its prefill.

    A folder is as trusted as a program: it holds compiled code, which is loaded into this process and run. Load what
    you have saved yourself; nothing is ever looked for beside a checkpoint.

    What its graphs do not serve is compiled as ever: other kinds of calls, decode steps and encoders that are to be
    compiled, and all of it while the model is not what it was when this was called (a hook, an adapter, `train()`,
    another dtype, a module or a function of its code that was replaced). Weights are read at each call: what is loaded,
    merged or trained into them is seen. New settings (`optimize`) that change the graph, and `restore`, let the graphs
    go.

    Args:
        model: an optimised model on a CPU, or what holds one.
        folder: what `save_compiled` wrote.

    Returns:
        How many graphs were loaded.

    Raises:
        ManifestError: no such folder, or one that is not whole; or software, processor, settings, configuration, code
            or modules are others than where it was saved: the message names the first that is.
        InputError: a model that is not optimised.
    """
    place = path_of(folder, "folder")
    inner, runtime = optimised(model, "load_compiled")
    manifest = manifests.read(place)
    with torch.no_grad(), capture_lock:
        refuse_others(manifest, key_of(inner, runtime.prefill), modules_key(inner), place)
        graphs = [opened(inner, place, part) for part in manifest.parts.values()]
        runtime.prefill.saved = SavedPrefill(inner, original(inner, "forward"), graphs)
        runtime.prefill.scoring_layer = next(part.layer for part in manifest.parts.values())
    return len(graphs)


def refuse_others(manifest: Manifest, key: dict[str, str], modules: dict[str, str], folder: Path) -> None:
    """Refuse graphs of another state of software, machine or model.

    Raises:
        ManifestError: names what differs, and both values.
    """
    there = manifest.key | {f"module {path}": value for path, value in manifest.modules.items()}
    here = key | {f"module {path}": value for path, value in modules.items()}
    for name in (*here, *there):
        if here.get(name) != there.get(name):
            raise ManifestError(
                f"the graphs in {shown(folder)} were saved where {shown(name, 120)} was "
                f"{shown(there.get(name, 'not there'), 120)}, and here it is {here.get(name, 'not there')}: make it "
                f"equal, or {REMEDY}"
            )


def opened(model: Any, folder: Path, part: Part) -> Served:
    try:
        inputs = [source if isinstance(source, int) else place_of_weight(model, source) for source in part.inputs]
        run = open_flat(os.path.realpath(folder / part.file), min(os.cpu_count() or 1, MOST_RUNNERS))
        return Served(
            run=run,
            inputs=inputs,
            call=part.call,
            shapes=part.shapes,
            symbols={name: (place[0], place[1]) for name, place in part.symbols.items()},
            ranges={name: (bounds[0], bounds[1]) for name, bounds in part.ranges.items()},
            conditions=part.conditions,
            build=builder(part.recipe),
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise ManifestError(
            f"{part.file} of {shown(folder)} cannot be opened ({type(error).__name__}: {shown(str(error), 300)}): "
            f"{REMEDY}"
        ) from error
