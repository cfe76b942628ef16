"""What must be equal where graphs are saved and where they are loaded, each thing by a name and a short text.

A package is code for this processor, of this model's code, by these settings and passes. What differs is named.
"""

import hashlib
import json
import platform
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hawk_compile.capture.attention import attention_of_prefill
from hawk_compile.compat.models import BUFFERS, ORIGINS, PARAMETERS
from hawk_compile.compile.pipeline import PLAIN_PASSES, left_out
from hawk_compile.runtime.compiled import CompiledPrefill
from hawk_compile.saved.calls import PLAIN, name_of, name_of_dtype
from hawk_compile.saved.unchanged import OF_CALLS, OURS, modules_of, switches
from hawk_compile.versions import installed

ROOMS = ("capture", "compat", "compile", "kernels", "passes", "plan", "runtime", "saved")
"""Whose sources say what a graph is and how it is called."""
METHODS = (types.FunctionType, staticmethod, classmethod, property)
MOST = 120
"""Characters of a value."""


def key_of(model: PreTrainedModel, prefill: CompiledPrefill) -> dict[str, str]:
    """name -> value, of the software, the machine, the settings and the model; made without gradients."""
    found = {name: installed(name) for name in ("hawk-compile", "torch", "transformers")}
    found["torch's build"] = str(torch.__version__)
    found["python"] = f"{platform.python_implementation()} {'.'.join(platform.python_version_tuple()[:2])}"
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["processor"] = processor()
    found["hawk_compile's sources"] = digest(sources())
    found["torch's switches"] = switches()
    found |= {f"setting {name}": value for name, value in settings_of(prefill)}
    found["passes left out"] = ", ".join(sorted(left_out(PLAIN_PASSES))) or "none"
    found["model"] = name_of(type(model))
    found |= {f"config {name}": value for name, value in config_of(model)}
    attention = attention_of_prefill(model)
    found["attention"] = f"{attention.here} for {attention.elsewhere}"
    for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        found[f"attention by {type(table).__name__}"] = digest(text_of(table.get(attention.here), set()))
    found |= {f"code of {name}": value for name, value in code_of(model)}
    return {name: value if len(value) <= MOST else digest(value) for name, value in found.items()}


def digest(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]


def processor() -> str:
    """What code for this processor may use: it is compiled for all that this one has."""
    flags = ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line.partition(":")[2] for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    return f"{torch.backends.cpu.get_cpu_capability()} {digest(' '.join(sorted(flags.split())))}"


def sources() -> bytes:
    here = Path(__file__).parents[1]
    paths = sorted(path for room in ROOMS for path in (here / room).rglob("*.py"))
    return b"".join(path.relative_to(here).as_posix().encode() + path.read_bytes() for path in paths)


def settings_of(prefill: CompiledPrefill) -> Iterator[tuple[str, str]]:
    yield "backend", prefill.config.backend
    for name, value in vars(prefill.options).items():
        yield name, digest(text_of(value, set())) if callable(value) else repr(value)


def config_of(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """The entries of a model's configuration."""
    for name, value in model.config.to_dict().items():
        if name not in ORIGINS:
            yield name, json.dumps(without_origin(value), sort_keys=True, default=str)


def without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): without_origin(held) for name, held in value.items() if name not in ORIGINS}
    return value


def code_of(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """The classes of the modules in a prefill's graph, and the functions of their files."""
    kinds = dict.fromkeys(each for part in modules_of(model) for each in type(part).__mro__[:-1])
    for kind in kinds:
        yield name_of(kind), digest(text_of(methods_of(kind), set()))
    for file in sorted({type(part).__module__ for part in modules_of(model)}):
        held = {name: value for name, value in vars(sys.modules[file]).items() if isinstance(value, types.FunctionType)}
        yield file, digest(text_of(held, set()))


def methods_of(kind: type) -> dict[str, Any]:
    """The methods of a class; of torch's own, which its release says, those that others replace."""
    methods = {name: value for name, value in vars(kind).items() if isinstance(value, METHODS)}
    if kind.__module__.partition(".")[0] == "torch":
        return {name: value for name, value in methods.items() if name == "forward"}
    return methods


def text_of(value: Any, seen: set[int]) -> str:
    """A text that two processes make alike of the same code, settings or constants."""
    if id(value) in seen:
        return "again"
    if isinstance(value, (dict, list, set, types.FunctionType)):
        seen.add(id(value))
    if isinstance(value, (dict, types.MappingProxyType)):
        parts = {str(name): text_of(held, seen) for name, held in value.items() if not is_private_to_python(name)}
        return str(sorted(parts.items()))
    if isinstance(value, (list, tuple)):
        return f"({', '.join(text_of(held, seen) for held in value)})"
    if isinstance(value, (set, frozenset)):
        return str(sorted(text_of(held, seen) for held in value))
    if isinstance(value, types.CodeType):
        return f"{value.co_code.hex()} {value.co_names} {value.co_varnames} {text_of(value.co_consts, seen)}"
    if isinstance(value, (staticmethod, classmethod)):
        return text_of(value.__func__, seen)
    if isinstance(value, property):
        return text_of((value.fget, value.fset), seen)
    if isinstance(value, types.FunctionType):
        cells = [each.cell_contents for each in value.__closure__ or () if not is_empty(each)]
        return f"{value.__qualname__} {text_of([value.__code__, value.__defaults__, cells], seen)}"
    if type(value) in PLAIN or isinstance(value, torch.dtype):
        return repr(value)
    return name_of(value if isinstance(value, type) else type(value))


def is_private_to_python(name: Any) -> bool:
    return isinstance(name, str) and name.startswith("__") and name not in ("__init__", "__call__", "__getattr__")


def is_empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is None
    except ValueError:
        return True


def modules_key(model: PreTrainedModel) -> dict[str, str]:
    """Dotted path -> what stands in the module there: its class, numbers and switches, hooks, dtypes and shapes of
    weights."""
    inside = {id(part) for part in modules_of(model)}
    return {
        path: digest(text_of_module(part, part is model)) for path, part in model.named_modules() if id(part) in inside
    }


def text_of_module(part: nn.Module, is_model: bool) -> str:
    own = {
        name: text_of_attribute([*value.values()] if "_hooks" in name and isinstance(value, dict) else value)
        for name, value in sorted(vars(part).items())
        if name not in OF_CALLS and name not in OURS and not (is_model and callable(value))
        and name not in (PARAMETERS, BUFFERS) and not (is_model and "_hooks" in name)
    }  # fmt: skip
    weights = {
        name: None if value is None else (name_of(type(value)), name_of_dtype(value.dtype), value.device.type,
                                          tuple(value.shape), value.stride())
        for container in (PARAMETERS, BUFFERS) for name, value in getattr(part, container).items()
    }  # fmt: skip
    return str((name_of(type(part)), own, weights))


def text_of_attribute(value: Any) -> str:
    if isinstance(value, dict):
        return str(sorted((str(name), text_of_attribute(held)) for name, held in value.items()))
    if isinstance(value, (list, tuple)):
        return str([text_of_attribute(held) for held in value])
    if isinstance(value, types.MethodType):
        return text_of(value.__func__, set())
    return text_of(value, set())
