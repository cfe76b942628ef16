"""The newest user's text votes, in every chat format, and nothing else: by the template, and from the ids alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from hawk_compile.plan.chat import ChatFormat
from hawk_compile.plan.ids import read_ids
from hawk_compile.plan.question import Question, find_question
from hawk_compile.plan.row import QuestionRule
from tests.plan import formats
from tests.plan.formats import FORMATS, Talk, question

ALIKE = ("q1a q1d q1c", "q1a q1e q1c")
SITUATIONS = {
    "one turn": Talk(((question(1), 1, 0),)),
    "one turn, no header": Talk(((question(1), 1, 0),), generation=False),
    "system": Talk(((question(1), 1, 0),), system=True),
    "before the image": Talk(((question(1), 0, 1),)),
    "before the image, system": Talk(((question(1), 0, 1),), system=True),
    "before the image, no header": Talk(((question(1), 0, 1),), generation=False),
    "two": Talk(((question(1), 1, 0), (question(2), 0, 0))),
    "two, system": Talk(((question(1), 1, 0), (question(2), 0, 0)), system=True),
    "two, no header": Talk(((question(1), 1, 0), (question(2), 0, 0)), generation=False),
    "three": Talk(((question(1), 1, 0), (question(2), 0, 0), (question(3), 0, 0))),
    "three, system": Talk(((question(1), 1, 0), (question(2), 0, 0), (question(3), 0, 0)), system=True),
    "three, no header": Talk(((question(1), 1, 0), (question(2), 0, 0), (question(3), 0, 0)), generation=False),
    "four": Talk(((question(1), 1, 0), (question(2), 0, 0), (question(3), 0, 0), (question(4), 0, 0))),
    "image in the third": Talk(((question(1), 0, 0), (question(2), 0, 0), (question(3), 1, 0), (question(4), 0, 0))),
    "image in the last": Talk(((question(1), 0, 0), (question(2), 1, 0))),
    "image in the last, behind": Talk(((question(1), 0, 0), (question(2), 0, 1)), system=True),
    "images in both": Talk(((question(1), 1, 0), (question(2), 2, 0))),
    "images in both, no header": Talk(((question(1), 1, 0), (question(2), 1, 0)), system=True, generation=False),
    "empty": Talk(((question(1), 1, 0), ("", 0, 0))),
    "empty, system": Talk(((question(1), 1, 0), ("", 0, 0)), system=True),
    "empty with an image": Talk(((question(1), 1, 0), ("", 1, 0))),
    "empty third": Talk(((question(1), 1, 0), (question(2), 0, 0), ("", 0, 0))),
    "long": Talk(((question(1, 5), 1, 0), (question(2, 5), 0, 0))),
    "one word": Talk(((question(1, 1), 1, 0), (question(2, 1), 0, 0))),
    "the same again": Talk(((question(1), 1, 0), (question(1), 0, 0))),
    "the first again": Talk(((question(1), 1, 0), (question(2), 0, 0), (question(1), 0, 0))),
    "one word differs": Talk(((question(1), 1, 0), (ALIKE[0], 0, 0), (ALIKE[1], 0, 0))),
    "new lines": Talk((("q1a \n q1b", 1, 0), ("q2a \n q2b", 0, 0))),
    "tool": Talk(((question(1), 1, 0),), tool=True),
    "tool, system": Talk(((question(1), 1, 0), (question(2), 0, 0)), tool=True, system=True),
}  # fmt: skip
TAKEN = {
    name: [situation for situation, talk in SITUATIONS.items()
           if (form.system or not talk.system) and (form.tools or not talk.tool)]
    for name, form in FORMATS.items()
}  # fmt: skip

ROLES_ALIKE = dict.fromkeys(
    ("qwen", "qwen thinking", "no new lines", "internvl"), "a tool's message has the user's role"
)
UNTOLD = {
    **{(name, tool): why for tool in ("tool", "tool, system") for name, why in ROLES_ALIKE.items()},
    **{("mistral", tool): "what stands behind a closed answer is a user's" for tool in ("tool", "tool, system")},
    **{(name, situation): "no end-of-turn id yet: the header behind the only turn is text like any"
       for name in ("vicuna", "mistral")
       for situation in ("one turn", "system", "before the image", "before the image, system")},
    **{(name, "before the image, no header"): "the same" for name in ("vicuna", "mistral")},
    ("mistral", "one turn, no header"): "the same",
    **{(name, "before the image, no header"): "no answer's header to know the user's by"
       for name in ("qwen", "qwen thinking", "no new lines", "llama 3", "gemma", "internvl", "smolvlm")},
    **{(name, "empty with an image"): "what the processor puts behind an image is text like any"
       for name in ("vicuna", "mistral", "gemma", "internvl", "smolvlm")},
    **{(name, "the same again"): "what ends both questions may be a header" for name in ("vicuna", "mistral")},
    ("qwen thinking", "new lines"): "the header ends with an id that stands in the question",
}  # fmt: skip
"""What the ids alone cannot tell, and why; the template can."""


def asked(
    name: str, talk: Talk, form: ChatFormat | None, left: bool = True, **settings: Any
) -> tuple[Question, list[str]]:
    """The question of a row that is padded beside a longer one."""
    line = formats.ids_of(name, talk)
    ids, visual, real = formats.batch(name, [line, [*line, *line[-3:]]], left)
    found = find_question(ids[:1], visual[:1], real[:1], formats.special_of(name), form, **settings)
    return found, formats.words_at(name, ids[0], found.mask[0].view(-1, ids.shape[1]).any(0)).split(" ")


def newest(talk: Talk) -> list[str]:
    return [text for text, _, _ in talk.turns if text][-1].split(" ")


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_the_newest_users_text_by_the_template(name: str, left: bool) -> None:
    for situation in TAKEN[name]:
        found, words = asked(name, SITUATIONS[situation], formats.chat(name), left)
        assert words == newest(SITUATIONS[situation]), situation
        assert found.rule == [QuestionRule.TEMPLATE], situation


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_the_newest_users_text_from_the_ids(name: str, left: bool) -> None:
    """All of it, and beside it at most what closes an image: ids that no setting of a model names."""
    for situation in TAKEN[name]:
        found, words = asked(name, SITUATIONS[situation], None, left)
        wanted = newest(SITUATIONS[situation])
        beside = {*FORMATS[name].image, "\n"} - {*wanted}
        left_over = [word for word in words if word not in beside]
        if (name, situation) in UNTOLD:
            assert words and left_over != wanted, f"{situation} works, and is written down as what does not"
        elif name in ("vicuna", "mistral") and situation == "one word differs":
            assert left_over == wanted[:-1], situation  # what ends all questions may be the header of answers
        else:
            assert left_over == wanted, situation
        assert found.rule == [QuestionRule.IDS]


def test_rows_of_a_batch_are_of_different_formats() -> None:
    """A row that the template did not make is read by its ids."""
    name = "qwen"
    words = formats.tokenizer(name)
    other = words.convert_tokens_to_ids(["<image>", "<image>", "q2a", "q2b"])
    ids, visual, real = formats.batch(name, [formats.ids_of(name, SITUATIONS["three"]), other])
    found = find_question(ids, visual, real, formats.special_of(name), formats.chat(name))
    assert found.rule == [QuestionRule.TEMPLATE, QuestionRule.IDS]
    assert [formats.words_at(name, row, mask) for row, mask in zip(ids, found.mask, strict=True)] == [
        question(3), "q2a q2b",
    ]  # fmt: skip


def test_every_image_has_the_text_of_its_own_turn() -> None:
    talk = Talk(((question(1), 1, 0), (question(2), 0, 0), (question(3), 2, 0)))
    for form in (formats.chat("qwen"), None):
        found, _ = asked("qwen", talk, form, own=True)
        assert found.images is not None
        line = formats.ids_of("qwen", talk)
        ids, visual, _ = formats.batch("qwen", [line, [*line, *line[-3:]]])
        assert [formats.words_at("qwen", ids[0], mask) for mask in found.mask[0]] == [question(1), question(3)]
        assert found.images[0].sum(1).tolist() == [formats.VISUAL, 2 * formats.VISUAL]
        assert found.images[0].any(0).equal(visual[0])


def test_own_and_newest_are_one_where_one_turn_has_images() -> None:
    for situation in ("one turn", "image in the last", "before the image"):
        newest_one, _ = asked("qwen", SITUATIONS[situation], formats.chat("qwen"))
        own, _ = asked("qwen", SITUATIONS[situation], formats.chat("qwen"), own=True)
        assert own.images is None and own.mask.equal(newest_one.mask)


def test_an_image_without_text_has_the_question_before_it() -> None:
    """Not one that comes later, which a cache of common prefixes does not know."""
    talk = Talk(((question(1), 1, 0), ("", 1, 0), (question(3), 0, 0)))
    found, _ = asked("llama 3", talk, formats.chat("llama 3"), own=True)
    line = formats.ids_of("llama 3", talk)
    ids, _, _ = formats.batch("llama 3", [line, [*line, *line[-3:]]])
    assert [formats.words_at("llama 3", ids[0], mask) for mask in found.mask[0]] == [question(1), question(1)]


def test_white_space_that_ends_a_header_may_be_joined_with_the_next() -> None:
    """As Gemma 3 has it: two ends of lines stand before an image, and three of them are one id."""
    user, answer, newline, two, three, end, image = 10, 11, 20, 21, 22, 3, 7
    chat = ChatFormat(opens=((user, newline),), closes=((end, newline),), blank=(newline, two, three), special=(3, 7))
    first = [user, newline, 30, 31, end, newline, answer, newline, 35, end, newline]
    ids = np.array([*first, user, three, image, image, two, 32, 33, end, newline, answer, newline])
    spans = chat.turns(ids, np.array([end]))
    assert [[each for each in ids[start:stop].tolist() if each >= 30] for start, stop in spans] == [[30, 31], [32, 33]]
    assert len(chat.turns(ids[ids != three], np.array([end]))) == 1, "no white space at all: another header"


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_travels_as_json(name: str) -> None:
    assert ChatFormat.from_json(json.loads(json.dumps(formats.chat(name).to_json()))) == formats.chat(name)


def test_unknown_ids_are_no_header() -> None:
    """A prompt of embeddings: what no id is known of equals nothing, itself included."""
    special = formats.special_of("qwen")
    end, image = special.end_of_turn[0], 2
    ids = torch.tensor([[-1, -1, image, -1, -1, end, -1, -1, -1, -1, -1]])
    found = find_question(ids, ids == image, torch.ones_like(ids).bool(), special)
    assert found.mask[0].nonzero()[:, 0].tolist() == [6, 7, 8, 9, 10]


@pytest.mark.parametrize("name", FORMATS)
def test_a_prompt_of_embeddings_has_the_question_of_its_ids(name: str) -> None:
    """Of embeddings only those ids are known that the rule reads and the placeholder."""
    special = formats.special_of(name)
    for situation in TAKEN[name]:
        line = formats.ids_of(name, SITUATIONS[situation])
        ids, visual, real = formats.batch(name, [line, [*line, *line[-3:]]])
        known = torch.isin(ids, torch.tensor(read_ids(special, formats.chat(name)))) | visual
        whole = find_question(ids, visual, real, special, formats.chat(name))
        found = find_question(ids.masked_fill(~known, -1), visual, real, special, formats.chat(name))
        assert found.rule == whole.rule and found.source == whole.source and found.mask.equal(whole.mask), situation
