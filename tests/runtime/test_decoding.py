"""generate on an optimised model equals pruned decoding written out by hand, token by token."""

from __future__ import annotations

import pytest
import torch

import hawk_compile
from hawk_compile.errors import InputError, UnsupportedCallError
from tests import zoo
from tests.marks import slow
from tests.runtime.load.calls import Collected
from tests.runtime.models import (
    EVERY,
    ROUNDING,
    conversation,
    generate,
    new_tokens,
    picture,
    plain,
    prompt,
    pruned,
    rows_alone,
)
from tests.zoo import Row

TWO_IMAGES = {name: Row(images=zoo.sizes(name)[0].images + zoo.sizes(name)[4].images) for name in zoo.NAMES}
VIDEOS = {
    "qwen2_vl": (3, 2, 2), "qwen2_5_vl": (3, 2, 2), "qwen3_vl": (3, 2, 2), "glm4v": (3, 2, 2),
    "llava_onevision": (3, 1, 1), "internvl": (3, 1, 1), "smolvlm": (3, 1, 1),
}  # fmt: skip


FRAMES = ("qwen2_5_vl", "llava_onevision")
"""A video as a grid of patches, and as frames with a row of tokens each."""


def check_greedy(name: str, inputs: dict[str, torch.Tensor], tokens: int) -> None:
    out = generate(pruned(name), inputs, tokens)
    report = hawk_compile.report(pruned(name))
    by_hand = conversation(name, inputs)
    assert torch.equal(report.keep_indices[0], by_hand.keep)
    assert len(by_hand.keep) == report.kept_tokens < report.prompt_tokens == inputs["input_ids"].shape[1]
    torch.testing.assert_close(out.logits[0][0], by_hand.logits[-1], **ROUNDING)
    expected = []
    for step in out.logits:
        torch.testing.assert_close(step[0], by_hand.logits[-1], **ROUNDING)
        expected.append(int(by_hand.logits[-1].argmax()))
        by_hand.feed(expected[-1:])
    assert new_tokens(out, inputs) == expected
    assert out.sequences[:, : inputs["input_ids"].shape[1]].equal(inputs["input_ids"])


@pytest.mark.parametrize("name", EVERY)
def test_greedy(name: str) -> None:
    check_greedy(name, picture(name), 32)


@pytest.mark.parametrize("name", EVERY)
def test_several_images(name: str) -> None:
    check_greedy(name, prompt(name, TWO_IMAGES[name]), 4)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FRAMES else pytest.mark.slow) for name in zoo.VIDEO_NAMES],
)
def test_video(name: str) -> None:
    check_greedy(name, prompt(name, Row(video=VIDEOS[name])), 4)


@pytest.mark.parametrize("name", [*slow("qwen2_vl"), *FRAMES])
def test_image_and_video(name: str) -> None:
    """Two merges, one for each modality; scored and pruned together."""
    check_greedy(name, prompt(name, Row(images=zoo.sizes(name)[0].images, video=VIDEOS[name])), 4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow("llava")])
def test_sampling(name: str) -> None:
    """The same seed draws the same tokens, from the same distributions."""
    inputs = picture(name)
    torch.manual_seed(5)
    out = generate(pruned(name), inputs, 8, do_sample=True, top_k=0, num_return_sequences=3)
    by_hand = [conversation(name, inputs) for _ in range(3)]
    torch.manual_seed(5)
    for step in range(8):
        logits = torch.stack([each.logits[-1] for each in by_hand])
        torch.testing.assert_close(out.logits[step], logits, **ROUNDING)
        drawn = torch.multinomial(logits.softmax(-1), 1)[:, 0].tolist()
        assert out.sequences[:, inputs["input_ids"].shape[1] + step].tolist() == drawn
        for each, token in zip(by_hand, drawn, strict=True):
            each.feed([token])


@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow("gemma3")])
def test_beams(name: str) -> None:
    """Every beam's score is that of its tokens, forced through the hand-written loop; the best leads."""
    inputs = picture(name)
    out = generate(pruned(name), inputs, 6, num_beams=4, num_return_sequences=4, output_scores=True)
    assert len({tuple(row.tolist()) for row in out.sequences}) == 4
    found = []
    for row in range(4):
        by_hand, total = conversation(name, inputs), 0.0
        tokens = new_tokens(out, inputs, row)
        for token in tokens:
            total += float(by_hand.logits[-1].log_softmax(-1)[token])
            by_hand.feed([token])
        found.append(total / len(tokens))
    torch.testing.assert_close(out.sequences_scores, torch.tensor(found), atol=2e-5, rtol=1e-5)
    assert found == sorted(found, reverse=True)
    assert out.sequences.shape == (4, inputs["input_ids"].shape[1] + 6)


def test_beams_of_a_padded_batch_equal_those_of_its_rows() -> None:
    rows = [Row(images=((2, 2),)), Row(images=((4, 6), (1, 1)), after=2)]
    inputs = prompt("qwen2_5_vl", *rows)
    out = generate(pruned("qwen2_5_vl"), inputs, 5, num_beams=3, output_scores=True)
    for i, row in enumerate(rows_alone("qwen2_5_vl", inputs, rows)):
        alone = generate(pruned("qwen2_5_vl"), row, 5, num_beams=3, output_scores=True)
        assert new_tokens(alone, row) == new_tokens(out, inputs, i)
        torch.testing.assert_close(alone.sequences_scores[0], out.sequences_scores[i], atol=2e-5, rtol=1e-5)


def test_streaming() -> None:
    inputs, streamer = picture("qwen2_5_vl"), Collected()
    out = generate(pruned("qwen2_5_vl"), inputs, 8, streamer=streamer)
    assert streamer.ended and streamer.ids == out.sequences[0].tolist()


@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow("gemma3")])
def test_scores_and_hidden_states(name: str) -> None:
    inputs = picture(name)
    out = generate(pruned(name), inputs, 3, output_scores=True, output_hidden_states=True)
    kept = hawk_compile.report(pruned(name)).kept_tokens
    assert len(out.scores) == len(out.hidden_states) == 3
    for step, states in enumerate(out.hidden_states):
        assert len(states) == 3  # the embeddings and 2 layers
        assert all(state.shape == (1, 1 if step else kept, 64) for state in states), step
    by_hand = conversation(name, inputs)
    merged = plain(name).generate(**inputs, max_new_tokens=1, return_dict_in_generate=True, output_hidden_states=True)
    torch.testing.assert_close(out.hidden_states[0][0], merged.hidden_states[0][0][:, by_hand.keep], rtol=0, atol=0)
    last = plain(name).get_output_embeddings()(out.hidden_states[0][-1][0, -1:])
    torch.testing.assert_close(last[0], by_hand.logits[-1], **ROUNDING)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_text_only(name: str) -> None:
    """Bit for bit the plain model, and the report says why nothing was pruned."""
    inputs = zoo.text_only(name, plain(name))
    out, expected = generate(pruned(name), inputs, 4), generate(plain(name), inputs, 4)
    assert out.sequences.equal(expected.sequences)
    assert all(a.equal(b) for a, b in zip(out.logits, expected.logits, strict=True))
    report = hawk_compile.report(pruned(name))
    assert report.reason == "the prompt has no visual features"
    assert report.visual_tokens.tolist() == report.kept_visual_tokens.tolist() == [0]
    assert report.keep_indices[0].tolist() == list(range(inputs["input_ids"].shape[1]))


@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow("llava", "internvl")])
def test_embeddings_as_prompt(name: str) -> None:
    """Placeholders and the ends of images and turns are known by their embeddings: the same tokens as with ids."""
    inputs = picture(name)
    expected = generate(pruned(name), inputs, 4)
    kept = hawk_compile.report(pruned(name)).keep_indices[0]
    embeds = plain(name).get_input_embeddings()(inputs["input_ids"])
    out = generate(pruned(name), inputs | {"inputs_embeds": embeds}, 4)
    assert hawk_compile.report(pruned(name)).keep_indices[0].equal(kept)
    assert hawk_compile.report(pruned(name)).visual_tokens.tolist() == [zoo.visual_count(name, zoo.sizes(name)[4])]
    for found, wanted in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(found, wanted, **ROUNDING)


@pytest.mark.parametrize("keep", [*slow(0), *slow(1), 3])
def test_logits_to_keep(keep: int) -> None:
    inputs = picture("qwen2_5_vl")
    logits = pruned("qwen2_5_vl")(**inputs, logits_to_keep=keep).logits[0]
    expected = conversation("qwen2_5_vl", inputs).logits[-keep:]
    torch.testing.assert_close(logits, expected, **ROUNDING)


@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow("llava")])
def test_logits_at_positions(name: str) -> None:
    """Of tokens as they were counted before pruning; those behind the image stand elsewhere now."""
    inputs = picture(name)
    length, by_hand = inputs["input_ids"].shape[1], conversation(name, inputs)
    mask = torch.zeros(length, dtype=torch.bool)
    mask[[1, length - 4]] = True
    for asked, places in (
        (torch.tensor([length - 2, 0, -3]), [length - 2, 0, length - 3]), ([2, -1], [2, length - 1]),
        (slice(-4, -1), range(length - 4, length - 1)), (mask, [1, length - 4]), (mask[:0].nonzero()[:, 0], []),
    ):  # fmt: skip
        found = pruned(name)(**inputs, logits_to_keep=asked).logits[0]
        slots = [by_hand.keep.tolist().index(place) for place in places]
        torch.testing.assert_close(found, by_hand.logits[slots], **ROUNDING)


def test_logits_at_positions_of_a_padded_batch() -> None:
    """The same positions of each row, wherever what it kept stands; without pruning those of the plain model."""
    name, rows = "qwen2_5_vl", [Row(images=((2, 2),), after=6), Row(images=((4, 6), (1, 1)), after=3)]
    inputs = prompt(name, *rows)
    length, padding = inputs["input_ids"].shape[1], int((inputs["attention_mask"][0] == 0).sum())
    found = pruned(name)(**inputs, logits_to_keep=torch.tensor([length - 1, length - 3])).logits
    for i, (row, missing) in enumerate(zip(rows_alone(name, inputs, rows), (padding, 0), strict=True)):
        by_hand = conversation(name, row)
        slots = [by_hand.keep.tolist().index(place - missing) for place in (length - 1, length - 3)]
        torch.testing.assert_close(found[i], by_hand.logits[slots], **ROUNDING)
    with pytest.raises(UnsupportedCallError, match=rf"logits of padding \(\[{padding - 1}\] of row 0\)"):
        pruned(name)(**inputs, logits_to_keep=[length - 1, padding - 1])
    visual = int(zoo.visual_mask(name, plain(name), inputs)[1].nonzero()[0])
    assert visual >= padding or zoo.visual_mask(name, plain(name), inputs)[0, visual] == 0
    with pytest.raises(UnsupportedCallError, match=rf"logits of (visual tokens|padding) \(\[{visual}\] of row"):
        pruned(name)(**inputs, logits_to_keep=torch.tensor([length - 1, visual]))
    with torch.no_grad(), hawk_compile.pruned(pruned(name), ratio=0.0, backend="eager"):
        whole, expected = pruned(name)(**inputs, logits_to_keep=slice(None)).logits, plain(name)(**inputs).logits
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(whole[real], expected[real], **ROUNDING)


def test_logits_at_what_is_no_position() -> None:
    inputs = picture("llava")
    length = inputs["input_ids"].shape[1]
    for asked, match in (
        (torch.tensor([length]), f"must hold positions of a prompt of {length} tokens, got"), ("last", "got str"),
        (torch.ones(2), "float32"), (torch.ones(2, 2).long(), "int64 .*give one list of positions for all rows"),
        (torch.tensor(3), "positions .* or a mask"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            pruned("llava")(**inputs, logits_to_keep=asked)


def test_forward_as_tuple() -> None:
    inputs = picture("llava")
    expected = pruned("llava")(**inputs)
    found = pruned("llava")(**inputs, return_dict=False)
    assert isinstance(found, tuple) and found[0].equal(expected.logits)
    assert found[1].get_seq_length() == inputs["input_ids"].shape[1]
