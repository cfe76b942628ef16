"""What pruning made of one question about one picture: scores, kept tokens and answers, laid out as the picture is.

Each head's own map comes from a prefill in which it alone has weight; head weights are inputs of the compiled graph, so
that nothing is compiled for them.
"""

import math
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from hawk_compile.capture.modalities import modalities_of, visual_places
from hawk_compile.errors import InputError
from hawk_compile.progress import Listener, Progress, nobody
from hawk_compile.runtime.api import report
from hawk_compile.runtime.checks import check_model
from hawk_compile.runtime.wholes import pruned_part
from hawk_compile.settings.config import HawkConfig, check_at_least_1, make_config
from hawk_compile.settings.head_weights import resolve
from hawk_compile.tools.checkpoints import fit, prompt
from hawk_compile.tools.evaluation.sample import picture
from hawk_compile.tools.pictures.seen import Seen
from hawk_compile.tools.switching import left_as_it_was


def show(
    model: PreTrainedModel,
    processor: Any,
    image: "Image.Image | str | PathLike[str]",
    question: str,
    config: HawkConfig | None = None,
    *,
    max_new_tokens: int = 64,
    progress: Listener = nobody,
    **settings: Any,
) -> Seen:
    """Ask with and without pruning, and find what each head looks for. The model is left as it was.

    Args:
        model, processor: as for `evaluate`.
        image: a picture, or its file.
        config, **settings: as for `optimize`.
        max_new_tokens: most tokens of an answer.
        progress: told how many of the heads' prefills are done.

    Raises:
        ConfigError, HeadWeightsError, UnsupportedModelError, GraphError: as `optimize`.
        InputError: a picture that cannot be read, or whose visual tokens do not form one grid.
    """
    model = pruned_part(model)
    check_model(model)
    check_at_least_1("max_new_tokens", max_new_tokens)
    made = make_config(config, settings)
    opened = picture(image if isinstance(image, Image.Image) else Path(image), "image")
    inputs = fit(model, prompt(processor, [opened], question))
    visual = visual_places(model, inputs["input_ids"][:1].cpu(), modalities_of(model, inputs))[0]
    shape = grid(inputs, int(visual.sum()))
    weights = resolve(made.used_head_weights, model).values
    progress(Progress(0, len(weights)))
    with left_as_it_was(model) as switch:
        switch(None)
        unpruned = said(model, processor, inputs, max_new_tokens)
        switch(made)
        answer = said(model, processor, inputs, max_new_tokens)
        pruned = report(model)
        heads = []
        for head in range(len(weights)):
            switch(of_one_head(made, head, len(weights)))
            with torch.no_grad():
                model(**inputs)
            heads.append(laid_out(report(model).scores, visual, shape))
            progress(Progress(head + 1, len(weights)))
    kept = torch.zeros_like(visual)
    kept[pruned.keep_indices[0].cpu()] = True
    return Seen(
        opened, question, made.ratio, str(made.method), kept[visual].reshape(shape).numpy(),
        laid_out(pruned.scores, visual, shape), np.stack(heads), weights.tolist(), answer, unpruned,
    )  # fmt: skip


def of_one_head(config: HawkConfig, head: int, heads: int) -> HawkConfig:
    """The config's score, by one of its heads alone, as the ranking."""
    alone = tuple(float(number == head) for number in range(heads))
    query, normalization = config.used_query, config.used_normalization
    return replace(config, selector="hawk", query=query, normalization=normalization, head_weights=alone)


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
        f"image becomes {count} visual tokens that are no single grid (tiles, or separators between rows): look at "
        "report(model).keep_indices instead; show draws models that see an image as one grid"
    )
