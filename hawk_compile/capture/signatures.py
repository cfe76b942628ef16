"""What a model's forward takes, by name: a forward that hands on what it does not name takes what lies beneath it too.

    class Mine(Llava):
        def forward(self, input_ids=None, pixel_values=None, **kwargs):    # takes all that Llava's takes
            return super().forward(input_ids=input_ids, pixel_values=pixel_values, **kwargs)
"""

import functools
import inspect
from typing import Any

from transformers import PreTrainedModel

ENCODED = "mm_encoder_outputs"
"""The argument under which a forward takes images that are encoded already."""
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def signature_of(kind: Any) -> inspect.Signature:
    """The signature of a class's forward, `self` first, with what it hands on to the forward of a base class."""
    return worked_out(kind)


@functools.cache
def worked_out(kind: Any) -> inspect.Signature:
    own = inspect.signature(kind.forward)
    beneath = forward_beneath(kind)
    if beneath is None or not hands_on(kind.forward, own):
        return own
    mine = list(own.parameters.values())
    placed = [each for each in mine if each.kind in POSITIONAL]
    others = list(signature_of(beneath).parameters.values())
    if any(each.kind is each.VAR_POSITIONAL for each in mine):
        placed += [each for each in others if each.kind in POSITIONAL][len(placed) :]
    named = [each for each in mine if each.kind is each.KEYWORD_ONLY]
    known = {each.name for each in (*placed, *named)}
    named += [
        each.replace(kind=each.KEYWORD_ONLY) for each in others
        if each.name not in known and each.kind in (*POSITIONAL, each.KEYWORD_ONLY)
    ]  # fmt: skip
    rest = [each for each in mine if each.kind is each.VAR_KEYWORD]
    return inspect.Signature([*placed, *named, *rest])


def forward_beneath(kind: Any) -> Any:
    """The first base class of a model, behind the one that defines its forward, that has a forward of its own; None if
    there is none."""
    defining = [each for each in inspect.getmro(kind) if "forward" in vars(each) and issubclass(each, PreTrainedModel)]
    return defining[1] if len(defining) > 1 else None


def hands_on(forward: Any, signature: inspect.Signature) -> bool:
    """Whether a forward gives another one what it does not name: it takes any arguments, and calls a `forward`, or is a
    wrapper that names nothing. Where it does not after all, no merge is found in its graph, and that is refused."""
    kinds = {each.kind for each in signature.parameters.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        return False
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return inspect.Parameter.VAR_POSITIONAL in kinds or (code is not None and "forward" in code.co_names)


def takes_encoded(model: PreTrainedModel) -> bool:
    """Whether a model's forward takes `mm_encoder_outputs`: one that lies on the model itself, in its place, too."""
    beneath = ENCODED in signature_of(type(model)).parameters
    if "forward" not in vars(model):
        return beneath
    own = inspect.signature(model.forward).parameters
    return ENCODED in own or (beneath and any(each.kind is each.VAR_KEYWORD for each in own.values()))


def leaves_encoded_out(model: PreTrainedModel) -> bool:
    """Whether a forward lies above another one that takes `mm_encoder_outputs`, and neither names nor hands it on."""
    kinds = [each for each in inspect.getmro(type(model)) if "forward" in vars(each)]
    taken = any(ENCODED in inspect.signature(each.forward).parameters for each in kinds)  # type: ignore[attr-defined]
    return taken and not takes_encoded(model)
