"""Private names of torch.compile, AOTInductor and torch's trees."""

import contextlib
import inspect
import linecache
import re
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
from torch._C._aoti import AOTIModelPackageLoader
from torch._dynamo.backends.registry import lookup_backend as lookup_backend  # the compiler of a backend's name
from torch._dynamo.comptime import comptime
from torch._dynamo.eval_frame import _debug_get_cache_entry_list as cache_entries  # (code) -> graphs with their guards
from torch._dynamo.eval_frame import cached_backends, innermost_backend, reset_code
from torch._dynamo.exc import BackendCompilerFailed as BackendCompilerFailed
from torch._dynamo.exc import FailOnRecompileLimitHit as FailOnRecompileLimitHit
from torch._dynamo.exc import ShortenTraceback as ShortenTraceback  # what a compiler raised, in `inner_exception`
from torch._dynamo.exc import TorchDynamoException as TorchDynamoException
from torch._dynamo.exc import Unsupported as Unsupported
from torch._dynamo.exc import UserError as UserError
from torch._dynamo.guards import CheckFunctionManager, DeletedGuardManagerWrapper
from torch._dynamo.utils import get_metrics_context
from torch._dynamo.variables.lazy import LazySymNodeFormatString as SizeInText  # what an f-string has of a size
from torch._guards import TracingContext
from torch._higher_order_ops.scan import scan as scan  # (step, state, values): a loop along dimension 0, in graphs too
from torch.fx import graph_module
from torch.fx.experimental import _config as fx_config
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves as tree_leaves  # the tensors in nested lists and dicts
from torch.utils._sympy.value_ranges import bound_sympy as bound_sympy  # the least and largest value of an expression

from hawk_compile.compat.guards import GUARD_FILTER

mark_static = torch._dynamo.mark_static
"""mark_static(tensor, dims=all): these sizes are part of every graph that reads it."""

while_traced = comptime
"""while_traced(function): where Dynamo traces this line, it calls function(context) and puts nothing in the graph;
elsewhere the line does nothing. The function has no closure."""


def compile_and_forget(function: Callable[..., Any], taken: bool = False, **settings: Any) -> Callable[..., Any]:
    """torch.compile of a function or method whose code is that of no other; what is kept of it goes with the result.

    Dynamo holds every backend that it was ever given, to reset those that can be.

    Args:
        taken: whether the backend takes its graph to where the symbols of its sizes are read later on.
    """
    symbols: list[weakref.ref[ShapeEnv]] = []
    handed_on = settings.get("mode") is not None or {*(settings.get("options") or ())} - {GUARD_FILTER}
    if not taken and not handed_on:
        backend = settings["backend"]
        compiler = lookup_backend(backend) if isinstance(backend, str) else backend
        settings = {**settings, "backend": noting_symbols(compiler, symbols)}
    compiled = torch.compile(function, **settings)
    if compiled is not function and hasattr(function, "__code__"):  # switched off, it is the function itself
        callback = inspect.getclosurevars(compiled).nonlocals["callback"]
        cached_backends.pop(id(innermost_backend(callback)), None)
        code: types.CodeType = function.__code__  # type: ignore[attr-defined]
        weakref.finalize(compiled, forget, code, symbols, callback).atexit = False
    return compiled  # type: ignore[no-any-return]


def noting_symbols(compiler: Callable[..., Any], symbols: "list[weakref.ref[ShapeEnv]]") -> Callable[..., Any]:
    """A backend that notes what knows the symbols of its graphs' sizes."""

    def compile_graph(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        context = TracingContext.try_get()
        if context is not None and context.fake_mode is not None and context.fake_mode.shape_env is not None:
            symbols.append(weakref.ref(context.fake_mode.shape_env))
        return compiler(gm, example_inputs)

    return compile_graph


def forget(code: types.CodeType, symbols: "list[weakref.ref[ShapeEnv]]", callback: Any) -> None:
    """Let go the graphs and guards of a code that nobody runs any more.

    They lie in a place at the code which no garbage collector sees, and from which the code itself is held. What made
    the guards waits for the end of every object that they know by identity, classes and modules of Python among them:
    it is told not to, as is that of guards which have become void. What knows the symbols of sizes is held by the sizes
    of tensors that it holds, which no garbage collector sees either: it is emptied. So is what Dynamo calls for each
    frame, which it loses count of when a trace is ended by an exception.

    What torch keeps of every compilation for as long as the process runs goes too: 45 KB of a tiny model, for errors of
    its measurements, and axioms of symbols in a cache without a bound.
    """
    gone = [entry.guard_manager for entry in cache_entries(code)]
    reset_code(code)
    for finalizer in [*weakref.finalize._registry]:  # type: ignore[attr-defined]
        waiting = (finalizer.peek() or (None, None))[1]
        maker = getattr(getattr(waiting, "func", None), "__self__", None)
        if isinstance(maker, CheckFunctionManager):
            guards = getattr(maker, "guard_manager", None)
            if isinstance(guards, DeletedGuardManagerWrapper) or any(guards is each for each in gone):
                finalizer.detach()
    for reference in symbols:
        if (known := reference()) is not None:
            vars(known).clear()
    vars(callback).clear()
    get_metrics_context()._edits.clear()
    ShapeEnv.get_implications.cache_clear()


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
"""What sentences hold of sizes that are not to be fixed."""
PUTS_TEXT_TOGETHER = "BUILD_STRING"
"""The method, of what Dynamo traces a function by, that puts an f-string together; `inst` is its instruction."""
IN_BRACES = re.compile(r"\{[^{}]*\}")


class TextsOfThread(threading.local):
    """Whether f-strings of what a thread captures name their sizes, and source texts go with the code made of them."""

    name_sizes = False
    go_with_code = False


texts = TextsOfThread()


def text_of_size(size: SizeInText) -> str:
    return WORD if texts.name_sizes and is_in_a_sentence() else number_in_text(size)


number_in_text = SizeInText.__repr__


def is_in_a_sentence() -> bool:
    """Whether the f-string that is being put together has blanks. One without any is a name or a key, by which code may
    choose what it does."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != PUTS_TEXT_TOGETHER:
        frame = frame.f_back
    if frame is None:
        return False
    place, file = frame.f_locals["inst"].positions, frame.f_locals["self"].f_code.co_filename
    lines = [*linecache.getlines(file)[place.lineno - 1 : place.end_lineno]]
    if not lines:
        return True
    lines[-1] = lines[-1][: place.end_col_offset]
    lines[0] = lines[0][place.col_offset :]
    return any(" " in IN_BRACES.sub("", line.strip()) for line in lines)


@contextlib.contextmanager
def sizes_named_in_texts() -> Iterator[None]:
    """Sentences in f-strings of code that this thread captures inside hold a word for a symbolic size.

    A number would fix the size in the graph, though it is only part of a message that nobody sees. What other threads
    compile is as it was.
    """
    SizeInText.__repr__ = text_of_size  # type: ignore[method-assign]
    try:
        texts.name_sizes = True
        yield
    finally:
        texts.name_sizes = False


TEXT_OF_ONE = "<eval_with_key>"
"""How the name of a generated file begins that is the text of one code alone; equal graphs may share others."""
source_texts: dict[str, str] = graph_module._loader.eval_cache
write_method = graph_module._method_from_src


def write_method_and_forget(*args: Any, **kwargs: Any) -> Any:
    function = write_method(*args, **kwargs)
    code = function.__code__
    if texts.go_with_code and code.co_filename.startswith(TEXT_OF_ONE):
        weakref.finalize(code, forget_text, code.co_filename).atexit = False
    return function


def forget_text(name: str) -> None:
    source_texts.pop(name, None)  # and not of linecache, whose checkcache() fails where an entry goes meanwhile


@contextlib.contextmanager
def texts_going_with_code() -> Iterator[None]:
    """The source texts of graphs that this thread generates inside go with the code that was made of them.

    For tracebacks, which hold the code, torch keeps them as long as the process runs: some 60 KB of a tiny prefill.
    """
    graph_module._method_from_src = write_method_and_forget
    before = texts.go_with_code
    try:
        texts.go_with_code = True
        yield
    finally:
        texts.go_with_code = before


def compiles_all() -> bool:
    """Whether torch.compile compiles whatever it meets, by the backend that was asked for: `torch.compiler.set_stance`
    may let some or all of it run uncompiled, or by another backend."""
    stance = torch._dynamo.eval_frame._stance
    return stance.stance in ("default", "fail_on_recompile") and stance.backend is None


def is_in_force(stance: Any) -> bool:
    """Whether what `torch.compiler.set_stance` returned is the last that was set."""
    return torch._dynamo.eval_frame._stance is stance.stance


def is_transformed() -> bool:
    """Whether this code runs inside a transform of torch.func: vmap, grad, jvp and the like."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_in_ddp() -> bool:
    """Whether this code runs inside the forward of a DistributedDataParallel, for which Dynamo would cut graphs."""
    return DistributedDataParallel._get_active_ddp_module() is not None


def backend_of(compiled: Any) -> Any:
    """The function or object that a module which torch.compile returned is compiled by; None if torch wraps it in
    another way."""
    wrapped: Any = getattr(compiled.dynamo_ctx, "callback", None)
    while hasattr(wrapped, "_torchdynamo_orig_backend"):
        wrapped = wrapped._torchdynamo_orig_backend
    return getattr(wrapped, "compiler_fn", None)


def let_compiled_modules_answer(name: str, answer: Callable[[Any], Any]) -> None:
    """Let the modules that torch.compile returns answer to an attribute before the module inside them is asked.

    Args:
        answer: of such a module; it raises AttributeError where the module inside is to be asked.
    """

    def put(compiled: Any, value: Any) -> None:
        setattr(compiled._orig_mod, name, value)

    def remove(compiled: Any) -> None:
        delattr(compiled._orig_mod, name)

    setattr(torch._dynamo.OptimizedModule, name, property(answer, put, remove))


def is_switched_off() -> bool:
    """Whether this thread's settings of torch.compile say that nothing is compiled."""
    return bool(torch._dynamo.config.disable)


def is_compiled(function: Any) -> bool:
    """Whether torch.compile has made something of a function; it returns it as it is where it is switched off."""
    return hasattr(function, "_torchdynamo_orig_callable")


REFUSED_TO_COMPILE = "fail_on_recompile"
"""In the text of the RuntimeError that the stance of this name raises; it has no class of its own."""


def write_package(program: torch.export.ExportedProgram, path: str, settings: dict[str, Any]) -> str:
    """Compile a program by AOTInductor into one .pt2 file."""
    return torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=settings)


def open_package(path: str) -> Any:
    """A .pt2 file as something to call, with `get_constant_fqns` and `load_constants`."""
    return torch._inductor.aoti_load_package(path)


def compile_package(gm: torch.fx.GraphModule, inputs: list[Any], path: str, settings: dict[str, Any]) -> None:
    """Compile a graph by AOTInductor into one .pt2 file, whose code takes flat tensors and nothing else.

    Args:
        inputs: a fake tensor for each placeholder, of symbolic sizes.
    """
    from torch._inductor.compile_fx import compile_fx_aot
    from torch._inductor.package import package_aoti

    files: Any = compile_fx_aot(gm, inputs, config_patches={"aot_inductor.package": True, **settings})
    package_aoti(path, files)


def open_flat(path: str, runners: int) -> Callable[[list[Any]], list[Any]]:
    """A .pt2 file as a function of flat tensors, that so many threads may run at once."""
    return AOTIModelPackageLoader(path, "model", False, runners, -1).run


def what_is_asked_of_sizes(fake: Any) -> tuple[dict[str, tuple[Any, Any]], list[Any]]:
    """What a graph that a fake tensor is of asks of its sizes: ranges of symbols, and conditions, as sympy has them."""
    env = fake.fake_mode.shape_env
    ranges = {str(symbol): (bound.lower, bound.upper) for symbol, bound in env.var_to_range.items()}
    return ranges, [guard.expr for guard in env.guards]


def size_as_it_came(size: torch.SymInt) -> tuple[Any, Any]:
    """(the symbol that a size was given first, what it is known to be equal to since), as sympy has them."""
    return size.node._expr, size.node.expr
