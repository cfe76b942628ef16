"""`hawk::plan`: a marker that carries the pruning plan of one prefill into the captured graph.

The caller of a captured forward puts one `hawk::plan` beside it. Its arguments become inputs of the graph, so the plan
(which tokens vote, how many visual tokens each row keeps, the new lengths) can change with every call without another
compilation; its results become outputs of the graph. The marker computes nothing: a pass replaces its results by the
scores and positions that were used.

The two lengths travel as shapes, since only a shape gives the graph a symbolic size without reading from the device.
"""

import torch
from torch import Tensor

from hawk_compile.kernels.errors import MarkerError

VISUAL_OFFSET = 2
"""Added to V': Dynamo specialises sizes 0 and 1, and a row may well keep a single visual token. Not to S', which is 2
or more with the text that votes: half of a graph's shapes hold it, and a sum in each would make compiling slower."""


def slots(length: int, visual: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tensors without elements, [S', 0] and [V' + VISUAL_OFFSET, 0], whose first sizes carry S' and V' into a graph."""
    return torch.empty((length, 0), device=device), torch.empty((visual + VISUAL_OFFSET, 0), device=device)


@torch.library.custom_op("hawk::plan", mutates_args=())
def plan(
    question_mask: Tensor,
    budget: Tensor,
    head_weights: Tensor,
    slots: Tensor,
    visual_slots: Tensor,
    candidates: Tensor | None = None,
    least: Tensor | None = None,
    image: Tensor | None = None,
    floor: Tensor | None = None,
    question_images: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Carry a pruning plan into a graph and its outcome out of it.

    Args:
        question_mask: [B, S] bool or float: which text votes, or how much; [B, G, S] where images have G questions.
        budget: [B] int64: the number of visual tokens that each row keeps.
        head_weights: [H] float32: the weight of each query head of the scoring layer.
        slots: [S', 0]: carries S', the length of every row after pruning.
        visual_slots: [V' + VISUAL_OFFSET, 0]: carries V', the number of visual tokens kept over all rows.
        candidates: [B, S] bool: the visual tokens that may be removed; None: all that the graph merges.
        least: [B] int64: the least that each row keeps, where the graph finds the number itself; `budget` is then the
            most, and S' and V' are found in the graph too.
        image, floor: [B, S] int64: which image each visual token belongs to, and how many tokens that keeps at least.
        question_images: [B, G, S] bool: the visual tokens that each question scores; None: one question scores all.

    Returns:
        keep [B, S'] int64 (positions), valid [B, S'] bool (False = padding), scores [B, S] float32.

    Raises:
        MarkerError: always, when it is run: a graph that still holds it was never rewritten.
    """
    raise MarkerError(
        "hawk::plan was run, but it only marks a graph for the passes: compile the function that calls it with the "
        "'hawk' backend, which replaces it; an optimised model does so itself, unless torch.compile is switched off "
        "(TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE): switch it on, or hawk_compile.restore the model"
    )


@plan.register_fake
def _(
    question_mask: Tensor,
    budget: Tensor,
    head_weights: Tensor,
    slots: Tensor,
    visual_slots: Tensor,
    candidates: Tensor | None = None,
    least: Tensor | None = None,
    image: Tensor | None = None,
    floor: Tensor | None = None,
    question_images: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, length = question_mask.shape[0], question_mask.shape[-1]
    keep = budget.new_empty((rows, slots.shape[0]), dtype=torch.int64)
    return keep, torch.empty_like(keep, dtype=torch.bool), head_weights.new_empty((rows, length))
