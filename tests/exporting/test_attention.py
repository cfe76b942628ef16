"""A model that was loaded with eager attention is exported with SDPA, and left as it was."""

from __future__ import annotations

import hawk_compile
from hawk_compile.exporting.components import Component
from hawk_compile.exporting.decode import decode_component
from hawk_compile.exporting.prefill import prefill_component, prune
from hawk_compile.passes.graph import is_call
from hawk_compile.settings.head_weights import resolve
from tests import zoo


def attentions(graph: object) -> tuple[int, int]:
    """How often a graph holds SDPA, and a softmax."""
    nodes = graph.graph.nodes  # type: ignore[attr-defined]
    return tuple(sum(is_call(node, name) for node in nodes) for name in ("scaled_dot_product_attention", "softmax"))  # type: ignore[return-value]


def test_prefill_and_decode_are_exported_with_sdpa() -> None:
    model = zoo.build("llava", layers=1)
    inputs = zoo.inputs("llava", model, rows=[zoo.sizes("llava")[1]])
    model.set_attn_implementation("eager")
    config = hawk_compile.HawkConfig(ratio=0.6)
    prefill: Component = prune(
        prefill_component(model, inputs, config, resolve("auto", model).values), config, portable=False)  # fmt: skip
    assert attentions(prefill.module.graph_module) == (1, 0)
    assert attentions(decode_component(model, prefill).trace().module(check_guards=False)) == (1, 0)
    assert model.config.get_text_config()._attn_implementation == "eager"
