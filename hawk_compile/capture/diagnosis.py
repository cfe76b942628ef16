"""What cannot be captured or compiled, said in terms of the model: which line of which module, why, and what to do.

Dynamo's own part of a traceback, and those of the compilers behind it, run to hundreds of lines. They are left out
(`raise ... from None`) unless Dynamo is asked for all (TORCHDYNAMO_VERBOSE=1); the error's `__context__` holds them.
"""

import contextlib
import inspect
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from torch import nn

from hawk_compile.capture.dynamo import CAPTURE_FAILURES, CompilerFailed
from hawk_compile.capture.experts import runs_switched_loop
from hawk_compile.compat.dynamo import tells_all
from hawk_compile.errors import CaptureError, CompileError, HawkError

NOT_THE_MODEL = (
    Path(torch.__file__).parent, Path(__file__).parents[1], Path(transformers.__file__).parent / "exporters"
)  # fmt: skip
"""Folders whose lines are no lines of a model: torch, this package, and what exports by torch."""
OF_THE_CALLER = (torch.OutOfMemoryError, MemoryError)
"""What who calls may wait for, to go on with less, whether or not there was something to compile."""
TRACES = str(Path(torch.__file__).parent / "_dynamo/symbolic_convert.py")
"""Where Dynamo goes through a function line by line."""
GENERATED = "<eval_with_key>"
"""How the files of a graph's code are called, which is no model's either."""
LONGEST_REASON = 300
"""Characters; Dynamo's own messages run to a hundred lines."""
GROUPED = (
    'let its experts run without a loop over those that tokens choose '
    '(model.set_experts_implementation("grouped_mm"), or load it with experts_implementation="grouped_mm"), or '
)
RESTORE = "call hawk_compile.restore(model) to run it unpruned, and see whether it runs then"


@contextlib.contextmanager
def diagnosed(model: nn.Module, what: str = "", remedy: str = RESTORE) -> Iterator[None]:
    """Let what captures raise inside (Dynamo, torch.export) be a CaptureError, what compiles a CompileError, and what a
    pass or an operator raises there be itself.

    Args:
        model: whose forward is captured; its modules are named by their path in it.
        what: cannot be captured, in words: the sentence's subject. Left out, the model's forward.
        remedy: what to do where the model's code cannot be changed.

    Raises:
        CaptureError: the forward cannot be captured as one graph.
        CompileError: its graph cannot be compiled.
        HawkError: what a pass or an operator raised.
        torch.OutOfMemoryError, MemoryError: there was no memory to compile it with.
    """
    handled = sys.exception()
    try:
        yield
    except Exception as error:
        if not isinstance(error, CAPTURE_FAILURES) and not ended_a_trace(error):
            raise
        if (raised := raised_inside(error, handled)) is not None:
            raise raised from raised.__cause__
        what = what or f"the forward of {type(model).__name__}"
        told = compile_error if isinstance(error, CompilerFailed) else capture_error
        raise told(error, model, what, remedy) from shown(error)


def ended_a_trace(error: BaseException) -> bool:
    """Whether Dynamo could not go on with a line, and does not say so by an error of its own."""
    if isinstance(error, (HawkError, *OF_THE_CALLER)):
        return False
    return any(frame.filename == TRACES for frame in traceback.extract_tb(error.__traceback__))


def raised_inside(error: BaseException | None, handled: BaseException | None) -> BaseException | None:
    """Of the errors that led to this one, the first that a caller should see in its place; None if there is none.

    Args:
        handled: an error that was being handled already; that one and those before it did not lead to this one.
    """
    while error is not None and error is not handled:
        if isinstance(error, (HawkError, *OF_THE_CALLER)):
            return error
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return None


def shown(error: BaseException) -> BaseException | None:
    """What a traceback gives as the cause of our error: nothing, unless memory ran out or Dynamo is to show all."""
    return error if tells_all() or isinstance(error, OF_THE_CALLER) else None


def compile_error(error: BaseException, model: nn.Module, what: str, remedy: str) -> CompileError:
    """The error in words: what, why, and the remedy."""
    cause = getattr(error, "inner_exception", error)
    return CompileError(
        f"{what} was captured, and its graph cannot be compiled ({type(cause).__name__}: {reason_of(cause)}): "
        f'mend that (TORCHDYNAMO_VERBOSE=1 shows all of it), take backend="aot_eager", or {remedy}'
    )


def capture_error(error: BaseException, model: nn.Module, what: str, remedy: str) -> CaptureError:
    """The error in words: what, where in the model, why, and the remedy."""
    stack = user_stack(error)
    place = line_of(stack)
    path, module, count = module_of(model, stack)
    change = "" if not place else GROUPED if runs_switched_loop(module) else "change that line, or "
    more = f" (the first of {count})" if count > 1 else ""
    within = f" of {type(module).__name__} {path or 'itself'}{more}" if module is not None else ""
    at = f" at {place}{within}" if place else ""
    return CaptureError(f"{what} cannot be captured as one graph{at} ({reason_of(error)}): {change}{remedy}")


def user_stack(error: BaseException) -> list[traceback.FrameSummary]:
    """The model's frames, outermost first: those that Dynamo was tracing, or that ran while torch.export traced."""
    traced = getattr(error, "real_stack", None) or traceback.extract_tb(error.__traceback__)
    return [frame for frame in traced if is_of_a_model(frame)]


def is_of_a_model(frame: traceback.FrameSummary) -> bool:
    """Whether a line stands neither in code that a graph became nor in one of the folders `NOT_THE_MODEL`."""
    path = Path(frame.filename)
    return not frame.filename.startswith(GENERATED) and not any(path.is_relative_to(room) for room in NOT_THE_MODEL)


def line_of(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line, empty if there is none."""
    if not stack:
        return ""
    frame = stack[-1]
    return f"{frame.filename}:{frame.lineno}, in {frame.name}: `{(frame.line or '').strip()}`"


def module_of(model: nn.Module, stack: Sequence[traceback.FrameSummary]) -> tuple[str, nn.Module | None, int]:
    """The module whose method holds the innermost line, or the innermost of the lines that called it: its path, itself,
    and how many share that line, of which it is the first. None if no module does."""
    modules = list(model.named_modules())
    for frame in reversed(stack):
        holders = [(path, module) for path, module in modules if holds(module, frame)]
        if holders:
            return *holders[0], len(holders)
    return "", None, 0


def holds(module: nn.Module, frame: traceback.FrameSummary) -> bool:
    """Whether a line is one of a module's methods', those put on the module itself among them."""
    methods = [getattr(type(module), frame.name, None), *filter(inspect.ismethod, vars(module).values())]
    codes = [getattr(inspect.unwrap(method), "__code__", None) for method in methods if callable(method)]
    return any(code is not None and code.co_filename == frame.filename and covers(code, frame) for code in codes)


def covers(code: types.CodeType, frame: traceback.FrameSummary) -> bool:
    lines = [line for _, _, line in code.co_lines() if line is not None]
    return min(lines) <= (frame.lineno or 0) <= max(lines)


def reason_of(error: BaseException) -> str:
    """Why, in one line: the message's first line, its explanation, and the exception where the model raised one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    parts = lines[:1]
    parts += [line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")]
    raised = [line.partition("raised exception ")[2] for line in lines if "context: raised exception " in line]
    reason = " ".join(part.rstrip(".") + "." for part in (raised or parts[:2]))
    return reason[:LONGEST_REASON].rstrip(". ") or type(error).__name__
