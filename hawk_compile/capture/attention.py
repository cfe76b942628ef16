"""Which attention a prefill is captured with: SDPA, whatever its model uses elsewhere.

A graph with an opaque kernel in it (FlashAttention, a kernel of the Hub) has no queries and keys that a pass could
find, and one with FlexAttention builds its masks for lengths that pruning changes. So the code that is captured is told
that the model uses SDPA, in its attention and in the masks that it builds; encoders, decode steps and every other call
go on with what the user chose. Decoders without SDPA are captured with transformers' eager attention.

What tells it is the property of transformers' configurations that all of that code asks. It answers otherwise in the
thread that captures alone, and is put back with the last model that needs it.
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hawk_compile.capture.while_used import WhileUsed
from hawk_compile.compat.models import attention_of, let_configs_answer, put_answer, supports_sdpa

SDPA, EAGER = "sdpa", "eager"

captures = threading.local()
"""`attention`: what this thread's captures attend by, if not by what the configuration says."""


@torch.compiler.assume_constant_result
def attention_of_capture() -> str | None:
    """None where nothing is captured, or nothing else is asked for. Asked while tracing, it is a constant."""
    return getattr(captures, "attention", None)


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
    if used == SDPA:
        return Attention(SDPA, SDPA)
    decoder: Any = model.base_model
    return Attention(SDPA if supports_sdpa(decoder.get_decoder()) else EAGER, used)


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
