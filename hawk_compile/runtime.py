"""The forward of an optimised model: which calls are pruned, how, and what they leave on the cache."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed, Unsupported
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput

from hawk_compile import capture
from hawk_compile.backend import compile_graph
from hawk_compile.cache import PrunedCache, mark_pruned, of_slots, physical_length, physical_mask
from hawk_compile.config import HawkConfig
from hawk_compile.errors import GraphError, HawkError, InputError, UnsupportedCallError
from hawk_compile.head_weights import HeadWeights
from hawk_compile.kernels.plan.op import slots
from hawk_compile.passes.errors import AttentionNotFoundError
from hawk_compile.pipeline import PassOptions
from hawk_compile.plan import Plan, make_plan
from hawk_compile.query import SpecialIds
from hawk_compile.report import PrefillRecord

Forward = Callable[..., Any]

PROMPT_LENGTH = "hawk_prompt_length"
"""An argument that generate carries where it has no cache: what stands behind that length was generated: no voters."""

capture_lock = threading.RLock()
"""Held while a prefill runs: capturing changes Dynamo's settings, which all threads share."""


class CompiledPrefill:
    """A model's prefill, compiled on its first call. Ratio and head weights are inputs of it, not part of it."""

    def __init__(self, backend: str, normalization: str):
        self.config = HawkConfig(backend=backend, normalization=normalization)
        self.compilations = 0
        self.function = capture.compile_alone(planned_forward, backend=self.compile, fullgraph=True)

    def compile(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.compilations += 1
        return compile_graph(gm, example_inputs, self.config, PassOptions(normalization=self.config.normalization))


class Runtime:
    """What an optimised model carries: its settings, its compiled functions, and each thread's last report."""

    def __init__(self, config: HawkConfig, head_weights: HeadWeights, ids: SpecialIds, originals: dict[str, Any]):
        self.config = config
        self.head_weights = head_weights
        self.ids = ids
        self.originals = originals
        self.local = threading.local()
        self.prefill = CompiledPrefill(config.backend, config.normalization)
        self.compiled_decode: Forward | None = None
        self.weights_on: dict[torch.device, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Runtime":
        return Runtime(self.config, self.head_weights, self.ids, copy.deepcopy(self.originals, memo))

    def take_compiled(self, earlier: "Runtime") -> None:
        """Go on with what was compiled under earlier settings, where the new ones do not change it."""
        if earlier.config.backend == self.config.backend:
            self.compiled_decode = earlier.compiled_decode
            if earlier.config.normalization == self.config.normalization:
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


def run(model: PreTrainedModel, runtime: Runtime, forward: Forward, kwargs: dict[str, Any]) -> Any:
    """One call of an optimised model's forward.

    Raises:
        UnsupportedCallError: a call that pruning does not support; nothing has run.
        InputError: inputs that contradict each other.
        GraphError: the model's graph cannot be pruned.
    """
    if capture.has_pixels(kwargs) or capture.has_features(kwargs):
        refuse_unsupported(model, kwargs)
        return run_prefill(model, runtime, forward, kwargs)
    cache = kwargs.get("past_key_values")
    if physical_length(cache) == 0:
        return run_text(model, runtime, forward, kwargs)
    if not isinstance(cache, PrunedCache):
        return step(runtime, forward, kwargs)
    mask = kwargs.get("attention_mask")
    new_tokens = tokens_of(kwargs).shape[1]
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        kwargs = {**kwargs, "attention_mask": physical_mask(cache, mask, new_tokens)}
    kinds = kwargs.get("token_type_ids")
    if kinds is not None and kinds.shape[1] != new_tokens:  # of the whole conversation; masks read them by slot
        kwargs = {**kwargs, "token_type_ids": of_slots(cache, kinds)}
    if kwargs.get("position_ids") is None and cache.hawk_slots.rope_deltas is not None:
        kwargs = {**kwargs, "position_ids": next_positions(cache, mask, new_tokens)}
    return step(runtime, forward, kwargs)


def next_positions(cache: PrunedCache, mask: Tensor | None, new_tokens: int) -> Tensor:
    """[3, B, new]: the positions of text tokens behind this conversation, with its own offset.

    The model would add the offset that it remembers, which may be another conversation's.
    """
    deltas = cache.hawk_slots.rope_deltas
    assert deltas is not None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        text = (mask.long().cumsum(1) - 1)[:, -new_tokens:]
    else:
        text = torch.arange(new_tokens, device=deltas.device)[None] + cache.get_seq_length()
    return (text + deltas).expand(3, -1, -1)


def run_text(model: PreTrainedModel, runtime: Runtime, forward: Forward, kwargs: dict[str, Any]) -> Any:
    """The first prompt of a conversation, without visual features: not pruned, and the report says so."""
    note_unpruned(model, runtime, kwargs)
    if not hasattr(model.base_model, "rope_deltas"):
        return step(runtime, forward, kwargs)
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


def step(runtime: Runtime, forward: Forward, kwargs: dict[str, Any]) -> Any:
    """A call without pruning: compiled if it is a decode step and the settings ask for that."""
    cache = kwargs.get("past_key_values")
    if not runtime.config.compile_decode or physical_length(cache) == 0 or tokens_of(kwargs).shape[1] != 1:
        return forward(**kwargs)
    if runtime.compiled_decode is None:
        runtime.compiled_decode = capture.compile_alone(forward, backend=runtime.config.backend)
    return runtime.compiled_decode(**kwargs)


def refuse_unsupported(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    if kwargs.get("labels") is not None:
        raise UnsupportedCallError(
            "labels were given to a pruned prefill, whose logits no longer line up with them: hawk_compile.restore the "
            "model to train or to compute a loss"
        )
    if model.training:
        raise UnsupportedCallError(
            "the model is in training mode, and a pruned prefill has no gradients: call model.eval(), or "
            "hawk_compile.restore it to train"
        )
    if kwargs.get("output_attentions"):
        raise UnsupportedCallError(
            "output_attentions=True needs attention matrices, which a pruned prefill does not make: leave it out, or "
            "hawk_compile.restore the model"
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedCallError(f"attention_mask must have shape [B, S] for a pruned prefill, got {given}")
    if isinstance(kwargs.get("logits_to_keep"), Tensor):
        raise UnsupportedCallError(
            "logits_to_keep was given as positions, which are others after pruning: give a number of last tokens"
        )
    cache = kwargs.get("past_key_values")
    if physical_length(cache) and kwargs.get("token_type_ids") is not None:
        raise UnsupportedCallError(
            "new images on a cache that already holds tokens cannot attend both ways (token_type_ids were given): "
            "prefill the whole conversation at once"
        )
    if physical_length(cache) and kwargs.get("position_ids") is None and hasattr(model.base_model, "rope_deltas"):
        raise UnsupportedCallError(
            "new images on a cache that already holds tokens need position_ids [3 or 4, B, S], since the model would "
            "give them positions of text: give those of the whole conversation's get_rope_index, cut to the new tokens"
        )
    if physical_length(cache) and not all(type(layer) is DynamicLayer for layer in cache.layers):  # type: ignore[union-attr]
        kinds = sorted({type(layer).__name__ for layer in cache.layers})  # type: ignore[union-attr]
        raise UnsupportedCallError(
            "new images on a cache that already holds tokens need a DynamicCache of plain layers, got "
            f"{', '.join(kinds)}: prefill the whole conversation at once"
        )


def refuse_two_kinds_of_layer_features(outputs: dict[str, ModelOutput]) -> None:
    if len(outputs) > 1 and any(output.get(capture.LAYER_FEATURES) is not None for output in outputs.values()):
        raise UnsupportedCallError(
            f"{' and '.join(outputs)} in one call: this model adds features of both to later layers, which the graph "
            "cannot tell apart; give them in separate calls"
        )


def run_prefill(model: PreTrainedModel, runtime: Runtime, forward: Forward, kwargs: dict[str, Any]) -> Any:
    """Encode, plan, run the pruned graph, and hand its keys and values to the caller's cache."""
    asked = tokens_of(kwargs).requires_grad or any(parameter.requires_grad for parameter in model.parameters())
    grad = torch.is_grad_enabled() and asked
    with torch.no_grad():
        if capture.has_pixels(kwargs):
            with deltas_of(model, kwargs.get("past_key_values")):
                kwargs = capture.encode(model, kwargs)
        if kwargs.get("output_hidden_states"):
            capture.install_recorders(model)
        kwargs = {name: given for name, given in kwargs.items() if name != "mm_token_type_ids"}
        outputs = capture.join_features(kwargs.pop("mm_encoder_outputs"))
        refuse_two_kinds_of_layer_features(outputs)
        tokens = tokens_of(kwargs)
        rows, length = tokens.shape[:2]
        target = kwargs.pop("past_key_values", None)
        use_cache, return_dict = kwargs.pop("use_cache", None), kwargs.pop("return_dict", None)
        past = physical_length(target)
        whole_mask = kwargs.pop("attention_mask", None)
        mask, past_mask = split_mask(target, whole_mask, past, length)
        deltas = deltas_after(model, target, kwargs.get("position_ids"), whole_mask, rows, length)
        placeholders = capture.placeholder_ids(model)
        ids = kwargs.get("input_ids")
        if ids is None:
            ids = capture.known_ids(model, tokens, [*runtime.ids.special, *placeholders])
        visual = torch.isin(ids, torch.tensor(placeholders, device=ids.device))
        features = capture.feature_count(outputs)
        prompt = kwargs.pop(PROMPT_LENGTH, None)
        plan = make_plan(ids, visual, mask, features, runtime.ids, runtime.config, prompt)
        needs_mask = plan.padded or plan.filled or past_mask is not None
        if not needs_mask:
            mask = None
        elif mask is None:
            mask = torch.ones((rows, length), dtype=torch.long, device=tokens.device)
        scratch = scratch_cache(target)
        inputs = {name: given for name, given in kwargs.items() if given is not None}
        inputs |= {"mm_encoder_outputs": outputs, "attention_mask": mask, "past_key_values": scratch, "use_cache": True}
        result, keep, valid, scores = call_compiled(runtime, forward, inputs, past_mask, plan, tokens.device)
        target = fill_cache(model, target, scratch, past, use_cache)
        if target is not None:
            mark_pruned(target, keep, valid if plan.filled else None, past, length, deltas)
    runtime.note(PrefillRecord(
        plan.visual, plan.kept, keep, valid, scores, reason_of(runtime.config, plan), plan.source,
        runtime.head_weights.origin, length, plan.length))
    if "past_key_values" in result:
        result["past_key_values"] = target
    if grad:
        result["logits"] = RefuseBackward.apply(result["logits"].detach().requires_grad_())
    return result if return_dict in (None, True) else result.to_tuple()


def tokens_of(kwargs: dict[str, Any]) -> Tensor:
    """input_ids [B, S] or inputs_embeds [B, S, D], whichever was given."""
    found = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if found is None:
        raise InputError("give input_ids or inputs_embeds")
    return found


def split_mask(
    cache: Cache | None, mask: Tensor | None, past: int, length: int
) -> tuple[Tensor | None, Tensor | None]:
    """(mask of the new tokens [B, S], mask of the cache's slots [B, P] or None if there are none)."""
    if not past:
        if mask is not None and mask.shape[1] != length:
            raise InputError(f"attention_mask must have shape [B, {length}] like the prompt, got {tuple(mask.shape)}")
        return mask, None
    assert cache is not None
    whole = physical_mask(cache, mask, length) if isinstance(cache, PrunedCache) else mask
    if whole is None:
        rows = cache.layers[0].keys.shape[0]  # type: ignore[union-attr]
        whole = torch.ones((rows, past + length), dtype=torch.long, device=cache.layers[0].keys.device)  # type: ignore[union-attr]
    if whole.shape[1] != past + length:
        raise InputError(
            f"attention_mask must cover the whole conversation, {past + length} positions (cached ones included), got "
            f"shape {tuple(whole.shape)}"
        )
    return whole[:, past:].contiguous(), whole[:, :past].contiguous()


def scratch_cache(target: Cache | None) -> DynamicCache:
    """A plain cache for the graph to fill: whatever the caller's kind, one graph serves it."""
    scratch = DynamicCache()
    if physical_length(target):
        for index, layer in enumerate(target.layers):  # type: ignore[union-attr]
            scratch.update(layer.keys, layer.values, index)
    return scratch


def call_compiled(
    runtime: Runtime,
    forward: Forward,
    inputs: dict[str, Any],
    past_mask: Tensor | None,
    plan: Plan,
    device: torch.device,
) -> tuple[ModelOutput, Tensor, Tensor, Tensor]:
    """Run the compiled prefill: (model output, keep [B, S'], valid [B, S'], scores [B, S])."""
    lengths = slots(plan.length, device), slots(sum(plan.kept), device)
    planned = (plan.votes, plan.budget, runtime.weights(device), *lengths)
    with capture_lock, capture.settings():
        try:
            return runtime.prefill.function(forward, inputs, past_mask, planned)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, (GraphError, HawkError)):
                raise error.inner_exception from None
            raise
        except Unsupported as error:
            raise AttentionNotFoundError(
                f"the model's forward cannot be captured as one graph between merge and decoder: {error}"
            ) from error


def planned_forward(
    forward: Forward, inputs: dict[str, Any], past_mask: Tensor | None, planned: tuple[Tensor, ...]
) -> tuple[ModelOutput, Tensor, Tensor, Tensor]:
    """What Dynamo captures: the model's own forward with the plan beside it."""
    keep, valid, scores = torch.ops.hawk.plan(*planned)
    inputs = {**inputs, "mm_encoder_outputs": capture.cut_extra_rows(inputs["mm_encoder_outputs"])}
    capture.equate_lengths(inputs, planned[0])
    if past_mask is not None:
        inputs = {**inputs, "attention_mask": torch.cat([past_mask, inputs["attention_mask"]], dim=1)}
    return forward(**inputs, return_dict=True), keep, valid, scores


def fill_cache(
    model: PreTrainedModel, target: Cache | None, scratch: DynamicCache, past: int, use_cache: bool | None
) -> Cache | None:
    """The caller's cache with the new keys and values, by its own `update`; a new one if the model would make one."""
    config = model.config.get_text_config()
    if target is None:
        if use_cache is False or (use_cache is None and not getattr(config, "use_cache", True)):
            return None
        target = DynamicCache(config=config)
    for index, layer in enumerate(scratch.layers):
        keys, values = layer.keys, layer.values  # type: ignore[union-attr]
        assert keys is not None and values is not None
        target.update(keys[:, :, past:], values[:, :, past:], index)
    return target


def reason_of(config: HawkConfig, plan: Plan) -> str:
    total, kept = sum(plan.visual), sum(plan.kept)
    if kept == total:
        return f"ratio={config.ratio:g} leaves all {total} visual tokens"
    return f"ratio={config.ratio:g} removes {total - kept} of {total} visual tokens"


def note_unpruned(model: PreTrainedModel, runtime: Runtime, kwargs: dict[str, Any]) -> None:
    """Say in the report why a prefill was not pruned."""
    tokens = tokens_of(kwargs)
    rows, length = tokens.shape[:2]
    if kwargs.get("input_ids") is None:
        reason = "inputs_embeds without visual features: if images are merged into them, they cannot be told from text"
    else:
        reason = "the prompt has no visual features"
    nothing = [0] * rows
    runtime.note(PrefillRecord(
        nothing, nothing, None, None, None, reason, None, runtime.head_weights.origin, length, length))


@contextmanager
def deltas_of(model: PreTrainedModel, cache: Any) -> Iterator[None]:
    """Let the model use this conversation's position offsets while it works out positions itself, and nobody else's.

    A cache that was filled before the model was optimised carries none: then the model's own are left as they are.
    """
    base: Any = model.base_model
    with capture_lock:
        if hasattr(base, "rope_deltas"):
            if isinstance(cache, PrunedCache):
                base.rope_deltas = cache.hawk_slots.rope_deltas
            elif physical_length(cache) == 0:
                base.rope_deltas = None
        yield


def deltas_after(
    model: PreTrainedModel, cache: Cache | None, positions: Tensor | None, mask: Tensor | None, rows: int, length: int
) -> Tensor | None:
    """What the model must add to a text position after this prompt, [B, 1]; None if it never adds anything.

    It is read off the prompt's own positions ([3, B, S], or [4, B, S] with a row of text positions ahead): the next
    token stands one behind the largest. What the model remembers may be of another conversation by now.
    """
    if not hasattr(model.base_model, "rope_deltas"):
        return None
    if positions is None or positions.ndim != 3:
        return torch.zeros((rows, 1), dtype=torch.int64, device=model.device)
    before = 0 if cache is None else int(cache.get_seq_length())
    real = before + length if mask is None else mask.sum(1)
    return (positions[-3:].amax((0, 2)) + 1 - real)[:, None].expand(rows, 1)


class RefuseBackward(torch.autograd.Function):
    """Logits that can be read as always, and that say so when gradients are asked of them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise UnsupportedCallError(
            "gradients were asked of a pruned prefill, which has none: hawk_compile.restore the model to train it"
        )

