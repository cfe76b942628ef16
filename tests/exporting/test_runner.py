"""What an exported folder does when it is asked: its settings, calls side by side, and calls that it does not take."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache

import hawk_compile
from hawk_compile import selectors
from hawk_compile.errors import ConfigError, InputError, UnsupportedCallError
from hawk_compile.exporting.check import compare
from hawk_compile.runtime import overrides
from tests import zoo

NAME = "llava"
SETTINGS = {"ratio": 0.5, "selector": selectors.QAPruner(bits=3), "normalization": "minmax", "query": "last",
            "end_of_turn_token_id": 7}  # fmt: skip
WAIT = 60.0
"""Seconds after which a thread that waits for another gives up; none of these tests needs them."""


def prompt(**options: Any) -> dict[str, Any]:
    return zoo.inputs(NAME, zoo.build(NAME, layers=1), rows=[zoo.Row(images=((1, 1),))], **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, told = tmp_path_factory.mktemp("runner") / "onnx", []
    config = hawk_compile.HawkConfig(**SETTINGS)
    hawk_compile.export(
        zoo.build(NAME, layers=1), prompt(), path, config, quantization="int8", progress=told.append
    )
    assert [now.done for now in told] == [*range(1, len(told) + 1)] and told[-1].text.startswith("decode: ")
    return path


def test_settings_are_those_of_the_export(folder: Path) -> None:
    """All of them, in a request with a ratio of its own too, and while another has its."""
    runner = hawk_compile.load(folder)
    config = runner.runtime.config
    assert (config.ratio, config.method) == (0.5, selectors.QAPruner(bits=3))
    assert (config.used_normalization, config.used_query) == ("minmax", "last")
    assert config.end_of_turn_token_id == (7,) == runner.runtime.ids.end_of_turn
    assert config.head_weights == tuple(runner.manifest.head_weights)
    seen: list[Any] = []
    prefill = runner.runtime.prefill.session

    def session(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(runner.runtime.config)
        return prefill(inputs)

    runner.runtime.prefill.session = session
    for ratio in (None, 0.25):
        runner.generate(**prompt(), max_new_tokens=1, ratio=ratio)
    assert [each.ratio for each in seen] == [0.5, 0.25] and runner.runtime.config.ratio == 0.5
    assert {(each.method, each.used_normalization, each.used_query) for each in seen} == {
        (selectors.QAPruner(bits=3), "minmax", "last")
    }


def test_a_folder_that_is_loaded_again_leaves_no_class_behind(folder: Path) -> None:
    """What an optimised model shadows is made for a class and kept for ever."""
    kinds = [type(hawk_compile.load(folder).model) for _ in range(2)]
    kept = overrides.forward_of.cache_info().currsize
    kinds.append(type(hawk_compile.load(folder).model))
    assert len({*kinds}) == 1 and overrides.forward_of.cache_info().currsize == kept


def test_a_selector_of_ones_own_is_not_needed_to_run(folder: Path, tmp_path: Path) -> None:
    """Its ranking lies in the graph; what is to be compared with PyTorch needs it."""
    content = json.loads((folder / "manifest.json").read_text()) | {"selector": "mine", "selector_options": {"size": 1}}
    for file in folder.iterdir():
        (tmp_path / file.name).hardlink_to(file)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    runner = hawk_compile.load(tmp_path)
    assert runner.runtime.config.used_normalization == "minmax" and runner.runtime.config.used_query == "last"
    assert runner.generate(**prompt(), max_new_tokens=1).shape[0] == 1
    with pytest.raises(ConfigError, match='selector "mine", which the export has, is none of this package: give'):
        compare(runner, zoo.build(NAME, layers=1), [prompt()])


def test_requests_run_side_by_side(folder: Path) -> None:
    """Two threads, each with its ratio: both are inside the prefill at once, and each keeps what it keeps alone."""
    runner, ratios = hawk_compile.load(folder), (0.25, 0.75)
    alone = {}
    for ratio in ratios:
        ids = runner.generate(**prompt(), max_new_tokens=3, do_sample=False, ratio=ratio)
        alone[ratio] = (ids.tolist(), runner.report().keep_indices[0].tolist(), runner.report().reason)
    assert alone[0.25][1:] != alone[0.75][1:]
    met = threading.Barrier(2, timeout=WAIT)
    prefill, decode = runner.runtime.prefill.session, runner.runtime.originals["forward"]

    def session(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        met.wait()
        found = prefill(inputs)
        met.wait()
        return found

    def step(*args: Any, **kwargs: Any) -> Any:
        met.wait()
        return decode(*args, **kwargs)

    runner.runtime.prefill.session, runner.runtime.originals["forward"] = session, step

    def ask(ratio: float) -> Any:
        out = runner.generate(
            **prompt(), max_new_tokens=3, do_sample=False, ratio=ratio, return_dict_in_generate=True
        )
        report = runner.report(out)
        return out.sequences.tolist(), report.keep_indices[0].tolist(), report.reason

    with ThreadPoolExecutor(2) as threads:
        assert dict(zip(ratios, threads.map(ask, ratios), strict=True)) == alone


def test_calls_that_an_exported_model_does_not_take(folder: Path) -> None:
    runner, inputs = hawk_compile.load(folder), prompt()
    assert runner.manifest.parts["decode"].details == {"quantization": "int8"}
    embeds = torch.zeros(*inputs["input_ids"].shape, 64)
    for settings, error, match in (
        ({"output_hidden_states": True, "return_dict_in_generate": True}, UnsupportedCallError, "logits only"),
        ({"ratio": 1.5}, ConfigError, "ratio is the fraction"),
        ({"inputs_embeds": embeds}, UnsupportedCallError, "takes input_ids"),
        ({"use_cache": False}, UnsupportedCallError, "use_cache=False: an exported model fills"),
        ({"generation_config": GenerationConfig(use_cache=False)}, UnsupportedCallError, "use_cache=False"),
        ({"cache_implementation": "static"}, UnsupportedCallError, "cache_implementation='static'"),
    ):
        with pytest.raises(error, match=match):
            runner.generate(**inputs, max_new_tokens=2, **settings)
    cache = StaticCache(config=zoo.build(NAME, layers=1).config.get_text_config(), max_cache_len=99)
    with pytest.raises(UnsupportedCallError, match=r"plain DynamicCache\(\), got StaticLayer"):
        runner.generate(**inputs, max_new_tokens=3, past_key_values=cache)
    with pytest.raises(InputError, match="position_ids are needed"):
        runner.model(**inputs)
    fewer = inputs | {"pixel_values": inputs["pixel_values"][:, :, :-1]}
    with pytest.raises(InputError, match="pixel_values of vision_tower must have shape"):
        runner.generate(**fewer, max_new_tokens=2)
    text = {"input_ids": inputs["input_ids"][:, -4:], "position_ids": torch.arange(4)[None]}
    with pytest.raises(UnsupportedCallError, match="logits of the last position alone, and logits_to_keep=0"):
        runner.model(**text, logits_to_keep=0)
    with pytest.raises(UnsupportedCallError, match="leave out assisted decoding"):
        runner.generate(torch.tensor([[30, 31, 30, 31, 30]]), max_new_tokens=3, prompt_lookup_num_tokens=1)
    first = runner.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, inputs["input_ids"]], 1)
    with pytest.raises(UnsupportedCallError, match="an exported prefill starts a conversation"):
        runner.generate(input_ids=ids, pixel_values=inputs["pixel_values"], past_key_values=first.past_key_values,
                        attention_mask=torch.ones_like(ids), max_new_tokens=2)  # fmt: skip
    assert isinstance(first.past_key_values, DynamicCache)
