"""What is drawn: a model with what is compiled into its graph, and calls of it, both as JSON.

A model is drawn by a number; it serves hundreds of calls, which hypothesis draws and makes smaller where one fails.
"""

from __future__ import annotations

import random
from typing import Any

from hypothesis import strategies as st

from hawk_compile.settings.selectors import SELECTORS
from tests import zoo

Drawn = dict[str, Any]

NAMES = (*zoo.NAMES, *zoo.LATENT_NAMES, *zoo.AUDIO_NAMES)
BOTH_WAYS = ("gemma3", "paligemma")
"""Visual tokens attend both ways, so that a later turn may bring none."""
SHARED_IDS = ("glm4v", "smolvlm", "internvl")
"""Frames have the placeholders of images."""
EMBEDDED = ("qwen2_5_vl", "llava", "internvl", "qwen3_vl", "mistral3")
"""Held to take embeddings beside ids."""
EXPORTED = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_next")
DRAFTED = (None, "dynamic", "config")
"""Caches that transformers drafts on."""
MOST_TOKENS = MOST_ROWS = 4
KINDS = {"forward": 0.35, "chats": 0.4, "budgets": 0.4, "videos": 0.4, "later images": 0.3}
"""What a model's calls are, beside single turns of text and images through generate, and the share of models of which
they are: each kind is a graph of its own, or two."""
RATIOS = (0.0, 0.1, 0.25, 1 / 3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.999)


def model(number: int, inductor: float = 0.04, exports: float = 0.04) -> Drawn:
    """
    Args:
        inductor: the share of models that Inductor compiles.
        exports: the share of those that run as a folder of ONNX.
    """
    draw = random.Random(number)
    made: Drawn = {"name": NAMES[number % len(NAMES)]}
    way = draw.random()
    if way < inductor:
        made["backend"] = "inductor"
    elif way < inductor + exports:
        made |= {"name": draw.choice(EXPORTED), "format": "onnx"}
    if draw.random() < 0.5:
        made["selector"] = draw.choice(sorted(
            name for name, selector in SELECTORS.items() if selector.portable or "format" not in made))  # fmt: skip
    if draw.random() < 0.35:
        made["normalization"] = draw.choice(("l2", "softmax", "minmax"))
    if draw.random() < 0.35:
        made["query"] = draw.choice(("mean", "last", "each", "content"))
    if "format" not in made and draw.random() < 0.2:
        made["mass"] = draw.choice((0.3, 0.6, 0.9, 1.0))
    uniform = made.get("selector", "hawk") not in ("uniform", "fastv")
    if uniform and draw.random() < 0.6:
        made["head_weights"] = [round(draw.random(), 3) for _ in range(3)] + [1.0]
    if "format" not in made and draw.random() < 0.15:
        made["compile_decode"] = True
    refused = ("forward", "budgets", "later images", "videos") if "format" in made else ()
    made["calls"] = [kind for kind, share in KINDS.items() if draw.random() < share and kind not in refused]
    return made


def sizes(name: str) -> st.SearchStrategy[list[int]]:
    return st.sampled_from([list(size) for size in zoo.ARCHITECTURES[name].image_sizes])


@st.composite
def turns(draw: Any, name: str, most_images: int = 3, video: bool = False, audio: bool = False) -> Drawn:
    """One user's turn."""
    made: Drawn = {"before": draw(st.integers(0, 4)), "after": draw(st.integers(0, 12))}
    if made["before"] + made["after"] == 0:
        made["after"] = 1
    architecture = zoo.ARCHITECTURES[name]
    if most_images and architecture.image_sizes and (images := draw(st.lists(sizes(name), max_size=most_images))):
        made |= {"images": images, "between": draw(st.integers(0, 3))}
    if video and architecture.video_sizes and draw(st.booleans()):
        made["video"] = list(draw(st.sampled_from(architecture.video_sizes)))
        if name in SHARED_IDS:
            made.pop("images", None)
    if audio and architecture.audio_sizes and draw(st.integers(0, 3)):
        made["audio"] = list(draw(st.sampled_from(architecture.audio_sizes)))
    return made


@st.composite
def rows(draw: Any, name: str, video: bool, several: bool) -> Drawn:
    audio = name in zoo.AUDIO_NAMES
    count = draw(st.integers(1, 3)) if several else 1
    made = [draw(turns(name, video=video and number == 0, audio=audio)) for number in range(count)]
    if name == "llava_onevision" and count > 1:  # how an image is cut depends on how many there are in the row
        for turn in made[1:]:
            turn.pop("images", None)
    for turn in made[:-1]:
        turn["answer"] = draw(st.integers(1, 4))
    return {"turns": made, "tail": draw(st.sampled_from([2, 0, 1, None])), "seed": draw(st.integers(0, 999))}


@st.composite
def calls(draw: Any, made: Drawn) -> Drawn:
    """A call of a model that `model` has drawn, or of one with as many "rows" in every call, which one graph serves."""
    name, selector, kinds = made["name"], SELECTORS[made.get("selector", "hawk")], made["calls"]
    video = "videos" in kinds and draw(st.integers(0, 2)) == 2
    several = "chats" in kinds and name != "paligemma" and draw(st.booleans())
    most = made.get("rows", MOST_ROWS)
    drawn = draw(st.lists(rows(name, video, several), min_size=made.get("rows", 1), max_size=most))
    alike(name, drawn)
    call: Drawn = {"rows": drawn, "ratio": draw(st.sampled_from(RATIOS)), "tokens": draw(st.integers(1, MOST_TOKENS))}
    modes = ["generate"] * 6 + ["forward"] * 3 * ("forward" in kinds) + ["sample", "beams"]
    call["mode"] = draw(st.sampled_from(modes))
    if call["mode"] == "forward":
        call["side"] = draw(st.sampled_from(["left", "right"]))
    if draw(st.integers(0, 3)) == 3:
        call["asked"] = draw(st.sampled_from(["ids", "mask"]))
    if name not in zoo.AUDIO_NAMES and "budgets" in kinds:
        draw_budgets(draw, call, made)
    exported = "format" in made
    if several and not exported and not selector.reads("question_mask") and draw(st.booleans()):
        call["question"] = "own"
    if call["mode"] == "beams":
        call["beams"] = draw(st.integers(2, 3))
    if call["mode"] == "sample":
        call |= {"seed": draw(st.integers(0, 99)), "returns": draw(st.integers(1, 3))}
    if call["mode"] != "forward":
        caches = [None, None, "dynamic", *([] if exported else ["config", "static", "own_static", "none"])]
        call["cache"] = draw(st.sampled_from(caches))
    if call["mode"] == "generate":
        if len(drawn) == 1 and draw(st.integers(0, 5)) == 5:
            call["streamer"] = True
        if name in EMBEDDED and not exported and not several and draw(st.integers(0, 7)) == 7:
            call["embeds"] = True
        if not exported and call["cache"] != "none" and draw(st.integers(0, 9)) == 9:
            call["chunk"] = draw(st.integers(1, 20))
        if len(drawn) == 1 and not exported and call["cache"] in DRAFTED and draw(st.integers(0, 5)) == 5:
            call["lookup"] = draw(st.integers(1, 3))
        elif call["cache"] in ("dynamic", "config", "own_static") and not call.get("embeds"):
            call["turns"] = draw(st.lists(later_turns(name, "later images" in kinds), max_size=2))
    return call


def alike(name: str, drawn: list[Drawn]) -> None:
    """Leave out of rows what an architecture does not take beside what others have."""
    turns_ = [turn for row in drawn for turn in row["turns"]]
    filmed = [turn for turn in turns_ if turn.get("video")]
    if name == "glm4v" and filmed:
        for turn in turns_:
            turn.pop("images", None)
    if name == "llava_onevision":
        for turn in filmed:
            turn["video"] = filmed[0]["video"]


def draw_budgets(draw: Any, call: Drawn, made: Drawn) -> None:
    if draw(st.integers(0, 3)) == 3:
        call["min_per_image"] = draw(st.integers(1, 4))
    if "mass" not in made and draw(st.integers(0, 4)) == 4:
        call["quota"] = "image"
    if "mass" not in made and draw(st.integers(0, 4)) == 4:
        call["bucket"] = draw(st.integers(2, 24))
    if draw(st.integers(0, 5)) == 5:
        call["normalize_per"] = "image"
    if "mass" in made and draw(st.booleans()):
        low, high = sorted(draw(st.tuples(st.integers(1, 9), st.integers(1, 20))))
        call["bounds"] = draw(st.sampled_from([{"min": low}, {"max": high}, {"min": low, "max": high}, {"min": 0.2}]))


@st.composite
def later_turns(draw: Any, name: str, seen: bool) -> Drawn:
    made = draw(turns(name, most_images=1 if seen and draw(st.booleans()) else 0))
    return {**made, "tail": 2, "seed": draw(st.integers(0, 999))}
