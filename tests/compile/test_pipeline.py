"""The order of the passes and the switches around them."""

import logging

import pytest
import torch

from hawk_compile.compile.pipeline import (
    EXPORT_PASSES,
    PASSES,
    PORTABLE_PASSES,
    PassOptions,
    left_out,
    run_passes,
    source_tag,
)
from hawk_compile.errors import ConfigError
from hawk_compile.passes.graph import is_call
from tests.passes import graphs


def test_the_passes_read_as_one_list():
    assert [step.name for step in PASSES] == [
        "remove_unread_rows",
        "functionalize_writes",
        "locate_prefill",
        "compare_slots",
        "replace_masked_add",
        "split_at_merge",
        "insert_scoring",
        "insert_budget",
        "refuse_branches",
        "insert_ranking",
        "insert_quotas",
        "insert_selection",
        "gather_by_shape",
        "refresh_values",
        "replace_masked_scatter",
        "fold_layers",
    ]


def test_no_merge_counts_elements():
    before, after = graphs.of_a_decoder(), run_passes(graphs.of_a_decoder(), [], PassOptions())
    assert [sum(is_call(node, "masked_scatter") for node in gm.graph.nodes) for gm in (before, after)] == [1, 0]


def test_each_pass_says_what_it_did(caplog):
    with caplog.at_level(logging.INFO, logger="hawk_compile"):
        run_passes(graphs.of_a_decoder(), [], PassOptions())
    lines = [record.message for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == [f"{i}. {step.name}" for i, step in enumerate(PASSES, start=1)]
    assert all("nodes" in line and "ms" in line for line in lines)


def test_dump_writes_the_graph_before_and_after_each_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("HAWK_DUMP", str(tmp_path / "dumps"))
    run_passes(graphs.of_a_decoder(), [], PassOptions())
    files = {path.name.split("_", 1)[1] for path in (tmp_path / "dumps").iterdir()}
    assert files == {"0_captured.py", *(f"{i}_{step.name}.py" for i, step in enumerate(PASSES, start=1))}
    texts = {path.name.split("_", 2)[2]: path.read_text() for path in (tmp_path / "dumps").iterdir()}
    assert "score_folded" in texts["insert_scoring.py"] and "score_folded" not in texts["captured.py"]


def test_an_optional_pass_can_be_left_out_and_says_so(monkeypatch, caplog):
    monkeypatch.setenv("HAWK_DISABLE", "refresh_values")
    with caplog.at_level(logging.WARNING, logger="hawk_compile"):
        run_passes(graphs.of_a_decoder(), [], PassOptions())
    assert "refresh_values: left out" in caplog.text


def test_fuel_counts_optional_passes(monkeypatch):
    monkeypatch.setenv("HAWK_FUEL", "0")
    later = {"refresh_values", "replace_masked_scatter", "fold_layers"}
    assert left_out(PASSES) == {"remove_unread_rows", "replace_masked_add", *later}
    monkeypatch.setenv("HAWK_FUEL", "2")
    assert left_out(PASSES) == later
    monkeypatch.setenv("HAWK_FUEL", "5")
    assert left_out(PASSES) == set()


def test_fuel_spares_what_an_export_cannot_do_without(monkeypatch):
    """The same pass is optional in front of a compiler, and mandatory for a target without NonZero."""
    monkeypatch.setenv("HAWK_FUEL", "0")
    assert "replace_masked_scatter" not in left_out((*EXPORT_PASSES, *PORTABLE_PASSES))
    inputs = graphs.prompt()
    exported = torch.export.export(graphs.Decoder(), inputs, strict=False).module()
    gm = run_passes(exported, [], PassOptions(), PORTABLE_PASSES)
    assert not any(is_call(node, "masked_scatter") for node in gm.graph.nodes)


def test_an_export_refuses_to_leave_out_what_it_needs(monkeypatch):
    monkeypatch.setenv("HAWK_DISABLE", "replace_masked_scatter")
    assert left_out(PASSES) == {"replace_masked_scatter"}
    exported = torch.export.export(graphs.Decoder(), graphs.prompt(), strict=False).module()
    with pytest.raises(ConfigError, match=r"'replace_masked_scatter', without which .* here these are none"):
        run_passes(exported, [], PassOptions(), PORTABLE_PASSES)


@pytest.mark.parametrize(
    ("switch", "value", "message"),
    [
        ("HAWK_DISABLE", "insert_scoring", "without which this graph would be"),
        ("HAWK_DISABLE", "no_such_pass", "the passes are"),
        ("HAWK_FUEL", "many", "whole number"),
    ],
)
def test_a_switch_that_makes_no_sense_is_refused(monkeypatch, switch, value, message):
    monkeypatch.setenv(switch, value)
    with pytest.raises(ConfigError, match=message):
        run_passes(graphs.of_a_decoder(), [], PassOptions())


def test_compilers_caches_are_keyed_by_the_sources():
    """A compiled graph of other sources must never be taken from a cache."""
    seen = []

    def inner(gm, example_inputs):
        seen.append(torch.compiler.config.cache_key_tag)
        return gm

    from hawk_compile.compile import backend
    from hawk_compile.settings.config import HawkConfig

    original = backend.inner_compiler
    backend.inner_compiler = lambda name: inner
    try:
        backend.compile_graph(graphs.of_a_decoder(), [], HawkConfig(backend="eager"), PassOptions())
    finally:
        backend.inner_compiler = original
    assert seen == [source_tag()] and len(source_tag()) > 8
    assert torch.compiler.config.cache_key_tag == ""
