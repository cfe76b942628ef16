"""A saved model prunes alike when it is loaded again, wherever its head weights came from and under any name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

import hawk_compile
from hawk_compile.settings.head_weights import published
from tests import zoo
from tests.runtime.models import picture

MEASURED = (1.0, 3.0, 2.0, 0.5)


def reloaded(folder: Path, **settings: Any) -> Any:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return hawk_compile.optimize(model, ratio=0.6, backend="eager", **settings)


def optimised(**settings: Any) -> Any:
    return hawk_compile.optimize(zoo.build("llava", layers=2), ratio=0.6, backend="eager", **settings)


def check_alike(first: Any, second: Any) -> None:
    first(**picture("llava")), second(**picture("llava"))
    a, b = hawk_compile.report(first), hawk_compile.report(second)
    assert a.keep_indices[0].tolist() == b.keep_indices[0].tolist()
    torch.testing.assert_close(a.scores, b.scores, atol=1e-7, rtol=1e-6)


def test_given_weights(tmp_path: Path) -> None:
    model = optimised(head_weights=MEASURED)
    model.save_pretrained(tmp_path / "saved")
    again = reloaded(tmp_path / "saved")
    torch.testing.assert_close(again._hawk_runtime.head_weights.values, torch.tensor(MEASURED) / sum(MEASURED))
    check_alike(model, again)
    assert json.loads((tmp_path / "saved" / "head_weights.json").read_text())["origin"] == "given"
    again.save_pretrained(tmp_path / "twice")  # a copy of a copy
    check_alike(model, reloaded(tmp_path / "twice"))


def test_equal_weights_stay_equal_in_a_folder_whose_name_has_published_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(published(), "known-vlm", {"weights": list(MEASURED), "source": "a paper"})
    model = optimised()
    assert model._hawk_runtime.head_weights.origin == "uniform"
    model.save_pretrained(tmp_path / "Known-VLM")
    check_alike(model, reloaded(tmp_path / "Known-VLM"))


def test_published_weights_survive_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(published(), "known-vlm", {"weights": list(MEASURED), "source": "a paper"})
    zoo.build("llava", layers=2).save_pretrained(tmp_path / "Known-VLM")
    model = reloaded(tmp_path / "Known-VLM")
    assert model._hawk_runtime.head_weights.origin == "published (a paper)"
    model.save_pretrained(tmp_path / "mine")
    check_alike(model, reloaded(tmp_path / "mine"))


@pytest.mark.parametrize("selector", [pytest.param("uniform", marks=pytest.mark.slow), "fastv"])
def test_a_selector_with_weights_of_its_own_does_not_overwrite_those_of_the_checkpoint(
    tmp_path: Path, selector: str
) -> None:
    optimised(head_weights=MEASURED).save_pretrained(tmp_path / "measured")
    model = reloaded(tmp_path / "measured", selector=selector)
    model.save_pretrained(tmp_path / "again")
    check_alike(model, reloaded(tmp_path / "again", selector=selector))
    check_alike(optimised(head_weights=MEASURED), reloaded(tmp_path / "again"))


def test_a_restored_model_and_other_processes_write_none(tmp_path: Path) -> None:
    model = optimised(head_weights=MEASURED)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "head_weights.json").exists()
    hawk_compile.restore(model).save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / "config.json").exists()
    assert not (tmp_path / "plain" / "head_weights.json").exists()


def test_the_hub_gets_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """save_pretrained(push_to_hub=True) sends the folder before it returns."""
    model, sent = optimised(head_weights=MEASURED), []
    hub = SimpleNamespace(create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: hub)
    card = SimpleNamespace(save=lambda path: None)  # else it is asked of the Hub, for as long as that does not answer
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *_, **__: card)
    monkeypatch.setattr(type(model), "_upload_modified_files", lambda self, folder, *_, **__: sent.extend(
        path.name for path in Path(folder).iterdir()))
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="nobody/nothing")
    assert "head_weights.json" in sent and "config.json" in sent
