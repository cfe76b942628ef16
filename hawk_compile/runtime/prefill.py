"""One pruned prefill: encode, plan, run the compiled graph, hand keys and values to the caller's cache."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticLayer
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput

from hawk_compile.capture.diagnosis import diagnosed
from hawk_compile.capture.dynamo import capture_lock, capture_settings, compile_alone
from hawk_compile.capture.encode import run_encoders
from hawk_compile.capture.features import feature_count, image_sizes, join_features
from hawk_compile.capture.modalities import (
    known_ids,
    modalities_of,
    placeholder_ids,
    placeholders_by_modality,
    raw_modalities,
    tokens_of,
)
from hawk_compile.capture.patches import install_recorders
from hawk_compile.capture.prefill import planned_forward
from hawk_compile.compile.backend import compile_graph, options_of
from hawk_compile.errors import InputError, UnsupportedCallError
from hawk_compile.kernels.plan.op import slots
from hawk_compile.passes.insert_scoring import Ranks
from hawk_compile.plan.plan import Plan, make_plan
from hawk_compile.plan.question import is_any
from hawk_compile.runtime.conversation import PrunedCache, mark_pruned, physical_length, physical_mask
from hawk_compile.runtime.positions import deltas_after, deltas_of
from hawk_compile.runtime.records import PrefillRecord
from hawk_compile.runtime.refusals import refuse_quotas_of_audio, refuse_two_kinds_of_layer_features, refuse_unsupported
from hawk_compile.settings.budgets import quotas
from hawk_compile.settings.config import HawkConfig

if TYPE_CHECKING:
    from hawk_compile.runtime.forward import Runtime

PROMPT_LENGTH = "hawk_prompt_length"
"""An argument that generate carries where it has no cache: what stands behind that length was generated: no voters."""


class CompiledPrefill:
    """A model's prefill, compiled on its first call. Ratio and head weights are inputs of it, not part of it."""

    def __init__(self, config: HawkConfig, ranks: Ranks | None = None):
        self.config = config
        self.options = options_of(config, ranks=ranks)
        self.compilations = 0
        self.function = compile_alone(planned_forward, backend=self.compile, fullgraph=True)

    def compile(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.compilations += 1
        return compile_graph(gm, example_inputs, self.config, self.options)

    def run(
        self,
        forward: Callable[..., Any],
        inputs: dict[str, Any],
        past_mask: Tensor | None,
        plan: Plan,
        head_weights: Tensor,
    ) -> tuple[ModelOutput, Tensor, Tensor, Tensor]:
        """(model output, keep [B, S'], valid [B, S'], scores [B, S]); fills the cache among the inputs."""
        device = head_weights.device
        image, floor = (None, None) if plan.quotas is None else (plan.quotas.image, plan.quotas.floor)
        planned = (
            plan.votes, plan.budget, head_weights, *slots(plan.length, sum(plan.kept), device), plan.candidates,
            plan.least, image, floor,
        )  # fmt: skip
        with capture_lock, capture_settings():
            return self.function(forward, inputs, past_mask, tuple(planned))


def run_prefill(model: PreTrainedModel, runtime: "Runtime", forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """Encode, plan, run the pruned graph, and hand its keys and values to the caller's cache."""
    refuse_unsupported(model, kwargs)
    asked = tokens_of(kwargs).requires_grad or any(parameter.requires_grad for parameter in model.parameters())
    grad = torch.is_grad_enabled() and asked
    frames = kwargs.get("video_grid_thw")
    with torch.no_grad():
        if raw_modalities(kwargs):
            with deltas_of(model, kwargs.get("past_key_values")):
                kwargs = run_encoders(model, kwargs)
        if kwargs.get("output_hidden_states"):
            install_recorders(model.base_model.get_decoder())  # type: ignore[operator]
        kwargs = {name: given for name, given in kwargs.items() if name != "mm_token_type_ids"}
        # Frames are counted on the host, so only where something is said of them.
        sizes = image_sizes(kwargs["mm_encoder_outputs"], frames) if runtime.config.per_image else {}
        outputs = join_features(kwargs.pop("mm_encoder_outputs"))
        refuse_two_kinds_of_layer_features(outputs)
        tokens = tokens_of(kwargs)
        rows, length = tokens.shape[:2]
        target = kwargs.pop("past_key_values", None)
        use_cache, return_dict = kwargs.pop("use_cache", None), kwargs.pop("return_dict", None)
        past = physical_length(target)
        whole_mask = kwargs.pop("attention_mask", None)
        mask, past_mask = split_mask(target, whole_mask, past, length)
        deltas = deltas_after(model, target, kwargs.get("position_ids"), whole_mask, rows, length)
        plan, left = plan_of(model, runtime, kwargs, outputs, sizes, mask)
        needs_mask = plan.padded or plan.filled or past_mask is not None
        if not needs_mask:
            mask = None
        elif mask is None:
            mask = torch.ones((rows, length), dtype=torch.long, device=tokens.device)
        scratch = scratch_cache(target)
        inputs = {name: given for name, given in kwargs.items() if given is not None}
        inputs |= {"mm_encoder_outputs": outputs, "attention_mask": mask, "past_key_values": scratch, "use_cache": True}
        inputs = dict(sorted(inputs.items()))  # the graph is guarded by their order
        weights = runtime.weights(tokens.device)
        with diagnosed(model):
            result, keep, valid, scores = runtime.prefill.run(forward, inputs, past_mask, plan, weights)
        runtime.static_length = shrink(target, length - keep.shape[1], runtime.static_length)
        target = fill_cache(model, target, scratch, past, use_cache)
        if target is not None:
            mark_pruned(target, keep, valid if plan.filled else None, past, length, deltas)
    runtime.note(PrefillRecord(
        plan.visual, plan.text, keep, valid, scores, rule_of(runtime.config, left), plan.source,
        runtime.head_weights.origin, length))
    if "past_key_values" in result:
        result["past_key_values"] = target
    if grad:
        refuse_gradients(result)
    return result if return_dict in (None, True) else result.to_tuple()


def plan_of(
    model: PreTrainedModel, runtime: "Runtime", kwargs: dict[str, Any], outputs: dict[str, ModelOutput],
    sizes: dict[str, list[int]], mask: Tensor | None,
) -> tuple[Plan, list[str]]:  # fmt: skip
    """The plan of a call, and the modalities in it that stay whole; takes what is for the plan alone out of `kwargs`.

    Args:
        outputs: of the encoders, joined.
        sizes: modality -> tokens of each image or frame.
        mask: [B, S], nonzero for real tokens; None if all are.
    """
    config, tokens = runtime.config, tokens_of(kwargs)
    placeholders = placeholder_ids(model)
    ids = kwargs.get("input_ids")
    if ids is None:
        ids = known_ids(model, tokens, [*runtime.ids.special, *placeholders])
    present = modalities_of({**kwargs, "mm_encoder_outputs": outputs})
    left = sorted(present - set(config.modalities))
    candidates = is_any(ids, tuple(placeholder_ids(model, config.modalities))) if left else None
    images = None
    if config.per_image:
        refuse_quotas_of_audio(present & set(config.modalities))
        asked_for = {each: sizes[each] for each in sizes if each in config.modalities}
        images = quotas(ids, placeholders_by_modality(model), asked_for, config)
    plan = make_plan(
        ids, is_any(ids, tuple(placeholders)), mask, feature_count(model, kwargs, outputs), runtime.ids, config,
        kwargs.pop(PROMPT_LENGTH, None), images, candidates,
    )  # fmt: skip
    return plan, left


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


def fill_cache(
    model: PreTrainedModel, target: Cache | None, scratch: DynamicCache, past: int, use_cache: bool | None
) -> Cache | None:
    """The caller's cache with the new keys and values; a new one if the model would make one.

    A plain cache takes the scratch cache's tensors as they are, any other copies them by its own `update`.
    """
    config = model.config.get_text_config()
    if target is None:
        if use_cache is False or (use_cache is None and not getattr(config, "use_cache", True)):
            return None
        target = DynamicCache(config=config)
    if is_plain(target) and len(target.layers) in (0, len(scratch.layers)):
        target.layers = scratch.layers
        return target
    for index, layer in enumerate(scratch.layers):
        keys, values = layer.keys, layer.values  # type: ignore[union-attr]
        assert keys is not None and values is not None
        target.update(keys[:, :, past:], values[:, :, past:], index)
    return target


def is_plain(cache: Cache) -> bool:
    """Whether a cache does no more than hold the keys and values of all tokens, layer by layer."""
    kinds: set[Any] = {type(layer) for layer in cache.layers} or {cache.layer_class_to_replicate}
    return kinds == {DynamicLayer} and type(cache).update is Cache.update and not cache.offloading


def shrink(cache: Cache | None, removed: int, least: int) -> int:
    """Let a cache of fixed size that generate made, which holds nothing yet, do without what was removed.

    Args:
        least: slots that it has at least, so that a cache of the next call is not of another size without need.

    Returns:
        The slots of its layers without a sliding window; `least` where there is no such cache.
    """
    asked = getattr(cache, "hawk_asked_length", None)
    if asked is None or physical_length(cache):
        return least
    length = max(asked - removed, least)
    for layer in cache.layers:  # type: ignore[union-attr]
        if isinstance(layer, StaticLayer):
            layer.hawk_asked_length = layer.max_cache_len  # type: ignore[attr-defined]
            layer.max_cache_len = min(layer.max_cache_len, length)
    del cache.hawk_asked_length  # type: ignore[union-attr]
    return length


def rule_of(config: HawkConfig, left: list[str]) -> str:
    """What says how much is removed; `left` are modalities that stay whole."""
    more = []
    if config.budget is not None:
        more.append(f"budget={config.budget}")
    if config.per_image:
        more += [f"min_per_image={config.min_per_image}", f'quota="{config.quota}"']
    if left:
        more.append(f"{' and '.join(left)} not among modalities={config.modalities}")
    return f"ratio={config.ratio:g}" + (f" with {', '.join(more)}" if more else "")


def refuse_gradients(result: ModelOutput) -> None:
    """Let logits and hidden states say why they have no gradients when these are asked for."""
    def refusing(value: Tensor) -> Tensor:
        return RefuseBackward.apply(value.detach().requires_grad_())

    result["logits"] = refusing(result["logits"])
    if "hidden_states" in result:
        result["hidden_states"] = tuple(refusing(each) for each in result["hidden_states"])


class RefuseBackward(torch.autograd.Function):
    """Values that can be read as always, and that say so when gradients are asked of them."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise UnsupportedCallError(
            "gradients were asked of a pruned prefill, which has none: hawk_compile.restore the model to train it"
        )
