"""Who votes, through forward and generate: in conversations of two kinds, and where the call says it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hawk_compile
from hawk_compile.plan import template as template_module
from tests import zoo
from tests.plan import formats
from tests.runtime import models
from tests.runtime.models import fresh, generate, prompt
from tests.zoo import Row
from tests.zoo import common as c

Q1, A1, Q2 = [60, 61, 62], [70, 71], [80, 81, 82, 83]
OTHER_Q1, OTHER_A1, OTHER_Q2 = [140, 141, 142], [72, 73], [120, 121, 122]
USER, ANSWER = [20, 21, 22], [20, 23, 22]
"""Headers that differ in the role."""


def chat(name: str, first: list[int], answer: list[int], second: list[int]) -> dict[str, Tensor]:
    """A chat about one picture: the id closes answers only (llava), or both roles (qwen2_5_vl)."""
    inputs = prompt(name, Row(images=zoo.sizes(name)[4].images, before=0, after=0, tail=None))
    image = inputs["input_ids"][0].tolist()
    end = [c.END_OF_TURN]
    if name == "llava":
        ids = [*image[:1], 20, *image[1:], *first, 22, *answer, *end, 20, *second, 22]
    else:
        ids = [*USER, *image[1:], *first, *end, *ANSWER, *answer, *end, *USER, *second, *end, *ANSWER]
    replaced = ("input_ids", "attention_mask", "mm_token_type_ids")
    kept = {key: value for key, value in inputs.items() if key not in replaced}
    line = torch.tensor([ids])
    kinds = {"mm_token_type_ids": (line == c.IMAGE).long()} if "mm_token_type_ids" in inputs else {}
    return {"input_ids": line, "attention_mask": torch.ones_like(line), **kinds, **kept}


@torch.no_grad()
def scored(model: Any, inputs: dict[str, Tensor], **asked: Any) -> tuple[Tensor, hawk_compile.Report]:
    """The scores of the image's tokens."""
    model(**inputs, **asked)
    report = hawk_compile.report(model)
    return report.scores[0][inputs["input_ids"][0] == c.IMAGE], report


@pytest.fixture(scope="module", params=["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def named_model(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, fresh(request.param)


def test_the_newest_question_votes_alone(named_model: tuple[str, Any]) -> None:
    name, model = named_model
    scores, report = scored(model, chat(name, Q1, A1, Q2))
    assert report.query_source == ["after_image"] and report.question_rule == ["ids"]
    assert scored(model, chat(name, OTHER_Q1, A1, Q2))[0].equal(scores)
    assert scored(model, chat(name, Q1, OTHER_A1, Q2))[0].equal(scores)
    other, _ = scored(model, chat(name, Q1, A1, OTHER_Q2))
    assert float((other - scores).abs().max()) > 0.01


def test_a_call_says_who_votes(named_model: tuple[str, Any]) -> None:
    """As ids or as a mask, in forward and in generate, with beams; nothing of it reaches the model."""
    name, model = named_model
    inputs = chat(name, Q1, A1, Q2)
    ids = inputs["input_ids"]
    newest, _ = scored(model, inputs)
    mask = torch.isin(ids, torch.tensor(Q1))
    by_mask, report = scored(model, inputs, question_mask=mask)
    assert report.query_source == ["given"] and report.question_rule == ["given"]
    assert not by_mask.equal(newest)
    assert scored(model, inputs, question_ids=[Q1])[0].equal(by_mask)
    assert scored(model, inputs, question_ids=torch.tensor([Q2]))[0].equal(newest)
    for asked in ({"question_mask": mask}, {"question_ids": [Q1]}):
        for options in ({}, {"num_beams": 2}, {"use_cache": False}):
            generate(model, inputs, 3, **asked, **options)
            found = hawk_compile.report(model).scores
            for row in found:
                torch.testing.assert_close(row[: ids.shape[1]][ids[0] == c.IMAGE], by_mask, **models.ROUNDING)
    with pytest.raises(hawk_compile.HawkError, match="either question_ids or question_mask"):
        scored(model, inputs, question_ids=[Q1], question_mask=mask)
    longer = torch.cat([mask, mask[:, :5]], 1)
    for shape in (mask[:, 1:], longer, longer.flip(1), mask[0], mask[:, :, None]):
        with pytest.raises(hawk_compile.HawkError, match="question_mask must have shape"):
            scored(model, inputs, question_mask=shape)
    for ids_of_rows in (Q1, [None], ["why"], torch.tensor([[Q1]]), torch.tensor(7), [[[7]]]):
        with pytest.raises(hawk_compile.HawkError, match="question_ids must be"):
            scored(model, inputs, question_ids=ids_of_rows)
    assert scored(model, inputs, question_ids=[torch.tensor(Q1)])[0].equal(by_mask)
    with pytest.raises(hawk_compile.HawkError, match=r"question_ids of row 0, .* does not stand in that row"):
        scored(model, inputs, question_ids=[[*Q1, 99]])
    with pytest.raises(ValueError, match="question_idz"):
        generate(model, inputs, 2, question_idz=[Q1])


@pytest.mark.parametrize(("name", "settings"), [
    pytest.param("llava", {}, marks=pytest.mark.slow), ("qwen3_vl", {}), ("llava", {"query": "content"}),
])  # fmt: skip
def test_own_questions(name: str, settings: dict[str, Any]) -> None:
    """Each image is scored as where it stands alone with its question: folded, projected and by single tokens."""
    picture = Row(images=zoo.sizes(name)[0].images, before=0, after=0, tail=None)
    inputs = prompt(name, Row(images=picture.images * 2, before=0, between=0, after=0, tail=None))
    image = prompt(name, picture)["input_ids"][0].tolist()[1:]
    turns = [[*USER, *image, *asked, c.END_OF_TURN] for asked in (Q1, Q2)]
    line = torch.tensor([[*turns[0], *ANSWER, *A1, c.END_OF_TURN, *turns[1], *ANSWER]])
    inputs |= {"input_ids": line, "attention_mask": torch.ones_like(line)}
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (line == c.IMAGE).long()
    own = fresh(name, question="own", **settings)
    newest = fresh(name, **settings)
    scores, report = scored(own, inputs)
    assert report.query_source == ["after_image"]
    half = len(scores) // 2
    for place, asked in ((slice(0, half), Q1), (slice(half, None), Q2)):
        # The same score over one image alone: the other one's tokens are no part of the row's norm.
        one = {**inputs, "input_ids": torch.tensor([[*USER, *image, *asked, c.END_OF_TURN, *ANSWER]])}
        one["attention_mask"] = torch.ones_like(one["input_ids"])
        if "mm_token_type_ids" in one:
            one["mm_token_type_ids"] = (one["input_ids"] == c.IMAGE).long()
        for key in ("pixel_values", "image_grid_thw"):
            if key in one:
                count = len(one[key]) // 2
                one[key] = one[key][:count] if asked is Q1 else one[key][count:]
        alone, _ = scored(newest, one)
        torch.testing.assert_close(scores[place], alone, **models.ROUNDING)


def test_own_is_newest_where_the_newest_turn_has_the_images() -> None:
    inputs = prompt("llava", zoo.sizes("llava")[4])
    assert scored(fresh("llava", question="own"), inputs)[0].equal(scored(models.pruned("llava"), inputs)[0])


def test_what_cannot_have_own_questions_is_refused_by_name() -> None:
    with pytest.raises(hawk_compile.HawkError, match='selector "cdpruner" compares all images with one'):
        hawk_compile.HawkConfig(question="own", selector="cdpruner")
    with pytest.raises(hawk_compile.HawkError, match="question must be one of newest, own"):
        hawk_compile.HawkConfig(question="last")
    with pytest.raises(hawk_compile.HawkError, match="processor must be a processor or tokenizer"):
        hawk_compile.HawkConfig(processor="Qwen/Qwen2.5-VL-7B-Instruct")


def test_the_processors_template_says_who_votes() -> None:
    """The report says which it was; ids that it did not make are read as ids."""
    model = fresh("llava", processor=formats.tokenizer("vicuna"))
    words = formats.tokenizer("vicuna")
    image = [c.IMAGE] * 16
    said = words.convert_tokens_to_ids(["USER", ":"])
    line = torch.tensor([[*said, *image, 60, 61, *words.convert_tokens_to_ids(["ASSISTANT", ":"])]])
    inputs = {**prompt("llava", zoo.sizes("llava")[0]), "input_ids": line, "attention_mask": torch.ones_like(line)}
    scores, report = scored(model, inputs)
    assert report.question_rule == ["template"] and report.chat_template == "chat template of processor"
    assert scored(model, inputs, question_ids=[[60, 61]])[0].equal(scores)
    _, report = scored(models.pruned("llava"), inputs)
    assert report.question_rule == ["ids"]
    assert report.chat_template == "none: the model was not loaded from a checkpoint"


@torch.no_grad()
def test_a_prompt_of_embeddings_has_the_question_of_its_ids() -> None:
    """With a special id behind the image, which stands in no header."""
    words = formats.tokenizer("mistral")
    model = fresh("llava", processor=words)
    before, after = (
        words.convert_tokens_to_ids(text.split()) for text in ("<s> [INST]", "[IMG_END] q1a q1b q1c [/INST]")
    )
    line = torch.tensor([[*before, *[c.IMAGE] * 16, *after]])
    inputs = {**prompt("llava", zoo.sizes("llava")[0]), "input_ids": line, "attention_mask": torch.ones_like(line)}
    scores, report = scored(model, inputs)
    assert scored(model, inputs, question_ids=[after[1:-1]])[0].equal(scores)
    embedded = {name: value for name, value in inputs.items() if name != "input_ids"}
    model(**embedded, inputs_embeds=model.get_input_embeddings()(line))
    other = hawk_compile.report(model)
    assert other.question_rule == report.question_rule == ["template"]
    torch.testing.assert_close(other.scores[0][line[0] == c.IMAGE], scores, **models.ROUNDING)


def test_a_processor_is_learned_from_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By every call until it can be learned from; a checkpoint's is tried again."""
    words = formats.tokenizer.__wrapped__("mistral")
    template, words.chat_template = words.chat_template, None
    model, inputs = fresh("llava", processor=words), prompt("llava", zoo.sizes("llava")[0])
    for call in (model, model.generate):
        with pytest.raises(hawk_compile.HawkError, match=r"processor=.*has no chat template"):
            call(**inputs)
    words.chat_template = template
    assert scored(model, inputs)[1].chat_template == "chat template of processor"
    model = fresh("llava")
    monkeypatch.setattr(template_module, "source_at", lambda path: 1 / 0)
    assert "ZeroDivisionError" in scored(model, inputs)[1].chat_template
    monkeypatch.setattr(template_module, "source_at", lambda path: words)
    assert scored(model, inputs)[1].chat_template == "chat template of the checkpoint"
