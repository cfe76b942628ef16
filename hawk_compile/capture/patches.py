"""What is put on a model so that its forward can be captured as one graph.

The model's own check of feature count against placeholder count formats the number of features into its message, and
fixes that number in the graph: the check is made on the host, and inside the graph it is asked about empty tensors.

Whether a graph is captured is asked of this thread: `torch.compiler.is_compiling` says what any thread of the process
does, and what stands in would then run in a call that is not captured.
"""

import contextlib
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from hawk_compile.capture.modalities import AUDIO, in_vocabulary, placeholder_ids
from hawk_compile.capture.while_used import WhileUsed
from hawk_compile.compat.models import let_recorders_ask

exports = threading.local()


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """torch.export runs the model's code in this thread, where Dynamo's own mark does not show."""
    exports.running = True
    try:
        yield
    finally:
        exports.running = False


def is_captured() -> bool:
    """Whether the code that asks is being captured: by Dynamo, for which this is a constant, or by an export."""
    return torch.compiler.is_dynamo_compiling() or getattr(exports, "running", False)


class RecordedByThread(WhileUsed):
    """Lets transformers record hidden states in each thread's own place while another thread captures.

    It records in one place of the process where it believes to be captured, which it asks of the whole process: two
    threads that encode images by hidden states, as LLaVA does, would get each other's features while a third compiles.
    Captured code is as before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked_before: Callable[[], bool] | None = None

    def change(self) -> None:
        if self.asked_before is None:
            self.asked_before = let_recorders_ask(is_captured)

    def undo(self) -> None:
        if self.asked_before is None:
            return
        others = let_recorders_ask(self.asked_before)
        if others is not is_captured:
            let_recorders_ask(others)
        self.asked_before = None


recorded_by_thread = RecordedByThread()


def get_placeholder_mask(
    self: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor, *args: Any, **features: Any
) -> Any:
    """Stands in for the method of this name while a graph is captured: the same masks, a check that always holds."""
    original: Any = type(self).get_placeholder_mask  # type: ignore[attr-defined]
    if not is_captured():
        return original(self, input_ids, inputs_embeds, *args, **features)
    waiting = placeholder_ids(self)
    if input_ids is None:
        input_ids = compared_ids(self, inputs_embeds, waiting)
    if waiting and waiting == placeholder_ids(self, [AUDIO]):
        # Models that only hear return one mask, expanded to the embeddings, which a check of no features would lose.
        return (input_ids == waiting[0]).unsqueeze(-1)
    nothing = inputs_embeds.new_empty(0, 1)
    args = tuple(None if each is None else nothing for each in args)
    features = {name: None if each is None else nothing for name, each in features.items()}
    return original(self, input_ids, inputs_embeds[..., :0], *args, **features)


def compared_ids(model: Any, inputs_embeds: Tensor, wanted: list[int]) -> Tensor:
    """As `known_ids`, for a few ids and inside a graph: one comparison each."""
    embed = model.get_input_embeddings()
    ids = torch.full(inputs_embeds.shape[:2], -1, dtype=torch.int64, device=inputs_embeds.device)
    for number in reversed(in_vocabulary(embed, wanted)):
        row = embed(torch.tensor([number], device=inputs_embeds.device)).to(inputs_embeds.dtype)
        ids = ids.masked_fill((inputs_embeds == row).all(-1), number)
    return ids


def get_audio_features(self: nn.Module, input_features: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the method of this name while a graph is captured: there the input is encoded already, [V, D]."""
    original: Any = type(self).get_audio_features  # type: ignore[attr-defined]
    if not is_captured():
        return original(self, input_features, *args, **kwargs)
    return BaseModelOutputWithPooling(pooler_output=input_features, last_hidden_state=input_features)


def body_overrides(model: PreTrainedModel) -> dict[str, types.MethodType]:
    """The methods to put on the model's body, of those that it has."""
    base = model.base_model
    return {
        method.__name__: types.MethodType(method, base)
        for method in (get_placeholder_mask, get_audio_features)
        if hasattr(type(base), method.__name__)
    }


def install_recorders(module: nn.Module) -> None:
    """Put on the hooks that record hidden states: a model does so at its first such call, under a lock, which no graph
    can take."""
    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            maybe_install_capturing_hooks(part)
