"""Audio tokens pruned by the same passes, alone and beside images, held to the eager model on hand-gathered inputs."""

import functools
import math
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import hawk_compile
from hawk_compile.errors import (
    ConfigError,
    ExportError,
    InputError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from tests import eager_reference as reference
from tests import zoo
from tests.zoo import Row, common, rows

MIXED = "qwen2_5_omni"
SLOW = [("voxtral", ("audio",)), ("qwen2_audio", ("audio",)), (MIXED, ("audio",)), (MIXED, ("image",))]
CASES = [(MIXED, ("audio", "image"))]
PROMPTS = (Row(audio=(16,)), Row(audio=(8,), after=9), Row(audio=(16, 8), before=1), Row(audio=(8, 8), tail=0))
IDS = {"image": common.IMAGE, "video": common.VIDEO, "audio": common.AUDIO}
GRAPHS = {("qwen2_audio", ("audio",)): 2, (MIXED, ("audio",)): 2}
"""More than one: with one audio and with several; with an image that stays and without."""
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}


class Case(NamedTuple):
    """One prompt, with what the eager model gives on the hand-gathered tokens."""

    inputs: dict[str, Any]
    candidates: Tensor
    keep: Tensor
    scores: Tensor
    output: Any
    cache: Any


@functools.cache
def models() -> dict[str, tuple[Any, Any]]:
    """Each model twice, made at once: captured graphs are guarded by how many models transformers has made."""
    return {name: (zoo.build(name, layers=2), zoo.build(name, layers=2)) for name in zoo.AUDIO_NAMES}


def plain(name: str) -> Any:
    return models()[name][0]


def pruned(name: str, *modalities: str, ratio: float = 0.6) -> Any:
    """One for all tests: a new ratio or another modality compiles nothing anew."""
    weights = head_weights(plain(name))
    return hawk_compile.optimize(
        models()[name][1], ratio=ratio, modalities=modalities, backend="eager", head_weights=weights
    )


def head_weights(model: Any) -> Tensor:
    weights = torch.arange(1.0, model.config.get_text_config().num_attention_heads + 1)
    return weights / weights.sum()


def prompts(name: str, modalities: tuple[str, ...]) -> list[Row]:
    """Audio, with images ahead of it where they are asked for, and in half of the prompts where they are to stay."""
    if name != MIXED:
        return list(PROMPTS)
    last = ((1, 7),), ((2, 2), (4, 2))
    images = [((3, 4),), ((2, 3),), *(last if "image" in modalities else ((), ()))]
    return [replace(row, images=given) for row, given in zip(PROMPTS, images, strict=True)]


def explicit(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """One row with the positions that generate makes, encoded images, and no mask."""
    given = rows.encoded(model, inputs)
    names = ("input_ids", "position_ids", "input_features", "feature_attention_mask", "mm_encoder_outputs")
    return {name: given[name] for name in names if given.get(name) is not None and len(given[name])}


def fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    """The model's forward writes into the dict of features that it is given."""
    return {name: dict(value) if name == "mm_encoder_outputs" else value for name, value in inputs.items()}


def eager_case(name: str, row: Row, modalities: tuple[str, ...], ratio: float) -> Case:
    model = plain(name)
    inputs = explicit(model, zoo.inputs(name, model, rows=[row]))
    ids = inputs["input_ids"][0]
    every = torch.isin(ids, torch.tensor(list(IDS.values())))
    candidates = torch.isin(ids, torch.tensor([IDS[each] for each in modalities]))
    merged = reference.merged_inputs(model, fresh(inputs))["inputs_embeds"]
    with torch.no_grad():
        query, key = reference.first_layer_query_key(model, merged)
    eos = model.generation_config.eos_token_id
    end = common.AUDIO_END if name == MIXED else -1
    votes = reference.voters(ids.tolist(), every.tolist(), end, set(eos) if isinstance(eos, list) else {eos})
    scores = reference.scores(query[0], key[0], candidates, torch.tensor(votes), head_weights(model))
    count = max(1, math.ceil(round(int(candidates.sum()) * (1 - ratio), 6)))
    keep = reference.kept_positions(scores, candidates, count)
    return Case(inputs, candidates, keep, scores, *reference.pruned_forward(model, fresh(inputs), keep, every))


@torch.no_grad()
def continued(name: str, case: Case, steps: int) -> list[int]:
    """Greedy ids behind the hand-gathered prompt, at the positions that generate gives them."""
    logits, last = case.output.logits, case.inputs["position_ids"].amax(-1, keepdim=True)
    if last.ndim == 3:  # a row of text positions, and three that go on behind their largest
        last = torch.cat([last[:1], last[1:].amax(0, keepdim=True).expand(3, -1, -1)])
    found: list[int] = []
    for step in range(1, steps + 1):
        found.append(int(logits[0, -1].argmax()))
        token = torch.tensor([found[-1:]])
        logits = plain(name)(input_ids=token, position_ids=last + step, past_key_values=case.cache).logits
    return found


@pytest.mark.parametrize(
    ("name", "modalities"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_kept_tokens_logits_cache_and_generated_ids_equal_the_hand_gathered_eager_model(name, modalities):
    """Bit for bit, at every length, from one graph; the number of audios is part of it where it holds their encoder."""
    rows_of_case = prompts(name, modalities)
    cases = [(eager_case(name, row, modalities, ratio), ratio) for row in rows_of_case for ratio in (0.3, 0.8)]
    before = pruned(name, *modalities)._hawk_runtime.compilations
    for case, ratio in cases:
        model = pruned(name, *modalities, ratio=ratio)
        with torch.no_grad():
            output = model(**fresh(case.inputs))
        report = hawk_compile.report(model)
        assert report.keep_indices[0].tolist() == case.keep.tolist()
        assert report.visual_tokens.tolist() == [int(case.candidates.sum())]
        torch.testing.assert_close(report.scores[0, case.candidates].double(), case.scores, atol=1e-5, rtol=1e-4)
        assert torch.equal(output.logits, case.output.logits)
        for layer, eager in zip(output.past_key_values.layers, case.cache.layers, strict=True):
            assert torch.equal(layer.keys, eager.keys)
            assert torch.equal(layer.values, eager.values)
    left = ["audio"] if modalities == ("image",) else []
    assert ("with audio not among modalities=('image',) removes" in report.reason) == bool(left)
    assert model._hawk_runtime.compilations - before <= GRAPHS.get((name, modalities), 1)
    model = pruned(name, *modalities, ratio=cases[1][1])
    out = model.generate(**zoo.inputs(name, model, rows=rows_of_case[:1]), max_new_tokens=4, do_sample=False)
    assert out[0, cases[1][0].inputs["input_ids"].shape[1] :].tolist() == continued(name, cases[1][0], 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_audio", MIXED])
def test_rows_of_a_padded_batch_equal_the_rows_alone(name):
    model = pruned(name, "audio")
    inputs = zoo.inputs(name, model, rows=[Row(audio=(8,)), Row(audio=(16, 8), after=2)])
    audios = [slice(0, 1), slice(1, None)]  # of both rows; input_features holds them one after another
    options = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**inputs, **options)
    report = hawk_compile.report(model)
    assert report.visual_tokens.tolist() == [8, 24]
    for row, mine in enumerate(audios):
        real = inputs["attention_mask"][row].bool()
        alone = {key: value[mine] if "feature" in key else value[row : row + 1, real] for key, value in inputs.items()}
        single = model.generate(**alone, **options)
        kept = hawk_compile.report(model).keep_indices[0] + int((~real).sum())
        assert report.keep_indices[row].tolist() == kept.tolist()
        for batched, one in zip(out.logits, single.logits, strict=True):
            torch.testing.assert_close(batched[row], one[0], **ROUNDING)


@pytest.mark.parametrize(("asked", "row"), [(("image", "video"), Row(audio=(8,))), (("audio",), Row(images=((3, 4),)))])
def test_what_was_not_asked_for_runs_as_before(asked, row):
    """The prompt, and the step behind it, whose position depends on images."""
    model, eager = pruned(MIXED, *asked), plain(MIXED)
    inputs = zoo.inputs(MIXED, model, rows=[row])
    with torch.no_grad():
        expected = eager(**inputs)
        token = expected.logits[:, -1:].argmax(-1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], 1)
        position = (mask.sum(1) - 1 + eager.base_model.rope_deltas).expand(3, 1, 1)
        after = eager(
            input_ids=token, attention_mask=mask, position_ids=position, past_key_values=expected.past_key_values
        )
        found = model(**inputs)
        report = hawk_compile.report(model)
        model.base_model.rope_deltas = torch.tensor([[99]])  # another conversation's by now
        step = model(input_ids=token, attention_mask=mask, past_key_values=found.past_key_values)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(step.logits, after.logits)
    assert "not among modalities" in report.reason
    assert report.kept_tokens == report.prompt_tokens


@pytest.mark.parametrize("given", [(), ("audio", "audio"), ("sound",), ["audio"], "audio"])
def test_settings(given):
    with pytest.raises(ConfigError, match="modalities must be a tuple of one or more of image, video, audio, each"):
        hawk_compile.HawkConfig(modalities=given)


def test_calls_that_are_refused():
    model = pruned("qwen2_audio", "audio")
    inputs = zoo.inputs("qwen2_audio", model, rows=[Row(audio=(8,))])
    ids = inputs["input_ids"]
    first = (ids == common.AUDIO) & ((ids == common.AUDIO).cumsum(1) == 1)
    unexpanded = ids[(ids != common.AUDIO) | first][None]
    with torch.no_grad():
        with pytest.raises(InputError, match=r"has 1 placeholders .* but 8 visual features were encoded: give the"):
            model(**inputs | {"input_ids": unexpanded, "attention_mask": torch.ones_like(unexpanded)})
        with pytest.raises(InputError, match="without feature_attention_mask"):
            model(**{key: value for key, value in inputs.items() if key != "feature_attention_mask"})
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(UnsupportedCallError, match="merges into input_ids only: give"):
            model(**{key: value for key, value in inputs.items() if key != "input_ids"}, inputs_embeds=embeds)
        expected = model.generate(**inputs, max_new_tokens=2)
        assert expected.shape == (1, ids.shape[1] + 2)  # and the model goes on
        with pytest.warns(UserWarning, match="prefill_chunk_size=4 is passed over"):
            assert model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=4).equal(expected)


def test_models_that_do_not_take_what_is_asked():
    for name in ("voxtral", "qwen2_audio"):
        with pytest.raises(UnsupportedModelError, match=r"takes audio, so give modalities=\('audio',\)"):
            hawk_compile.optimize(plain(name))
    with pytest.raises(UnsupportedModelError, match=r"LlavaFor.* takes image, so give modalities=\('image',\)"):
        hawk_compile.optimize(zoo.build("llava", layers=1), modalities=("audio",))


def test_inspection():
    found = hawk_compile.inspect(plain("voxtral").config, image_tokens=64, text_tokens=20, layers=1)
    assert (found.placeholders, found.form) == ((common.AUDIO,), "folded")
    assert (found.prompt_tokens, found.kept_tokens) == (84, 33)
    assert ("1", "S", "64") in [each.shape for each in found.gathered]
    with pytest.raises(UnsupportedModelError, match="encodes audio in the middle of its forward"):
        hawk_compile.inspect(plain("qwen2_audio").config)


def test_audio_is_exported_only_where_it_is_asked_for(tmp_path):
    """`tests/exporting/test_types.py` exports it."""
    for name, error, match in (
        ("voxtral", UnsupportedModelError, r"it takes audio, so give modalities=\('audio',\)"),
        (MIXED, ExportError, "the inputs have audio, and modalities=.* leave that whole"),
    ):
        model = plain(name)
        inputs = zoo.inputs(name, model, rows=[Row(audio=(8,), images=((3, 4),) if name == MIXED else ())])
        with pytest.raises(error, match=match):
            hawk_compile.export(model, inputs, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_backend_knows_no_modalities():
    from hawk_compile.compile.backend import hawk

    graph = torch.fx.symbolic_trace(torch.nn.Identity())
    with pytest.raises(ConfigError, match="needs the ids of placeholders"):
        hawk(graph, [], options={"modalities": ("image",)})
