"""What the plugin does in a vLLM that it does not know, and which engines it refuses."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hawk_compile.errors import UnsupportedCallError, UnsupportedModelError
from hawk_compile.serving.vllm import plugin
from hawk_compile.serving.vllm.compat import engine
from hawk_compile.serving.vllm.compat.engine import check_engine
from hawk_compile.serving.vllm.items import visual_tokens
from hawk_compile.serving.vllm.model import PrunedModel


@pytest.mark.parametrize("step", ["when_verified", "offer_classes"])
@pytest.mark.parametrize("error", [ImportError("no module named vllm.config"), AttributeError("no such method")])
def test_a_vllm_without_what_it_needs_goes_on(
    step: str, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that never asked for pruning starts as before; one that did does not start, if it can be told."""

    def fail(*given: object) -> bool:
        raise error

    monkeypatch.setattr(plugin, "lacking", [])
    monkeypatch.setattr(plugin, step, fail)
    monkeypatch.setattr(plugin, "when_verified", fail if step == "when_verified" else lambda call: True)
    with caplog.at_level(logging.ERROR, "vllm.hawk"):
        plugin.register()
    assert "nothing can be pruned" in caplog.text and str(error) in caplog.text
    unpruned = SimpleNamespace(hf_config=SimpleNamespace(), architecture="Some")
    plugin.serve_if_asked(unpruned)
    unpruned.hf_config.hawk = {"ratio": 0.8}
    with pytest.raises(UnsupportedModelError, match=str(error)):
        plugin.serve_if_asked(unpruned)


def test_other_models_are_loaded_without_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it imports may not be there, and is not asked for."""
    monkeypatch.setitem(sys.modules, "hawk_compile.serving.vllm.model", None)
    probed: list[bool] = []
    assert not plugin.is_pruned(SimpleNamespace())
    assert plugin.is_pruned(SimpleNamespace(hawk_head_weights=None, probe=lambda: probed.append(True))) and probed


def an_engine(
    stages: int = 1,
    encoder_only: bool = False,
    transfer: Any = None,
    prompt_embeds: bool = False,
    lora: Any = None,
    drafts: str | None = None,
) -> Any:
    return SimpleNamespace(
        speculative_config=None if drafts is None else SimpleNamespace(method=drafts),
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages), ec_transfer_config=transfer, lora_config=lora,
        model_config=SimpleNamespace(
            multimodal_config=SimpleNamespace(mm_encoder_only=encoder_only), enable_prompt_embeds=prompt_embeds
        ),
    )  # fmt: skip


@pytest.mark.parametrize(("given", "message"), [
    ({"stages": 2}, "pipeline_parallel_size=2 .* take tensor_parallel_size"),
    ({"encoder_only": True}, "the vision encoder alone"),
    ({"transfer": object()}, "the vision encoder alone"),
    ({"prompt_embeds": True}, "enable_prompt_embeds=True .* have no ids"),
    ({"drafts": "eagle3"}, "by 'eagle3' drafts with a model of its own, .* take ngram or"),
    ({"lora": SimpleNamespace(enable_tower_connector_lora=True)}, "enable_tower_connector_lora=True .* leave it out"),
])  # fmt: skip
def test_engines_that_are_refused(given: dict[str, Any], message: str) -> None:
    check_engine(an_engine())
    check_engine(an_engine(drafts="ngram"))
    check_engine(an_engine(lora=SimpleNamespace(enable_tower_connector_lora=False)))
    with pytest.raises(UnsupportedCallError, match=message):
        check_engine(an_engine(**given))


@pytest.mark.parametrize(("counts", "expected"), [
    ([], []),
    ([64, 64, 64], [[64, 64], [64]]),
    ([300, 10, 118, 1], [[300], [10, 118], [1]]),
    ([0, 0, 0, 128, 0], [[0, 0, 0, 128, 0]]),
])  # fmt: skip
def test_how_many_images_one_call_of_the_encoder_sees(counts: list[int], expected: list[list[int]]) -> None:
    """Images that stay whole were counted as they are: they take no room here."""
    cut = engine.parts([("image", count) for count in counts], lambda count: count, 128)
    assert [[count for _, count in part] for part in cut] == expected


def test_what_is_known_of_an_item_by_what_travels_with_it() -> None:
    whole = {"pixel_values": SimpleNamespace(data=torch.zeros(3, 4, 4))}
    pruned = {**whole, "hawk_visual": SimpleNamespace(data=torch.tensor([True, False, True]))}
    assert visual_tokens(whole) == 0 and visual_tokens(pruned) == 2


def test_steps_without_images_leave_positions() -> None:
    """After a prompt that ends with an image, its last kept token does not say where the image ended."""
    known = torch.tensor([[0, 1, 4]]).expand(3, -1).clone()
    known.hawk_end = 10  # type: ignore[attr-defined]
    rows, positions, delta = PrunedModel.recompute_mrope_positions(SimpleNamespace(), [50, 6, 6], [], known, 3)  # type: ignore[arg-type]
    assert rows == [] and positions is known and delta == 10 - 3
