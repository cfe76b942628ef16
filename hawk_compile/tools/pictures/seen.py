"""What pruning made of one question about one picture: scores, kept tokens and answers, laid out as the picture is.

Each head's own map comes from a prefill in which it alone has weight; head weights are inputs of the compiled graph, so
that nothing is compiled for them.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from hawk_compile.capture.modalities import placeholder_ids
from hawk_compile.errors import InputError
from hawk_compile.runtime.api import report
from hawk_compile.runtime.checks import check_model
from hawk_compile.settings.config import make_config
from hawk_compile.settings.head_weights import resolve
from hawk_compile.tools.checkpoints import fit, prompt
from hawk_compile.tools.evaluation.evaluate import at_least_1, left_as_it_was


@dataclass(frozen=True)
class Seen:
    """One question about one picture.

    Attributes:
        kept: [h, w] bool, of the picture's visual tokens.
        scores: [h, w] float, by which they were ranked.
        heads: [H, h, w] float, the score of each query head alone, as the selector normalises it and lets text vote.
        weights: [H] float, of the heads, as the selector used them.
        answer, unpruned: what the model says with and without pruning.
    """

    image: Image.Image
    question: str
    ratio: float
    selector: str
    kept: np.ndarray
    scores: np.ndarray
    heads: np.ndarray
    weights: list[float]
    answer: str
    unpruned: str


def look(
    model: PreTrainedModel, processor: Any, image: Image.Image, question: str, *, ratio: float = 0.8,
    max_new_tokens: int = 64, **settings: Any,
) -> Seen:  # fmt: skip
    """Ask with and without pruning. The model is left as it was.

    Args:
        ratio: fraction of visual tokens removed, in [0, 1).
        **settings: of `optimize`.

    Raises:
        ConfigError, HeadWeightsError, UnsupportedModelError, GraphError: as `optimize`.
        InputError: a picture whose visual tokens do not form one grid.
    """
    check_model(model)
    at_least_1("max_new_tokens", max_new_tokens)
    inputs = fit(model, prompt(processor, [image], question))
    visual = torch.isin(inputs["input_ids"][0].cpu(), torch.tensor(placeholder_ids(model)))
    shape = grid(inputs, int(visual.sum()))
    made = make_config(None, {"ratio": ratio, **settings})
    weights = resolve(made.used_head_weights, model).values
    single = {
        **settings, "selector": "hawk", "selector_options": {}, "query": made.used_query,
        "normalization": made.used_normalization,
    }  # fmt: skip
    with left_as_it_was(model) as switch:
        switch(0.0, None)
        unpruned = said(model, processor, inputs, max_new_tokens)
        switch(ratio, settings)
        answer = said(model, processor, inputs, max_new_tokens)
        found = report(model)
        kept = torch.zeros_like(visual)
        kept[found.keep_indices[0].cpu()] = True
        heads = []
        for head in range(len(weights)):
            alone = tuple(float(each == head) for each in range(len(weights)))
            switch(ratio, {**single, "head_weights": alone})
            with torch.no_grad():
                model(**inputs)
            heads.append(laid_out(report(model).scores, visual, shape))
    return Seen(
        image, question, ratio, str(made.method), kept[visual].reshape(shape).numpy(),
        laid_out(found.scores, visual, shape), np.stack(heads), weights.tolist(), answer, unpruned,
    )  # fmt: skip


def said(model: Any, processor: Any, inputs: dict[str, Tensor], max_new_tokens: int) -> str:
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def laid_out(scores: Tensor | None, visual: Tensor, shape: tuple[int, int]) -> np.ndarray:
    assert scores is not None
    return scores[0].cpu().float()[visual].reshape(shape).numpy()


def grid(inputs: dict[str, Tensor], count: int) -> tuple[int, int]:
    """Rows and columns of the visual tokens of the prompt's one picture.

    Raises:
        InputError: the model cuts the picture into tiles, or its tokens do not fill a grid.
    """
    sizes = inputs.get("image_grid_thw")
    if sizes is not None:  # patches, of which a square becomes one token
        _, rows, columns = sizes[0].tolist()
        side = math.isqrt(rows * columns // count)
        if rows * columns == side * side * count:
            return rows // side, columns // side
    pixels, side = inputs.get("pixel_values"), math.isqrt(count)
    if sizes is None and pixels is not None and pixels.shape[: pixels.ndim - 3].numel() == 1 and side * side == count:
        return side, side
    raise InputError(
        f"image becomes {count} visual tokens that are no single grid (tiles, or separators between rows): show draws "
        "models that see an image as one grid"
    )
