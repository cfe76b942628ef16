"""`optimize`, `restore` and `report`: the three calls that most users need."""

from typing import Any, TypeVar

from transformers import PreTrainedModel

from hawk_compile.errors import HawkError
from hawk_compile.plan.question import special_ids
from hawk_compile.runtime.checks import check_model
from hawk_compile.runtime.forward import Runtime, ranks_of
from hawk_compile.runtime.overrides import RUNTIME, overrides_of
from hawk_compile.runtime.records import Report
from hawk_compile.settings.config import HawkConfig, make_config
from hawk_compile.settings.head_weights import resolve

Model = TypeVar("Model", bound=PreTrainedModel)


def optimize(model: Model, config: HawkConfig | None = None, **settings: Any) -> Model:
    """Let a vision-language model prune visual tokens in every prefill, inside its compiled graph.

    Args:
        model: a Hugging Face model that takes images, video or audio. It is changed in place and returned: same
            object, same class.
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
    check_model(model, made.modalities)
    weights = resolve(made.used_head_weights, model)
    ids = special_ids(model, made)
    earlier = model.__dict__.get(RUNTIME)
    overrides = overrides_of(model)
    if earlier is not None:
        originals = earlier.originals
    else:
        originals = {name: owner.__dict__[name] for name, (owner, _) in overrides.items() if name in owner.__dict__}
    for name, (owner, method) in overrides.items():
        owner.__dict__[name] = method
    runtime = Runtime(made, weights, ids, originals, ranks_of(model))
    if earlier is not None:
        runtime.take_compiled(earlier)
    model.__dict__[RUNTIME] = runtime
    return model


def restore(model: Model) -> Model:
    """Undo `optimize`: the model is exactly what it was. A model that was never optimised is returned as it is."""
    runtime = model.__dict__.pop(RUNTIME, None)
    if runtime is not None:
        for name, (owner, _) in overrides_of(model).items():
            if name in runtime.originals:
                owner.__dict__[name] = runtime.originals[name]
            else:
                owner.__dict__.pop(name, None)
    return model


def report(model: PreTrainedModel) -> Report:
    """What the last prefill of this thread did.

    Raises:
        HawkError: the model is not optimised, or this thread has run no prefill on it yet.
    """
    runtime = model.__dict__.get(RUNTIME)
    if runtime is None:
        raise HawkError("report needs an optimised model: call hawk_compile.optimize first")
    if runtime.record is None:
        raise HawkError("this thread has run no prefill on the model yet: call generate or forward first")
    return runtime.record.report()
