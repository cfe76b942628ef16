"""Which attention a prefill is captured with: SDPA, whatever its model uses elsewhere.

A graph with an opaque kernel in it (FlashAttention, a kernel of the Hub) has no queries and keys that a pass could
find, and one with FlexAttention builds its masks for lengths that pruning changes. So the code that is captured is told
that the model uses SDPA, in its attention and in the masks that it builds; encoders, decode steps and every other call
go on with what the user chose. Decoders without SDPA are captured with transformers' eager attention.

SDPA is put in the place of what computes the same alone: transformers' own functions, and kernels that it takes from
the Hub. A function that others have registered, under a name of their own or of transformers', or put into a model's
file, may compute anything: it is captured as it stands, with the masks that are registered for it.

What tells it is the property of transformers' configurations that all of that code asks. It answers otherwise in the
thread that captures alone, and is put back with the last model that needs it.
"""

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hawk_compile.capture.hooks import unwrapped
from hawk_compile.capture.while_used import WhileUsed
from hawk_compile.compat.models import attention_of, let_configs_answer, put_answer, supports_sdpa

SDPA, EAGER = "sdpa", "eager"
EAGER_FUNCTION = "eager_attention_forward"
"""By this name every file of a model in transformers has the attention that is registered nowhere."""

captures = threading.local()
"""`attention`: what this thread's captures attend by, if not by what the configuration says."""


@torch.compiler.assume_constant_result
def attention_of_capture(used: str | None) -> str | None:
    """What stands for an attention in captures: None where nothing is captured, nothing else is asked for, or nothing
    else computes the same. Asked while tracing, it is a constant."""
    asked: str | None = getattr(captures, "attention", None)
    return asked if asked is not None and is_of_transformers(used) else None


def is_of_transformers(name: str | None) -> bool:
    """Whether an attention is one that comes with transformers, with masks that come with it; a name with a slash is a
    kernel's of the Hub, which transformers alone registers."""
    if name is None or "/" in name:
        return True
    registered = [table.get(name) for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]
    return all(function is None or room_of(function) == "transformers" for function in registered)


def room_of(function: Any) -> str:
    """The package whose code a function is; one that wraps another is of the package that wraps, but for decorators of
    torch's, as `no_grad`."""
    function = unwrapped(function)
    known = getattr(function, "__globals__", None)
    name: str = type(function).__module__ if known is None else known.get("__name__", "")
    room = name.partition(".")[0]
    return room_of(function.__wrapped__) if room == "torch" and hasattr(function, "__wrapped__") else room


class AnsweredForCaptures(WhileUsed):
    """Lets configurations name another attention to code that is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.answered_before: property | None = None

    def change(self) -> None:
        if self.answered_before is None:
            self.answered_before = let_configs_answer(attention_of_capture)

    def undo(self) -> None:
        if self.answered_before is not None:
            put_answer(self.answered_before)
            self.answered_before = None


answered_for_captures = AnsweredForCaptures()


@dataclass(frozen=True)
class Attention:
    """Two names of attention implementations: of a prefill that is captured, and of the model's other calls."""

    here: str
    elsewhere: str


class Use:
    """Of `answered_for_captures`, for as long as it lives."""


def attention_of_prefill(model: PreTrainedModel) -> Attention:
    used = attention_of(model.config.get_text_config()) or EAGER
    eager = eager_of(model) if used == EAGER else None
    if used == SDPA or not is_of_transformers(used) or (eager is not None and room_of(eager) != "transformers"):
        return Attention(used, used)
    decoder: Any = model.base_model
    takes_sdpa = supports_sdpa(decoder.get_decoder()) and is_of_transformers(SDPA)
    return Attention(SDPA if takes_sdpa else EAGER, used)


def eager_of(model: PreTrainedModel) -> Any:
    """The function by which a decoder attends where it is told to by "eager": that of its own file, where it may have
    been replaced; None where the file has none."""
    decoder = model.base_model.get_decoder()  # type: ignore[operator]
    return getattr(sys.modules.get(type(decoder).__module__), EAGER_FUNCTION, None)


@contextlib.contextmanager
def capturing(model: PreTrainedModel, user: Any = None) -> Iterator[Attention]:
    """Let what this thread captures inside attend as the model's prefill does.

    Args:
        user: configurations may answer otherwise as long as it lives, or until `answered_for_captures.end`, so that
            nothing changes between its calls. None: inside alone.
    """
    attention = attention_of_prefill(model)
    if attention.here == attention.elsewhere:
        yield attention
        return
    using = Use() if user is None else user
    if using not in answered_for_captures.users:
        answered_for_captures.begin(using)
    before = getattr(captures, "attention", None)
    try:
        captures.attention = attention.here
        yield attention
    finally:
        captures.attention = before
        if user is None:
            answered_for_captures.end(using)
