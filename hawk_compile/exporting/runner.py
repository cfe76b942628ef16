"""`load`: an exported folder as something that generates, by transformers' own `generate` around the exported graphs.

A skeleton of the model is made from its configuration, without weights; its prefill, its decode step and the modules of
its encoder are then the exported components. What models do between them in Python (positions, packing of tiles) is
their own code, and what surrounds a pruned prefill (lengths, masks, caches) is that of an optimised model.
"""

import inspect
import os
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, Cache, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from hawk_compile.capture import segments
from hawk_compile.capture.features import EXTRA_ROWS
from hawk_compile.capture.modalities import token_kinds
from hawk_compile.errors import InputError, ManifestError, UnsupportedCallError
from hawk_compile.exporting import manifest as manifests
from hawk_compile.exporting.components import (
    DECODE,
    KEY,
    PAST_KEY,
    PAST_VALUE,
    PREFILL,
    VALUE,
)
from hawk_compile.exporting.encoder import unnamed
from hawk_compile.exporting.formats import target_of
from hawk_compile.exporting.manifest import Manifest, Part, TensorSpec, chat_of_manifest, config_of
from hawk_compile.exporting.prefill import named_features
from hawk_compile.exporting.write import HOST_WEIGHTS
from hawk_compile.plan.plan import Plan
from hawk_compile.plan.question import SpecialIds
from hawk_compile.runtime.api import report
from hawk_compile.runtime.conversation import physical_length
from hawk_compile.runtime.overrides import overrides_of
from hawk_compile.runtime.records import Report
from hawk_compile.runtime.state import RUNTIME, Runtime
from hawk_compile.settings.head_weights import HeadWeights

Session = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Runner:
    """An exported model. Its `generate` is called as that of the model it was exported from, by any number of threads.

    Attributes:
        manifest: what was exported, and how.
    """

    def __init__(self, manifest: Manifest, model: PreTrainedModel, runtime: Runtime):
        self.manifest = manifest
        self.model: Any = model
        self.runtime = runtime

    def generate(self, *args: Any, ratio: float | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`: greedy, sampling, beams, streaming, batches.

        Args:
            ratio: fraction of visual tokens removed in this request, in [0, 1); None: that of the manifest.

        Raises:
            ConfigError: a ratio out of range.
            UnsupportedCallError: a call that an exported model does not support, such as another kind of cache.
            InputError: inputs that contradict each other or do not fit the exported components.
        """
        refuse_hidden(kwargs)
        refuse_caches(kwargs)
        if kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = DynamicCache()
        settings = self.runtime.settings
        with self.runtime.asking(settings if ratio is None else replace(settings, ratio=ratio)):
            return self.model.generate(*args, **kwargs)

    def report(self, source: Any = None) -> Report:
        """What the last prefill did, or that of an output or a cache; see `hawk_compile.report`."""
        return report(self.model if source is None else source)


def load(path: str | os.PathLike[str]) -> Runner:
    """Open an exported folder in the runtime that its manifest names.

    Raises:
        ManifestError: no export, or files that are not those that were written.
        ExportError: a package that the format needs is not installed.
    """
    folder = Path(path)
    manifest = manifests.read(folder)
    target = target_of(manifest.format, to_write=False)
    # Compiled packages run where their model was; the other sessions take and give tensors of the host.
    device = torch.device(manifest.device if manifest.format == "aoti" else "cpu")
    model = skeleton(folder, manifest, device)
    sessions = {
        name: checked(part, target.open_session(folder, part.file, part), device)
        for name, part in manifest.parts.items()
    }
    for name in manifest.encoders:
        child = model.base_model.get_submodule(name)
        child.forward = encoder_call(child, sessions[name])  # type: ignore[method-assign]
    weights = HeadWeights(torch.tensor(manifest.head_weights), manifest.head_weights_origin)
    ids = SpecialIds(*(tuple(manifest.ids[name]) for name in ("vision_end", "end_of_turn", "special")))
    decode = decode_call(sessions[DECODE], manifest.parts[DECODE])
    runtime = Runtime(config_of(manifest), weights, ids, {"forward": decode})
    runtime.chat, runtime.chat_known = chat_of_manifest(manifest), True
    runtime.prefill = ExportedPrefill(model, sessions[PREFILL], manifest.parts[PREFILL])  # type: ignore[assignment]
    for name, (owner, method) in overrides_of(model).items():
        owner.__dict__[name] = method
    model.__dict__[RUNTIME] = runtime
    return Runner(manifest, model, runtime)


def skeleton(folder: Path, manifest: Manifest, device: torch.device) -> PreTrainedModel:
    """The model without weights, but for the few parameters that its own code reads on the host."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    dtype = getattr(torch, manifest.dtype)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa", dtype=dtype)
    if type(model).__name__ != manifest.model:
        raise ManifestError(
            f"{folder} was exported from {manifest.model}, but its config.json makes {type(model).__name__}"
        )
    model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    model.generation_config.cache_implementation = None
    model.generation_config.use_cache = True
    model.requires_grad_(False).eval()
    if HOST_WEIGHTS in manifest.files:
        for name, value in load_file(folder / HOST_WEIGHTS).items():
            setattr(model.base_model, name, nn.Parameter(value.to(device), requires_grad=False))
    model.__class__ = type(type(model).__name__, (type(model),), {"device": device})
    return model


def checked(part: Part, session: Session, device: torch.device) -> Session:
    """The session behind a check of its inputs, which says what was expected."""
    expected = {each.name: each for each in part.inputs}

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if inputs.keys() != expected.keys():
            missing, unknown = sorted(expected.keys() - inputs.keys()), sorted(inputs.keys() - expected.keys())
            raise UnsupportedCallError(
                f"{part.name} was exported with the inputs {', '.join(expected)}; this call lacks {missing or 'none'} "
                f"and also gives {unknown or 'none'}: call it as at export, or export again with such a prompt"
            )
        sizes: dict[str, int] = {}
        for name, given in inputs.items():
            wanted = expected[name].shape
            fits = len(wanted) == given.ndim and all(
                size == (one if isinstance(one, int) else sizes.setdefault(one, size))
                for one, size in zip(wanted, given.shape, strict=True)
            )
            if not fits:
                raise InputError(
                    f"{name} of {part.name} must have shape {wanted}, got {list(given.shape)} (sizes: {sizes})"
                )
        for name, least in part.least.items():
            if sizes.get(name, least) < least:
                raise InputError(f"{part.name} was exported for {name} from {least} on, got {sizes[name]}: give more")
        return session(
            {
                name: given.to(device, getattr(torch, expected[name].dtype)).contiguous()
                for name, given in inputs.items()
            }
        )

    return run


def encoder_call(child: nn.Module, session: Session) -> Callable[..., Any]:
    """What stands in for the forward of one of the encoder's modules."""
    signature = inspect.signature(type(child).forward)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = segments.flat(signature.bind(self, *args, **kwargs))
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        return unnamed(session(segments.prepared(child, tensors)))

    return types.MethodType(forward, child)


class ExportedPrefill:
    """Runs the exported prefill where an optimised model would run its compiled one."""

    compilations = 0

    def __init__(self, model: PreTrainedModel, session: Session, part: Part):
        self.model = model
        self.session = session
        self.inputs = {each.name: each for each in part.inputs}

    def run(
        self, forward: Any, inputs: dict[str, Any], past_mask: Tensor | None, plan: Plan, head_weights: Tensor,
        along: tuple[str, ...] = (),
    ) -> tuple[ModelOutput, Tensor, Tensor, Tensor]:
        if past_mask is not None or physical_length(inputs["past_key_values"]):
            raise UnsupportedCallError(
                "new images on a cache that already holds tokens: an exported prefill starts a conversation, so "
                "give the whole conversation at once"
            )
        refuse_hidden(inputs)
        ids = inputs["input_ids"]
        rows, length = ids.shape
        feed: dict[str, Tensor] = {name: inputs[name] for name in ("input_ids", *token_kinds(self.model, inputs))}
        feed["position_ids"] = counted(inputs.get("position_ids"), self.inputs["position_ids"])
        mask = inputs.get("attention_mask")
        feed["attention_mask"] = ids.new_ones((rows, length)) if mask is None else mask
        for modality, output in inputs["mm_encoder_outputs"].items():
            feed |= {name: joined(features) for name, features in named_features(modality, output).items()}
        feed["question_mask"] = plan.question_mask.long()
        feed |= {"budget": plan.budget, "kept_slots": torch.arange(plan.length)}
        if "kept_visual_slots" in self.inputs:
            feed["kept_visual_slots"] = torch.arange(sum(plan.kept))
        found = self.session(feed)
        for layer in range(sum(name.startswith("key_") for name in found)):
            inputs["past_key_values"].update(found[KEY.format(layer)], found[VALUE.format(layer)], layer)
        result = CausalLMOutputWithPast(
            logits=found["logits"].unsqueeze(1),
            past_key_values=inputs["past_key_values"],  # type: ignore[arg-type]
        )
        return result, found["keep"], found["valid"].bool(), found["scores"]


def joined(features: Any) -> Tensor:
    """[V, D] without the extra rows that a captured graph needs."""
    rows = features[0]  # of one tensor [1, V, D] or of a list [[V, D]], as join_features makes them
    return rows[: rows.shape[0] - EXTRA_ROWS]


def counted(positions: Tensor | None, spec: TensorSpec) -> Tensor:
    """Positions as the component counts them: [B, S], or one such row for each of mRoPE's axes.

    Left out is the row of text positions that generate puts ahead of mRoPE's; a single row holds for every axis.

    Raises:
        InputError: there are none.
    """
    if positions is None:
        raise InputError("position_ids are needed where the model is called without generate: give them, [B, S]")
    if len(spec.shape) == 2:
        return positions
    rows = positions.unsqueeze(0) if positions.ndim == 2 else positions
    axes: Any = spec.shape[0]
    return rows[-axes:] if len(rows) >= axes else rows[-1:].expand(axes, -1, -1)


def refuse_hidden(inputs: dict[str, Any]) -> None:
    """Refuse calls for what the exported components do not give or take."""
    for name in ("output_hidden_states", "output_attentions"):
        if inputs.get(name):
            raise UnsupportedCallError(f"{name}=True: an exported model gives logits only; leave it out")
    if inputs.get("inputs_embeds") is not None:
        raise UnsupportedCallError("inputs_embeds: an exported model takes input_ids; give those")


def refuse_caches(kwargs: dict[str, Any]) -> None:
    """Refuse settings of generate, by themselves or in its `generation_config`, that ask for another cache or none."""
    config = kwargs.get("generation_config")
    asked = {name: kwargs.get(name, getattr(config, name, None)) for name in ("use_cache", "cache_implementation")}
    for name, given in asked.items():
        if given is False or isinstance(given, str):
            raise UnsupportedCallError(
                f"{name}={given!r}: an exported model keeps its keys and values in a plain DynamicCache(); leave it out"
            )


def decode_call(session: Session, part: Part) -> Callable[..., ModelOutput]:
    """The model's forward behind (or without) a cache: text only."""
    empty = {each.name: each for each in part.inputs if each.name.startswith("past_")}
    where = next(each for each in part.inputs if each.name == "position_ids")

    def forward(
        input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, **kwargs: Any,
    ) -> ModelOutput:  # fmt: skip
        refuse_hidden({"input_ids": input_ids, **kwargs})
        assert input_ids is not None  # tokens_of has seen to it that one of the two is given
        cache = DynamicCache() if past_key_values is None else past_key_values
        if any(type(layer) is not DynamicLayer for layer in cache.layers):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers}))
            raise UnsupportedCallError(
                f"an exported model keeps its keys and values in a plain DynamicCache(), got {kinds}"
            )
        positions = counted(position_ids, where)
        rows, new = input_ids.shape
        asked = kwargs.get("logits_to_keep")
        if new > 1 and (isinstance(asked, Tensor) or asked != 1):
            raise UnsupportedCallError(
                f"an exported model gives the logits of the last position alone, and logits_to_keep={asked} was asked "
                f"of {new}: give logits_to_keep=1, and leave out assisted decoding"
            )
        past = physical_length(cache)
        feed: dict[str, Tensor] = {"input_ids": input_ids, "position_ids": positions}
        feed["attention_mask"] = input_ids.new_ones((rows, past + new)) if attention_mask is None else attention_mask
        for layer in range(len(empty) // 2):
            for name, attribute in ((PAST_KEY.format(layer), "keys"), (PAST_VALUE.format(layer), "values")):
                spec = empty[name]
                shape = (rows, spec.shape[1], 0, spec.shape[3])
                dtype = getattr(torch, spec.dtype)
                feed[name] = getattr(cache.layers[layer], attribute) if past else torch.zeros(shape, dtype=dtype)  # type: ignore[arg-type]
        found = session(feed)
        for layer in range(len(empty) // 2):
            keys, values = found[KEY.format(layer)], found[VALUE.format(layer)]
            if past:
                cache.layers[layer].keys, cache.layers[layer].values = keys, values  # type: ignore[union-attr]
            else:
                cache.update(keys, values, layer)
        return CausalLMOutputWithPast(logits=found["logits"].unsqueeze(1), past_key_values=cache)  # type: ignore[arg-type]

    return forward
