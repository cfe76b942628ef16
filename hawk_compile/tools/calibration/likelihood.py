"""How likely a model finds the right answer: a metric without the luck of what it happens to say."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hawk_compile.capture.features import fresh
from hawk_compile.errors import InputError
from hawk_compile.tools.checkpoints import rendered
from hawk_compile.tools.evaluation.sample import Sample

LIKELIHOOD = "likelihood"


@torch.no_grad()
def likelihoods(model: Any, processor: Any, inputs: dict[str, Any], samples: Sequence[Sample]) -> list[float]:
    """The mean log-likelihood of the tokens of each sample's first answer, in nats a token.

    Args:
        inputs: an encoded batch, as `evaluation.asking.encoded` makes it: padded on the left.

    Raises:
        InputError: an answer without a token, or that the model gives no number for.
    """
    wanted = [behind(processor, each) for each in samples]
    longest = max(map(len, wanted))
    ids = torch.tensor([each + each[-1:] * (longest - len(each)) for each in wanted], device=model.device)
    counts = torch.tensor([len(each) for each in wanted], device=model.device)
    out = model.generate(
        **fresh(inputs), max_new_tokens=longest, min_new_tokens=longest, do_sample=False, output_logits=True,
        return_dict_in_generate=True, logits_processor=[Forced(inputs["input_ids"].shape[1], ids)],
    )  # fmt: skip
    steps = zip(out.logits, ids.split(1, 1), strict=True)  # [B, vocabulary] and [B, 1]
    found = torch.cat([logits.float().log_softmax(-1).gather(1, said) for logits, said in steps], 1)
    real = torch.arange(longest, device=model.device) < counts.unsqueeze(1)
    unknown = (~found.isfinite() & real).any(1)
    if bool(unknown.any()):
        sample = samples[int(unknown.int().argmax())]
        raise InputError(
            f"{sample.origin}: the likelihood of the answer {sample.answers[0]!r} must be a number, and the model "
            "gives none: look for weights that are not finite, or leave the question out"
        )
    found = torch.where(real, found, 0.0)
    return (found.sum(1) / counts).tolist()


def behind(processor: Any, sample: Sample) -> list[int]:
    """The ids of the first answer as they follow the prompt, whose last characters may belong to its first token.

    Raises:
        InputError: an answer without a token.
    """

    def ids(text: str) -> list[int]:
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    text = rendered(processor, len(sample.images), sample.question)
    before, whole = ids(text), ids(text + sample.answers[0])
    found = whole[len(before) :] if whole[: len(before)] == before else ids(sample.answers[0])
    if not found:
        raise InputError(f"{sample.origin}: an answer must hold a token, got {sample.answers[0]!r}: give another one")
    return found


class Forced:
    """Lets generate say given tokens [B, T], whatever it would say."""

    def __init__(self, start: int, ids: Tensor):
        self.start, self.ids = start, ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.start
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, self.ids[:, step : step + 1], 0.0)
