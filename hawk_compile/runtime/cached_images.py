"""Images and videos on their way through an encoder, past those that are kept from earlier calls (`image_cache`).

What an encoding is known by:

    the encoder        modules, attributes, hooks, configurations and code (`encoder_state.py`)
    its numbers        sums of the bits of its tensors (`encoder_numbers.py`)
    how it computes    dtypes, autocast, precision switches, threads, compiled or not
    its arguments      SHA-256 of pixels and grids, their dtypes, shapes and devices; plain values

Each image of a call is encoded by itself, so that what is kept of it is, bit for bit, what it would be encoded to
again, whatever stands beside it. Images that an encoder takes with more than a grid are kept as a whole call.
"""

import hashlib
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationMixin, PreTrainedModel

from hawk_compile.capture.encoder_numbers import TENSORS, NotKept, bytes_of, randomness, switches
from hawk_compile.capture.encoder_state import Structure
from hawk_compile.capture.image_cache import ImageCache
from hawk_compile.capture.modalities import MERGED_BY_NAME, raw_inputs, raw_modalities
from hawk_compile.capture.one_by_one import alike, apart, merged_alone, together
from hawk_compile.compat.models import PREPARE_ENCODERS
from hawk_compile.compat.modes import global_hooks, has_values
from hawk_compile.runtime.originals import original
from hawk_compile.runtime.state import RUNTIME
from hawk_compile.runtime.surroundings import tracer_around, watchers_around

Arguments = dict[str, Any]
Encode = Callable[[Arguments], Arguments]
ENCODED = "mm_encoder_outputs"
EAGER = "eager"
SAYS = {getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "requires_grad", "is_cuda", "layout")}
"""What says something about a tensor, and nothing of its numbers."""


def encode(model: PreTrainedModel, images: ImageCache | None, arguments: Arguments) -> Arguments:
    """The arguments of a call with images and videos encoded, by the model's own encoder, compiled if the settings ask
    for that and no mode is to see each of its operators; past what is kept."""
    runtime: Any = model.__dict__.get(RUNTIME)
    run = eager = original(model, PREPARE_ENCODERS)
    how = EAGER
    if runtime is not None and runtime.config.compile_vision and not watchers_around().any:
        run, how = runtime.vision.method(model, eager), f"compiled by {runtime.config.backend}"
    if images is None:
        return run(arguments)
    arguments, outputs = dict(arguments), dict(arguments.get(ENCODED) or {})
    for modality in sorted(raw_modalities(model, arguments) & {*MERGED_BY_NAME}):
        taken = taken_by_encoder(model, modality, arguments)
        if taken and outputs.get(modality) is None:
            outputs[modality] = Encoding(model, images, modality, run, eager, how).of(taken)
            for name in pixels_in(model, modality, taken):
                del arguments[name]
    return run({**arguments, ENCODED: outputs})


def taken_by_encoder(model: PreTrainedModel, modality: str, arguments: Arguments) -> Arguments:
    """What generate would give to the encoder of a modality; nothing where it calls none, or where what it takes is
    another's too."""
    if getattr(type(model), PREPARE_ENCODERS) is not getattr(GenerationMixin, PREPARE_ENCODERS):
        return {}
    method = getattr(model.base_model, f"get_{modality}_features", None)
    if method is None or modality not in model.input_modalities:
        return {}
    named = {*inspect.signature(method).parameters} - {"kwargs"}
    taken = {name: value for name, value in arguments.items() if name in named}
    others = {name for other, names in raw_inputs(model).items() if other != modality for name in names}
    return {} if pixels_in(model, modality, taken) & others else taken


def pixels_in(model: PreTrainedModel, modality: str, taken: Arguments) -> set[str]:
    return {*taken} & {*raw_inputs(model)[modality]}


class Encoding:
    """One modality of one call.

    Attributes:
        run: what encodes. eager: the same uncompiled.
        how: what tells `run` from others of this model.
    """

    def __init__(
        self, model: PreTrainedModel, images: ImageCache, modality: str, run: Encode, eager: Encode, how: str
    ) -> None:
        self.model, self.images, self.modality = model, images, modality
        self.run, self.eager, self.how = run, eager, how
        self.done: dict[bytes, Any] = {}
        """What this call has encoded: it may hold an image more than once."""

    def of(self, taken: Arguments) -> Any:
        """The encoder's output for the images of a call."""
        try:
            refuse_watched(taken)
            self.look()
        except NotKept as reason:
            self.images.pass_over(1, str(reason))
            return self.encoded(self.run, taken)
        parts = apart(taken)
        if len(parts) == 1 or self.structure.alone.get(self.modality) is False:
            return self.one(taken)
        output = together([self.one(part) for part in parts])
        if output is not None and self.modality in self.structure.alone:
            return output
        whole = self.encoded(self.run, taken)
        self.structure.alone[self.modality] = output is not None and alike(output, merged_alone(whole))
        return output if self.structure.alone[self.modality] else whole

    def look(self) -> None:
        """See what the encoder is now.

        Raises:
            NotKept: nothing that it encodes can be kept.
        """
        self.number, self.structure = self.images.structure_of(self.model)
        self.refuse(self.structure)
        self.before = self.state()

    def one(self, taken: Arguments) -> Any:
        """The output for what is kept by itself, kept or encoded now."""
        try:
            digest = digest_of(taken)
        except NotKept as reason:
            self.images.pass_over(1, str(reason))
            return self.encoded(self.run, taken)
        if digest in self.done:
            self.images.count_hit()
            return self.done[digest]
        output = self.images.get(self.key(digest))
        if output is None:
            output = self.encoded_and_kept(digest, taken)
        self.done[digest] = output
        return output

    def key(self, digest: bytes) -> Hashable:
        return (self.number, *self.before, self.how, self.modality, digest)

    def encoded_and_kept(self, digest: bytes, taken: Arguments) -> Any:
        drawn, new = randomness(self.model.device), self.modality not in self.structure.checked
        output = merged_alone(self.encoded_seen(taken))
        try:
            if randomness(self.model.device) != drawn:
                raise NotKept("random numbers were drawn while it was encoded")
            if new and not self.structure.holds(self.model):  # models put on hooks that record, at their first call
                self.look()
                output = merged_alone(self.encoded_seen(taken))
            if self.structure.refusal:
                raise NotKept(self.structure.refusal)
            if not self.structure.holds(self.model) or self.state() != self.before:
                raise NotKept("its encoder was changed while it ran")
            self.images.put(self.key(digest), output)
        except NotKept as reason:
            self.images.pass_over(1, str(reason))
        return output

    def encoded(self, run: Encode, taken: Arguments) -> Any:
        return run({**taken, ENCODED: {}})[ENCODED][self.modality]

    def state(self) -> tuple[Any, ...]:
        """What decides how the encoder computes, beside its structure."""
        return (self.structure.numbers(), self.model.base_model.dtype, *switches(self.model.device))

    def refuse(self, structure: Structure) -> None:
        """Raises NotKept where nothing that is encoded now can be kept."""
        if structure.refusal:
            raise NotKept(structure.refusal)
        if (self.model.tp_size or 1) > 1:
            raise NotKept("its encoder is shared between processes (tp_plan)")
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in structure.tensors()):
            raise NotKept("gradients are wanted of it: call inside torch.no_grad()")

    def encoded_seen(self, taken: Arguments) -> Any:
        """An output. Once for each encoder and modality it is seen whether weights of others are read for it, such as
        the decoder's embeddings, which are not looked at."""
        if self.modality in self.structure.checked:
            return self.encoded(self.run, taken)
        with Reading({id(tensor) for tensor in self.structure.tensors()}) as reading:
            output = self.encoded(self.eager, taken)
        if reading.others:
            self.structure.refusal = "it reads weights that are not its encoder's"
        self.structure.checked.add(self.modality)
        return output if self.how == EAGER else self.encoded(self.run, taken)


class Reading(TorchFunctionMode):
    """Sees which weights are read inside.

    Attributes:
        others: whether there was one that is not among the known.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.others = known, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in SAYS:
            self.look_at([*args, *(kwargs or {}).values()])
        return func(*args, **(kwargs or {}))

    def look_at(self, values: Any) -> None:
        for value in values:
            if isinstance(value, (list, tuple)):
                self.look_at(value)
            elif isinstance(value, nn.Parameter) and id(value) not in self.known:
                self.others = True


def refuse_watched(taken: Arguments) -> None:
    """Raises NotKept where something watches, or records, what runs."""
    tensors = [value for value in taken.values() if isinstance(value, Tensor)]
    if not tensors or any(map(tracer_around, tensors)) or not all(map(has_values, tensors)):
        raise NotKept("what it is given has no numbers to be known by")
    if watchers_around().any or global_hooks():
        raise NotKept("a mode or a hook sees each operator, or module, that runs")
    if torch.is_grad_enabled() and any(value.requires_grad for value in tensors):
        raise NotKept("gradients are wanted of it: call inside torch.no_grad()")
    if any(value.is_cuda for value in tensors) and torch.cuda.is_current_stream_capturing():
        raise NotKept("a CUDA graph is captured")


def digest_of(taken: Arguments) -> bytes:
    """A hash of arguments.

    Raises:
        NotKept: one of a kind whose numbers cannot be read.
    """
    digest = hashlib.sha256()
    waiting: list[Any] = [*sorted(taken.items())]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if type(value) not in TENSORS or value.layout != torch.strided:
                raise NotKept(f"it is given a {type(value).__name__}")
            digest.update(repr((value.dtype, value.shape, value.stride(), value.device)).encode())
            digest.update(bytes_of(value))
        elif type(value) in (list, tuple):
            digest.update(f"{type(value).__name__} {len(value)} ".encode())
            waiting += value
        elif value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
            digest.update(f"{value!r} ".encode())
        else:
            raise NotKept(f"it is given a {type(value).__name__}")
    return digest.digest()
