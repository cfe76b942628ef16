"""The forward of an optimised model: which calls are pruned, and how the others read a pruned cache."""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from hawk_compile.capture.dynamo import capture_lock, capture_settings, compile_alone
from hawk_compile.capture.encode import positions_of
from hawk_compile.capture.modalities import modalities_of, tokens_of
from hawk_compile.capture.vision import CompiledVision
from hawk_compile.passes.insert_scoring import Ranks
from hawk_compile.plan.question import SpecialIds
from hawk_compile.runtime.conversation import PrunedCache, mark_pruned, of_slots, physical_length, physical_mask
from hawk_compile.runtime.positions import deltas_after, deltas_of, next_positions
from hawk_compile.runtime.prefill import CompiledPrefill, run_prefill
from hawk_compile.runtime.records import PrefillRecord
from hawk_compile.settings.config import HawkConfig
from hawk_compile.settings.head_weights import HeadWeights

Forward = Callable[..., Any]

DECODE_OPTIONS = "hawk_decode_options"
"""An argument that generate carries where it compiles the decode step: the options of torch.compile."""


class Runtime:
    """What an optimised model carries: its settings, its compiled functions, and each thread's last report."""

    def __init__(
        self, config: HawkConfig, head_weights: HeadWeights, ids: SpecialIds, originals: dict[str, Any],
        ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self.settings = config
        self.asked: ContextVar[HawkConfig | None] = ContextVar("hawk_asked", default=None)
        self.head_weights = head_weights
        self.ids = ids
        self.originals = originals
        self.local = threading.local()
        self.ranks = ranks
        self.prefill = CompiledPrefill(config, ranks)
        self.vision = CompiledVision(config.backend)
        self.compiled_decode: dict[str, Forward] = {}
        self.static_length = 0
        self.weights_on: dict[torch.device, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Runtime":
        return Runtime(self.settings, self.head_weights, self.ids, copy.deepcopy(self.originals, memo), self.ranks)

    @property
    def config(self) -> HawkConfig:
        """The settings of this call: the model's, unless the call has its own."""
        return self.asked.get() or self.settings

    @contextlib.contextmanager
    def asking(self, config: HawkConfig) -> Iterator[None]:
        """Let the calls of this thread inside have settings of their own; they may not change what was compiled."""
        token = self.asked.set(config)
        try:
            yield
        finally:
            self.asked.reset(token)

    def take_compiled(self, earlier: "Runtime") -> None:
        """Go on with what was compiled under earlier settings, where the new ones do not change it."""
        if earlier.config.backend == self.config.backend:
            self.compiled_decode = earlier.compiled_decode
            self.static_length = earlier.static_length
            self.vision = earlier.vision
            if earlier.prefill.options == self.prefill.options:
                self.prefill = earlier.prefill

    @property
    def compilations(self) -> int:
        """How often the prefill was compiled."""
        return self.prefill.compilations

    @property
    def record(self) -> PrefillRecord | None:
        return getattr(self.local, "record", None)

    def note(self, record: PrefillRecord) -> None:
        self.local.record = record

    def weights(self, device: torch.device) -> Tensor:
        if device not in self.weights_on:
            self.weights_on[device] = self.head_weights.values.to(device, copy=True)
            torch._dynamo.mark_static(self.weights_on[device])
        return self.weights_on[device]


def ranks_of(model: PreTrainedModel) -> Ranks | None:
    """This process among those that transformers shares a model's heads between (`tp_plan`); None if there are none."""
    if (model._tp_size or 1) == 1:
        return None
    mesh: Any = model._device_mesh
    mesh = mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh
    return Ranks(mesh.get_group().group_name, mesh.get_local_rank(), mesh.size())


def run(model: PreTrainedModel, runtime: Runtime, forward: Forward, kwargs: dict[str, Any]) -> Any:
    """One call of an optimised model's forward.

    Raises:
        UnsupportedCallError: a call that pruning does not support; nothing has run.
        InputError: inputs that contradict each other.
        GraphError: the model's graph cannot be pruned.
    """
    options = kwargs.pop(DECODE_OPTIONS, None)
    if modalities_of(kwargs) & set(runtime.config.modalities):
        return run_prefill(model, runtime, forward, kwargs)
    cache = kwargs.get("past_key_values")
    if physical_length(cache) == 0:
        return run_text(model, runtime, forward, kwargs)
    if not isinstance(cache, PrunedCache):
        return step(runtime, forward, kwargs, options)
    mask = kwargs.get("attention_mask")
    new_tokens = tokens_of(kwargs).shape[1]
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        kwargs = {**kwargs, "attention_mask": physical_mask(cache, mask, new_tokens)}
    kinds = kwargs.get("token_type_ids")
    if kinds is not None and kinds.shape[1] != new_tokens:  # of the whole conversation; masks read them by slot
        kwargs = {**kwargs, "token_type_ids": of_slots(cache, kinds)}
    if kwargs.get("position_ids") is None and cache.hawk_slots.rope_deltas is not None:
        kwargs = {**kwargs, "position_ids": next_positions(cache, mask, new_tokens)}
    return step(runtime, forward, kwargs, options)


def run_text(model: PreTrainedModel, runtime: Runtime, forward: Forward, kwargs: dict[str, Any]) -> Any:
    """The first prompt of a conversation, without features to prune: it runs whole, and the report says so."""
    note_unpruned(model, runtime, kwargs)
    if not hasattr(model.base_model, "rope_deltas"):
        return step(runtime, forward, kwargs)
    if kwargs.get("position_ids") is None and modalities_of(kwargs):
        with deltas_of(model, None):
            kwargs = {**kwargs, "position_ids": positions_of(model.base_model, kwargs)}
    tokens, positions = tokens_of(kwargs), kwargs.get("position_ids")
    if positions is None:
        with deltas_of(model, None):
            result = step(runtime, forward, kwargs)
    else:
        result = step(runtime, forward, kwargs)
    found = [each for each in (kwargs.get("past_key_values"), *values_of(result)) if isinstance(each, Cache)]
    if found and physical_length(found[0]):
        # Nothing was removed, but this conversation's offsets must not be another's.
        rows, length = tokens.shape[:2]
        deltas = deltas_after(model, None, positions, kwargs.get("attention_mask"), rows, length)
        mark_pruned(found[0], torch.empty((rows, 0), dtype=torch.int64, device=tokens.device), None, 0, 0, deltas)
    return result


def values_of(result: ModelOutput | tuple[Any, ...]) -> tuple[Any, ...]:
    return result.to_tuple() if isinstance(result, ModelOutput) else result


def step(runtime: Runtime, forward: Forward, kwargs: dict[str, Any], options: dict[str, Any] | None = None) -> Any:
    """A call without pruning: compiled if it is a decode step and the settings or generate's `options` ask for that."""
    cache = kwargs.get("past_key_values")
    if options is None and runtime.config.compile_decode:
        options = {"backend": runtime.config.backend}
    if options is None or physical_length(cache) == 0 or tokens_of(kwargs).shape[1] != 1:
        return forward(**kwargs)
    compiled = runtime.compiled_decode.get(str(options))
    if compiled is None:
        compiled = runtime.compiled_decode[str(options)] = compile_alone(forward, **options)
    with capture_lock, capture_settings():
        return compiled(**kwargs)


def note_unpruned(model: PreTrainedModel, runtime: Runtime, kwargs: dict[str, Any]) -> None:
    """Say in the report why a prefill was not pruned."""
    tokens = tokens_of(kwargs)
    rows, length = tokens.shape[:2]
    if found := sorted(modalities_of(kwargs)):
        reason = f"the prompt has {' and '.join(found)} only, which is not among modalities={runtime.config.modalities}"
    elif kwargs.get("input_ids") is None:
        reason = "inputs_embeds without visual features: if images are merged into them, they cannot be told from text"
    else:
        reason = "the prompt has no visual features"
    nothing = [0] * rows
    runtime.note(PrefillRecord(
        nothing, nothing, None, None, None, reason, None, runtime.head_weights.origin, length))
