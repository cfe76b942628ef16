"""What a server answers where `optimize` has no such unit: pictures cut into tiles, several of them in a prompt.

`optimize` knows tiles alone, and a server whole pictures. Of every picture by itself, in a turn of its own, both keep
the same; those tokens are then gathered in the whole prompt, and Hugging Face's own model reads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import hawk_compile
from tests import eager_reference
from tests.serving.cases import Conversation
from tests.serving.checkpoints import twin
from tests.serving.engine import ALONE, BOTH_WAYS, Answer, optimised, visual_of

TILED = ("internvl", "idefics3", "smolvlm", "cohere2_vision")


def known(folder: Path) -> Path:
    """The checkpoint as transformers reads it."""
    return twin(folder) if twin(folder).exists() else folder


def expected(folder: Path, asked: list[Conversation], answers: list[Answer], ratio: float) -> list[Answer]:
    """What a server answers, given what it did answer."""
    if ratio and folder.name in TILED:
        return gathered(known(folder), asked, answers, ratio=ratio)
    return optimised(known(folder), asked, ratio=ratio, **ALONE)


def kept_alone(folder: Path, asked: list[Conversation], **settings: Any) -> list[list[Tensor]]:
    """Of each picture of each conversation, [V] bool: which of its visual tokens stay."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    kept: list[list[Tensor]] = []
    with hawk_compile.pruned(model, backend="eager", **settings):
        for each in asked:
            of_pictures = []
            for turn in each.turns:
                last = max((at for at, part in enumerate(turn) if not isinstance(part, str)), default=0)
                for picture in (part for part in turn if not isinstance(part, str)):
                    alone = Conversation([[picture, *turn[last + 1 :]]])
                    inputs = processor(images=alone.images, text=alone.rendered(processor), return_tensors="pt")
                    inputs = inputs.to(torch.float32)
                    inputs.pop(BOTH_WAYS, None)
                    with torch.no_grad():
                        model(**inputs)
                    stays = torch.zeros(inputs["input_ids"].shape[1], dtype=torch.bool)
                    stays[hawk_compile.report(model).keep_indices[0]] = True
                    of_pictures.append(stays[visual_of(model, inputs["input_ids"])])
            kept.append(of_pictures)
    return kept


def gathered(folder: Path, asked: list[Conversation], answers: list[Answer], **settings: Any) -> list[Answer]:
    """The log-probabilities of the ids that a server answered with. The text behind a turn's last picture is its
    question."""
    kept = kept_alone(folder, asked, **settings)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for each, of_pictures, answer in zip(asked, kept, answers, strict=True):
        inputs = processor(images=each.images, text=each.rendered(processor), return_tensors="pt").to(torch.float32)
        pixels = {name: value for name, value in inputs.items() if value.is_floating_point() or "pixel" in name}
        count = inputs["input_ids"].shape[1]
        ids = inputs["input_ids"]
        visual, stays = visual_of(model, ids), torch.ones(count, dtype=torch.bool)
        stays[visual] = torch.cat(of_pictures)
        places = {"input_ids": ids, "position_ids": torch.arange(count).unsqueeze(0)}
        output, cache = eager_reference.pruned_forward(model, {**pixels, **places}, stays.nonzero()[:, 0], visual)
        with torch.no_grad():  # by itself, without pixels: an answer may hold the id of a picture
            said = torch.tensor([answer.ids[:-1]])
            behind = torch.arange(count, count + said.shape[1]).unsqueeze(0)
            spoken = model(input_ids=said, position_ids=behind, past_key_values=cache)
        rows = torch.cat([output.logits[0, -1:], spoken.logits[0]]).log_softmax(-1)
        logprobs = [row[number].item() for row, number in zip(rows, answer.ids, strict=True)]
        found.append(Answer(answer.ids, logprobs, int(stays.sum())))
    return found
