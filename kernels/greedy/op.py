"""The operator `hawk::greedy_order`."""

from importlib.util import find_spec

import torch
from torch import Tensor

from hawk_compile.kernels.errors import OperandError
from hawk_compile.kernels.greedy import lazy, reference

if find_spec("triton") is not None:
    from hawk_compile.kernels.greedy.triton_kernel import launch_greedy_order


@torch.library.custom_op("hawk::greedy_order", mutates_args=())
def greedy_order(
    features: Tensor, importance: Tensor, visual_mask: Tensor, budget: Tensor, rule: str, weight: float
) -> Tensor:
    """The order in which a greedy rule takes the visual tokens of every row, as scores that fall with it.

    O(k V D) for k tokens taken, and O(k^2 V) more with "dpp", which keeps [B, k, S] float32; O(V^2 D) for the first of
    "max_min". No V x V matrix is made.

    Args:
        features: [B, S, D], any float dtype; read at visual tokens only, compared by cosine similarity.
        importance: [B, S] float, of visual tokens; "max_min" does not read it.
        visual_mask: [B, S] bool, True at visual tokens.
        budget: [B] int64, visual tokens that each row keeps; its largest value is the number of steps.
        rule: "max_min" (DivPrune), "mmr" (IDPruner) or "dpp" (CDPruner); see `reference.py`.
        weight: of importance in "mmr", in [0, 1]; the others do not read it.

    Returns:
        [B, S] float32: highest at the token taken first, 0 where none was taken.

    Raises:
        OperandError: a rank, dtype, rule or weight that cannot be right.
    """
    if features.dim() != 3:
        raise OperandError(f"features must be [B, S, D]; got {tuple(features.shape)}. Pass the merged embeddings.")
    if visual_mask.shape != features.shape[:2] or visual_mask.dtype != torch.bool:
        raise OperandError(
            f"visual_mask must be [B, S] bool as features {tuple(features.shape)}; got {tuple(visual_mask.shape)} "
            f"{visual_mask.dtype}. Pass `mask != 0`."
        )
    if importance.shape != visual_mask.shape:
        raise OperandError(
            f"importance must be [B, S] like visual_mask {tuple(visual_mask.shape)}; got {tuple(importance.shape)}. "
            "Give one value per position."
        )
    if budget.dim() != 1 or budget.dtype != torch.int64:
        raise OperandError(
            f"budget must be [B] int64, one number per row; got {tuple(budget.shape)} {budget.dtype}. "
            "Convert it with .long()."
        )
    if rule not in reference.RULES:
        raise OperandError(f"rule must be one of {', '.join(reference.RULES)}; got {rule!r}.")
    if not 0 <= weight <= 1:
        raise OperandError(f"weight is the share of importance and must be in [0, 1]; got {weight!r}.")
    # Autocast would compare features in half precision.
    with torch.autocast(features.device.type, enabled=False):
        if features.is_cuda and find_spec("triton") is not None:
            return launch_greedy_order(features, importance, visual_mask, budget, rule, weight)
        by = lazy if features.device.type == "cpu" else reference  # elsewhere each look at a number would wait for it
        return by.greedy_order(features, importance, visual_mask, budget, rule, weight)


@greedy_order.register_fake
def _(features: Tensor, importance: Tensor, visual_mask: Tensor, budget: Tensor, rule: str, weight: float) -> Tensor:
    return importance.new_empty(visual_mask.shape, dtype=torch.float32)
