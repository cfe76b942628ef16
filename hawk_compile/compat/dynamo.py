"""Private names of torch.compile, AOTInductor and torch's trees."""

import contextlib
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
from torch._dynamo.backends.registry import lookup_backend as lookup_backend  # the compiler of a backend's name
from torch._dynamo.comptime import comptime
from torch._dynamo.exc import FailOnRecompileLimitHit as FailOnRecompileLimitHit
from torch._dynamo.exc import ShortenTraceback as ShortenTraceback  # what a compiler raised, in `inner_exception`
from torch._dynamo.exc import TorchDynamoException as TorchDynamoException
from torch._dynamo.exc import Unsupported as Unsupported
from torch._dynamo.exc import UserError as UserError
from torch._dynamo.variables.lazy import LazySymNodeFormatString as SizeInText  # what an f-string has of a size
from torch._higher_order_ops.scan import scan as scan  # (step, state, values): a loop along dimension 0, in graphs too
from torch.fx.experimental import _config as fx_config
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves as tree_leaves  # the tensors in nested lists and dicts
from torch.utils._sympy.value_ranges import bound_sympy as bound_sympy  # the least and largest value of an expression

mark_static = torch._dynamo.mark_static
"""mark_static(tensor, dims=all): these sizes are part of every graph that reads it."""

while_traced = comptime
"""while_traced(function): where Dynamo traces this line, it calls function(context) and puts nothing in the graph;
elsewhere the line does nothing. The function has no closure."""


def dynamo_settings(**settings: Any) -> contextlib.AbstractContextManager[Any]:
    """torch.compile's own settings by name, in this thread, inside."""
    return torch._dynamo.config.patch(**settings)


def shape_settings(**settings: Any) -> contextlib.AbstractContextManager[Any]:
    """Settings by name of how sizes become symbols, in this thread, inside."""
    return fx_config.patch(**settings)  # type: ignore[attr-defined]


def tells_all() -> bool:
    """Whether torch.compile is asked to show its own part of tracebacks, by TORCHDYNAMO_VERBOSE or in Python."""
    return torch._dynamo.config.verbose


def handed_on(error: Exception) -> Exception:
    """The error as one that Dynamo hands on as it is. Of another one that a backend raises it makes one of its own.

    It is of the error's class and of Dynamo's, and is shown and pickled as the error itself: what Dynamo adds to its
    text is not shown. For a backend's except clause: of the traceback, what stands above the backend is left out.
    """
    kind, here = type(error), inspect.currentframe()
    shown = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__str__": error.__str__}
    both = type(kind.__name__, (kind, ShortenTraceback), {**shown, "__reduce__": error.__reduce__})
    made = both.__new__(both, *error.args)
    made.first_useful_frame = here and here.f_back
    made.__cause__ = error.__cause__
    return made.with_traceback(error.__traceback__)


WORD = "a symbolic size"
"""What f-strings hold of sizes that are not to be fixed."""


class TextsOfThread(threading.local):
    """Whether f-strings of what a thread captures name their sizes."""

    name_sizes = False


texts = TextsOfThread()


def text_of_size(size: SizeInText) -> str:
    return WORD if texts.name_sizes else number_in_text(size)


number_in_text = SizeInText.__repr__


@contextlib.contextmanager
def sizes_named_in_texts() -> Iterator[None]:
    """F-strings of code that this thread captures inside hold a word for a symbolic size.

    A number would fix the size in the graph, though it is only part of a message that nobody sees. What other threads
    compile is as it was.
    """
    SizeInText.__repr__ = text_of_size  # type: ignore[method-assign]
    try:
        texts.name_sizes = True
        yield
    finally:
        texts.name_sizes = False


def compiles_all() -> bool:
    """Whether torch.compile compiles whatever it meets, by the backend that was asked for: `torch.compiler.set_stance`
    may let some or all of it run uncompiled, or by another backend."""
    stance = torch._dynamo.eval_frame._stance
    return stance.stance in ("default", "fail_on_recompile") and stance.backend is None


def is_transformed() -> bool:
    """Whether this code runs inside a transform of torch.func: vmap, grad, jvp and the like."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_in_ddp() -> bool:
    """Whether this code runs inside the forward of a DistributedDataParallel, for which Dynamo would cut graphs."""
    return DistributedDataParallel._get_active_ddp_module() is not None


def write_package(program: torch.export.ExportedProgram, path: str, settings: dict[str, Any]) -> str:
    """Compile a program by AOTInductor into one .pt2 file."""
    return torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=settings)


def open_package(path: str) -> Any:
    """A .pt2 file as something to call, with `get_constant_fqns` and `load_constants`."""
    return torch._inductor.aoti_load_package(path)


