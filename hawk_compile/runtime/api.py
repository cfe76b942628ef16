"""`optimize`, `restore`, `pruned` and `report`: the calls that most users need."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from hawk_compile.capture.attention import answered_for_captures
from hawk_compile.capture.operators import end_operators
from hawk_compile.capture.patches import recorded_by_thread
from hawk_compile.errors import HawkError, UnsupportedModelError
from hawk_compile.plan.ids import special_ids
from hawk_compile.runtime.blocks import block_of
from hawk_compile.runtime.checks import check_model, check_vision
from hawk_compile.runtime.conversation import conversation_of, physical_length
from hawk_compile.runtime.packed import refuse_quantised
from hawk_compile.runtime.records import PrefillRecord, Report
from hawk_compile.runtime.shadowing import install, replaced_overrides, uninstall
from hawk_compile.runtime.split import check_split
from hawk_compile.runtime.state import PART, RUNTIME, Runtime, holder, put_aside, ranks_of
from hawk_compile.runtime.travelling import begun, let_stay, let_travel
from hawk_compile.runtime.wholes import hold, let_go, whole_part
from hawk_compile.runtime.wrappers import is_wrapper, model_to_prune, optimised_in, optimised_model
from hawk_compile.settings.config import MODALITIES, HawkConfig, make_config
from hawk_compile.settings.head_weights import resolve

Model = TypeVar("Model", bound=nn.Module)


def optimize(model: Model, config: HawkConfig | None = None, **settings: Any) -> Model:
    """Let a vision-language model prune visual tokens in every prefill, inside its compiled graph.

    Args:
        model: a Hugging Face model that takes images, video or audio; or a module that holds exactly one such model
            (PEFT's, DistributedDataParallel, torch.compile's, one's own), which is then the one that is optimised. It
            is changed in place and returned: same object, same class.
        config: the settings, or
        **settings: the settings by name; see `HawkConfig`. `ratio` is the fraction of visual tokens removed.

    Returns:
        The model. Its `generate` and `forward` are called as before; ids keep their full length. A model that is
        optimised already gets the new settings.

    Raises:
        ConfigError: a setting out of its range.
        HeadWeightsError: head weights that do not fit the model.
        UnsupportedModelError: a model that cannot be pruned. The model is left as it was.
    """
    made = make_config(config, settings)
    if is_wrapper(model):
        optimize(model_to_prune(model), made)
    elif (inner := whole_part(model)) is not None:
        optimize(inner[1], made)
        hold(model, inner[0])  # type: ignore[arg-type]  # no wrapper, so a PreTrainedModel
        let_travel(model)  # type: ignore[arg-type]
    else:
        optimize_itself(model, made)
    return model


def optimize_itself(model: Any, made: HawkConfig) -> None:
    check_model(model, made.modalities)
    check_vision(model, made)
    check_split(model, made)
    refuse_quantised(model)
    weights = resolve(made.used_head_weights, model)
    ids = special_ids(model, made)
    earlier = model.__dict__.get(RUNTIME)
    originals, replaced = install(model, {} if earlier is None else earlier.originals)
    try:
        runtime = Runtime(made, weights, ids, originals, ranks_of(model))
        for compiled in (put_aside.pop(model, None), earlier):
            if compiled is not None:
                runtime.take_compiled(compiled)
        model.__dict__[RUNTIME] = begun(model, runtime)
        let_travel(model)
    except BaseException:
        if earlier is None:  # or else the model goes on as it was
            uninstall(model, originals)
        raise
    if replaced:
        warnings.warn(
            f"others have replaced {' and '.join(replaced)} of the model after optimize"
            f"{', so nothing was pruned since' if 'forward' in replaced else ''}; they are overridden again now",
            stacklevel=3,
        )


def restore(model: Model) -> Model:
    """Undo `optimize`: the model is exactly what it was. A model that was never optimised is returned as it is.

    It refuses to go on with the cache of a conversation that was pruned (`UnsupportedCallError`).
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"model must be a model that optimize takes, got {type(model).__name__}: give the one to restore"
        )
    if is_wrapper(model):
        for inner in optimised_in(model):
            restore(inner)
        return model
    restore_itself(model)
    return model


def restore_itself(model: Any) -> None:
    let_stay(model)
    if (part := let_go(model)) is not None:
        restore(part)
        return
    runtime = model.__dict__.pop(RUNTIME, None)
    if runtime is not None:
        uninstall(model, runtime.originals)
        runtime.put_aside(model)
        recorded_by_thread.end(runtime)
        end_operators(runtime)
        answered_for_captures.end(runtime)


@contextlib.contextmanager
def pruned(model: Model, config: HawkConfig | None = None, **settings: Any) -> Iterator[Model]:
    """A model that prunes inside a `with` block and is outside exactly what it was, optimised by other settings or not.

    Args:
        model, config, **settings: as for `optimize`, which also says what is raised.

    Raises:
        UnsupportedCallError: another thread or task is inside such a block with this model, and each would prune by the
            other's settings.
    """
    with pruned_itself(model_to_prune(model) if is_wrapper(model) else model, config, settings):
        yield model


@contextlib.contextmanager
def pruned_itself(model: Any, config: HawkConfig | None, settings: dict[str, Any]) -> Iterator[None]:
    if (inner := whole_part(model)) is not None:
        before = model.__dict__.get(PART)
        with pruned(inner[1], config, **settings):
            hold(model, inner[0])
            let_travel(model)
            try:
                yield
            finally:
                if before is None:
                    let_stay(model)
                    let_go(model)
        return
    check_model(model, MODALITIES)
    with block_of(model):
        optimize(model, config, **settings)
        yield


def report(source: Any) -> Report:
    """What a prefill did.

    Args:
        source: an optimised model, or what holds one: its last prefill, whichever thread ran it. An output of its
            forward or of generate (`return_dict_in_generate=True`), or a cache: the last prefill of that very
            conversation.

    Raises:
        HawkError: the model is not optimised, has run no prefill yet, or others have replaced its forward since; an
            output or a cache that no prefill of an optimised model made.
    """
    if isinstance(source, nn.Module):
        return last_of(source).report()
    record = record_of(source)
    if record is None:
        raise HawkError(
            "report takes an optimised model, or an output or a cache that a prefill of one has filled, got a "
            f"{type(source).__name__} that none has: give the model, or what its forward or its generate "
            "(return_dict_in_generate=True) returned"
        )
    return record.report()


def last_of(model: nn.Module) -> PrefillRecord:
    model = holder(optimised_model(model) if is_wrapper(model) else model)
    runtime = model.__dict__.get(RUNTIME)
    if runtime is None or not isinstance(model, PreTrainedModel):
        raise HawkError(
            "report needs an optimised model: call hawk_compile.optimize first; of a prefill in a `pruned` block, ask "
            "inside the block, or ask the output"
        )
    replaced = replaced_overrides(model)
    if "forward" in replaced:
        there = model.__dict__.get("forward", type(model).forward)
        name = getattr(there, "__qualname__", repr(there))
        raise HawkError(
            f"the model's forward was replaced by {name} after optimize; nothing is pruned: call optimize again"
        )
    if replaced:
        raise HawkError(
            f"others have replaced {' and '.join(replaced)} of the model after optimize, which pruning in generate "
            "needs: call optimize again"
        )
    if runtime.last is None:
        raise HawkError(
            "the model has run no prefill by these settings yet: call generate or forward first; of a prefill in a "
            "`pruned` block, ask inside the block, or ask the output"
        )
    return runtime.last


def record_of(source: Any) -> PrefillRecord | None:
    """What is noted on an output, or on a cache, itself or among the parts of an output."""
    if isinstance(source, Cache):
        return conversation_of(source).record if physical_length(source) else None
    noted = getattr(source, "hawk_record", None)
    if noted is not None or not isinstance(source, (ModelOutput, tuple)):
        return noted
    parts = source.to_tuple() if isinstance(source, ModelOutput) else source
    return next((record_of(part) for part in parts if isinstance(part, Cache)), None)
