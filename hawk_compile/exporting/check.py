"""Whether an exported folder answers as the optimised model does: the same ids, the same kept tokens, near logits."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hawk_compile.errors import ConfigError
from hawk_compile.exporting.manifest import config_of
from hawk_compile.exporting.runner import Runner
from hawk_compile.runtime.api import optimize, report
from hawk_compile.runtime.state import RUNTIME
from hawk_compile.settings.selectors import SELECTORS


@dataclass
class Agreement:
    """What a comparison saw.

    Attributes:
        rows: rows compared; `same_ids` and `same_kept` of them have equal ids and equal kept positions.
        logits: largest difference of a logit, over steps at which both had generated the same.
    """

    rows: int = 0
    same_ids: int = 0
    same_kept: int = 0
    logits: float = 0.0

    @property
    def whole(self) -> bool:
        return self.rows == self.same_ids == self.same_kept and not math.isnan(self.logits)


def compare(
    runner: Runner, model: PreTrainedModel, prompts: Iterable[dict[str, Any]], *, ratio: float | None = None,
    max_new_tokens: int = 8, selector: Any = None,
) -> Agreement:  # fmt: skip
    """Greedy generation of an exported model beside that of the model it came from, which is optimised for it.

    Args:
        model: is left optimised with the manifest's settings and `backend="eager"`.
        prompts: inputs of `generate`, a batch each.
        ratio: fraction of visual tokens removed; None: that of the manifest.
        selector: the ranking function that was exported, of which a manifest has only the name; None for others.

    Raises:
        ConfigError: a selector that is none of this package's, and was not given.
    """
    manifest, found = runner.manifest, Agreement()
    if selector is None and manifest.selector not in SELECTORS:
        raise ConfigError(
            f'selector "{manifest.selector}", which the export has, is none of this package: give selector=, the '
            "function that was exported"
        )
    config = replace(config_of(manifest), backend="eager", **({} if selector is None else {"selector": selector}))
    optimize(model, config if ratio is None else replace(config, ratio=ratio))
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
        "use_cache": True,  # an exported model has no other way; without, each step would be a prefill of its own
    }  # fmt: skip
    model.__dict__[RUNTIME].ids = runner.runtime.ids  # which the export may have been given
    for inputs in prompts:
        wanted: Any = model.generate(**inputs, **settings)  # type: ignore[operator]
        kept = report(model).keep_indices
        got = runner.generate(**inputs, ratio=ratio, **settings)
        length = min(wanted.sequences.shape[1], got.sequences.shape[1])
        same = (wanted.sequences[:, :length] == got.sequences[:, :length]).all(1)
        if wanted.sequences.shape != got.sequences.shape:
            same = torch.zeros_like(same)
        found.rows += len(same)
        found.same_ids += int(same.sum())
        found.same_kept += sum(map(torch.equal, kept, runner.report().keep_indices))
        steps = [(a - b).abs().amax(1) for a, b in zip(wanted.logits, got.logits, strict=False)]
        alike = torch.stack(steps)[:, same] if same.any() else torch.stack(steps)[:1]
        largest = float(alike.max())
        found.logits = largest if math.isnan(largest) else max(largest, found.logits)
    return found
