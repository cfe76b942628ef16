"""Layers that count positions themselves, by what their cache says that it holds: those of the whole prompt."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from hawk_compile.runtime.api import optimize, report, restore
from hawk_compile.tools.survey import oracle
from hawk_compile.tools.survey.outcome import equal, unlike
from hawk_compile.tools.survey.prompts import visual_of
from hawk_compile.tools.survey.tiny import build, prompt, read

LLAMA4 = Path(__file__).parent / "architectures" / "llama4.json"
STEPS = 4


@pytest.mark.slow
def test_queries_that_are_scaled_by_their_place_in_the_text_are_scaled_as_in_the_whole_prompt() -> None:
    """Held to the plain model on the whole prompt, with removed tokens masked: so every token has the place it had."""
    tiny = read(LLAMA4)
    text = tiny.config["text_config"] | {"no_rope_layers": [0, 1, 1, 0], "floor_scale": 4, "attn_scale": 1.0}
    tiny = dataclasses.replace(tiny, config=tiny.config | {"text_config": text})
    model, inputs = build(tiny), prompt(tiny, rows=1)
    length = inputs["input_ids"].shape[1]
    optimize(model, ratio=0.5, backend="eager", head_weights="uniform")
    result = model.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    keep = report(model).keep_indices[0]
    restore(model)
    seen = torch.zeros(1, length, dtype=torch.int64).index_fill(1, keep, 1)
    with torch.no_grad():
        output = model(**inputs | {"attention_mask": seen, "position_ids": torch.arange(length)[None]}, use_cache=True)
        expected = [output.logits[0, -1]]
        for token in result.sequences[0, length:-1]:
            seen = torch.cat([seen, seen.new_ones(1, 1)], 1)
            output = model(
                input_ids=token.view(1, 1), attention_mask=seen, past_key_values=output.past_key_values, use_cache=True,
                position_ids=torch.tensor([[seen.shape[1] - 1]]),
            )  # fmt: skip
            expected.append(output.logits[0, -1])
        among_kept, _ = oracle.pruned_forward(model, inputs, keep, visual_of(model, inputs))
    equal("logits", torch.stack(result.logits)[:, 0], torch.stack(expected), 1e-5)
    unlike("logits of places among the kept", among_kept.logits[0, -1], expected[0], 1e-4)
