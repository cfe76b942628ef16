"""Adapters of PEFT: switched, merged and taken off they are seen by Dynamo, which compiles anew for each set of them.
Several in one batch are not: PEFT hands them to the modules by hooks that come and go with the call."""

from transformers import PreTrainedModel

from hawk_compile.capture.inside import graph_modules
from hawk_compile.compat.peft import argument_in_hooks, hooks_ever_put
from hawk_compile.errors import UnsupportedCallError
from hawk_compile.runtime.state import Runtime


def refuse_mixed_adapters(model: PreTrainedModel, runtime: Runtime) -> None:
    """Refuse a batch whose rows have adapters of their own. Modules are looked at only if there are new hooks anywhere.

    Raises:
        UnsupportedCallError: as said.
    """
    put = hooks_ever_put()
    if runtime.hooks_seen == put:
        return
    for path, part in graph_modules(model):
        if (name := argument_in_hooks(part)) is not None:
            raise UnsupportedCallError(
                f"{name} gives rows or tokens of a call adapters of their own, which PEFT tells model.{path} by a hook "
                "that a compiled graph does not call: give each adapter's rows in a call of its own, behind set_adapter"
            )
    runtime.hooks_seen = put
