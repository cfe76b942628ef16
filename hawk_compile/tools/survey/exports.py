"""Is an exported model like the optimised one? One prompt through both."""

import tempfile
from pathlib import Path

from transformers import PreTrainedModel

from hawk_compile.exporting.check import compare
from hawk_compile.exporting.runner import load
from hawk_compile.exporting.write import export
from hawk_compile.tools.survey.checks import STEPS, Check, settings
from hawk_compile.tools.survey.outcome import Wrong
from hawk_compile.tools.survey.tiny import Tiny, prompt

TOLERANCE = 0.01
"""Of logits around 1, between an export and the optimised model: what rounding makes of them is far below."""


def exported_as(form: str) -> Check:
    """A check of an export: ids and kept tokens as of the optimised model, and logits within `TOLERANCE`."""

    def check(tiny: Tiny, model: PreTrainedModel) -> str:
        inputs = prompt(tiny, rows=1)
        with tempfile.TemporaryDirectory() as parent:
            out = Path(parent) / form
            chosen = {name: given for name, given in settings(tiny, 0.5).items() if name != "backend"}
            export(model, inputs, out, format=form, **chosen)
            found = compare(load(out), model, [inputs], max_new_tokens=STEPS)
        if not found.whole or found.logits > TOLERANCE:
            raise Wrong(f"{found}")
        return f"{found.logits:.2g}"

    return check
