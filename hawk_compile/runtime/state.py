"""What an optimised model carries: its settings, what was compiled for it, and its last report."""

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from hawk_compile.capture.image_cache import ImageCache
from hawk_compile.capture.vision import CompiledVision
from hawk_compile.compat.models import device_mesh_of
from hawk_compile.passes.insert_scoring import Ranks
from hawk_compile.plan.chat import Chat
from hawk_compile.plan.ids import SpecialIds
from hawk_compile.plan.template import chat_of_settings
from hawk_compile.runtime.compiled import CompiledPrefill, CompiledStep
from hawk_compile.runtime.conversation import note
from hawk_compile.runtime.generation import running
from hawk_compile.runtime.recognised import MOST, MovedKeys
from hawk_compile.runtime.records import PrefillRecord
from hawk_compile.settings.checkpoint import checkpoint_of
from hawk_compile.settings.config import HawkConfig
from hawk_compile.settings.head_weights import HeadWeights

RUNTIME = "_hawk_runtime"
"""The attribute of an optimised model that holds its `Runtime`."""
PART = "_hawk_part"
"""The attribute of a model that holds the name of the part that was optimised in its place."""

REDUCE = "__reduce_ex__"
"""The attribute of a model by which pickle and copy take it apart."""

put_aside: "weakref.WeakKeyDictionary[PreTrainedModel, Runtime]" = weakref.WeakKeyDictionary()
"""The runtimes of models that are not optimised any more."""


def holder(model: Any) -> Any:
    """What holds the settings of an optimised model: the model itself, or the part that was optimised in its place."""
    part = model.__dict__.get(PART)
    return model if part is None else getattr(model, part)


class Runtime:
    """What an optimised model carries.

    Attributes:
        originals: name of an attribute that is shadowed -> what lay there before; none where it was the class's.
        chat: what surrounds a user's text, once that is learned (`chat_known`).
        last: what the model's last prefill did, whichever thread ran it.
        images: encoded images that are kept; None where none are.
        moved: what the last pruned prefills left, to recognise their keys by.
        hook: the hook of accelerate's on the model that was last looked at; None where it had none.
        hooks_seen: how many hooks the process had put anywhere when this model's were last looked at.
        device: where inputs of the decoder belong, if hooks place the model; None elsewhere.
        scratch_layers: empty layers of the cache that a prefill fills, where a plain one will not do; None until asked.
    """

    def __init__(
        self, config: HawkConfig, head_weights: HeadWeights, ids: SpecialIds, originals: dict[str, Any],
        ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self.settings = config
        self.asked: ContextVar[HawkConfig | None] = ContextVar("hawk_asked", default=None)
        self.head_weights = head_weights
        self.ids = ids
        self.originals = originals
        self.chat = Chat()
        self.chat_known = False
        self.learning = threading.Lock()
        self.last: PrefillRecord | None = None
        self.ranks = ranks
        self.prefill = CompiledPrefill(config, ranks)
        self.vision = CompiledVision(config.backend)
        self.images = None if config.image_cache_bytes is None else ImageCache(config.image_cache_bytes)
        self.compiled_steps: dict[str, CompiledStep] = {}
        self.static_length = 0
        self.scratch_layers: tuple[Any, ...] | None = None
        self.weights_on: dict[torch.device, Tensor] = {}
        self.moved: deque[MovedKeys] = deque(maxlen=MOST)
        self.hook: Any = None
        self.hooks_seen = -1
        self.device: torch.device | None = None

    @property
    def config(self) -> HawkConfig:
        """The settings of this call: the model's, unless the call has its own."""
        return self.asked.get() or self.settings

    @contextlib.contextmanager
    def asking(self, config: HawkConfig) -> Iterator[None]:
        """Let the calls of this thread inside have settings of their own; they may not change what was compiled."""
        before = self.asked.get()
        try:
            self.asked.set(config)
            yield
        finally:
            self.asked.set(before)

    def take_compiled(self, earlier: "Runtime") -> None:
        """Go on with what was compiled under earlier settings, where the new ones do not change it."""
        asked = (self.config.processor, self.ids.end_of_turn, self.config.end_of_turn_token_id)
        if asked == (earlier.config.processor, earlier.ids.end_of_turn, earlier.config.end_of_turn_token_id):
            self.chat, self.chat_known = earlier.chat, earlier.chat_known
        self.moved = earlier.moved
        if earlier.images is not None and earlier.images.limit == self.config.image_cache_bytes:
            self.images = earlier.images
        if earlier.config.backend == self.config.backend:
            self.compiled_steps = earlier.compiled_steps
            self.static_length = earlier.static_length
            self.vision = earlier.vision
            if earlier.prefill.options == self.prefill.options:
                self.prefill = earlier.prefill

    def compile_anew(self) -> None:
        """Let go of what was compiled, of code that has been replaced."""
        self.prefill = CompiledPrefill(self.prefill.config, self.ranks)
        self.vision = CompiledVision(self.settings.backend)
        self.compiled_steps = {}

    def put_aside(self, model: PreTrainedModel) -> None:
        """Keep what was compiled, as long as the model lives, for the next time that it is optimised.

        What refers to the model goes, and what its encoder has made of images: it would keep the model alive.
        """
        self.originals, self.compiled_steps, self.last, self.images = {}, {}, None, None
        self.prefill.saved = None
        put_aside[model] = self

    def note(self, record: PrefillRecord, result: Any, cache: Cache | None = None) -> Cache | None:
        """Leave a record where a report of it may be asked for: the model, the call's output and its cache.

        Args:
            result: the output of the prefill: a ModelOutput, or the same as a tuple.
            cache: the caller's cache, if it gave one.

        Returns:
            The cache that was filled; None if there is none.
        """
        if self.images is not None:
            record = replace(record, image_cache=self.images.use())
        self.last = record
        generation = running.get()
        if generation is not None and generation.record is None:
            generation.record = record
        if isinstance(result, ModelOutput):
            result.hawk_record = record  # type: ignore[attr-defined]
        filled = cache if cache is not None else cache_in(result)
        if filled is not None:
            note(filled, record=record)
        return filled

    def remember(self, moved: MovedKeys | None) -> None:
        if moved is not None:
            self.moved.append(moved)

    def learn_chat(self, model: PreTrainedModel) -> Chat:
        """What the chat template puts around a user's text: learned once, when there is a prompt to prune.

        Raises:
            ConfigError: nothing can be learned from the processor that the settings name.
        """
        if self.chat_known:
            return self.chat
        with self.learning:
            if not self.chat_known:
                self.chat = chat_of_settings(self.settings, checkpoint_of(model), self.ids.end_of_turn)
                self.chat_known = self.chat.lasting
            return self.chat

    @property
    def compilations(self) -> int:
        """How often the prefill was compiled."""
        return self.prefill.compilations

    def step(self, forward: Callable[..., Any], options: dict[str, Any]) -> CompiledStep:
        """The decode step compiled by these options of torch.compile."""
        key = str(options)
        known = self.compiled_steps.get(key)
        # setdefault: of two threads that come first, one has made what both use.
        return known or self.compiled_steps.setdefault(key, CompiledStep(forward, options))

    def weights(self, device: torch.device) -> Tensor:
        """The head weights [H] float32 on a device: an input of the graph."""
        if device not in self.weights_on:
            values = self.head_weights.values.to(device, copy=True)
            self.weights_on.setdefault(device, values)
        return self.weights_on[device]


def cache_in(output: Any) -> Cache | None:
    """The cache among the values of an output, or of those within it."""
    values = list(output.values()) if isinstance(output, ModelOutput) else output
    caches = (each if isinstance(each, Cache) else cache_in(each) for each in values
              if isinstance(each, (Cache, ModelOutput)))  # fmt: skip
    return next((cache for cache in caches if cache is not None), None)


def ranks_of(model: PreTrainedModel) -> Ranks | None:
    """This process among those that transformers shares a model's heads between (`tp_plan`); None if there are none."""
    if (model.tp_size or 1) == 1:
        return None
    mesh: Any = device_mesh_of(model)
    mesh = mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh
    return Ranks(mesh.get_group().group_name, mesh.get_local_rank(), mesh.size())
