"""Where a graph is cut: the residual stream [B, S, ...] in front of the first attention that can score.

    merged -> attention                          entry = merged
    merged -> convolution, state -> attention    entry = what the layer of that attention adds to
    merged -> + learned positions -> attention   entry = the sum: tokens keep the positions that they have

Every layer whose tokens meet without keys (linear attention, a convolution, a state space) stands in front of the entry
and runs at full length. The entry is a *dominator*: each way by which a token's value comes from the merge to the
attention, or to anything computed from it, goes through it, so that nothing behind the cut sees what was removed. The
last one is taken. (A norm is none: the residual goes around it.)
"""

import re

import torch
from torch import Tensor, fx

from hawk_compile.passes.compat import TO_COPY
from hawk_compile.passes.errors import AttentionNotFoundError
from hawk_compile.passes.graph import ancestors, dependents, in_order, is_call, op_name, same, shape_of, tensor, value

TOKENWISE = frozenset(
    {
        "linear", "layer_norm", "rms_norm", "mean", "sum", "dropout", "clone", "contiguous", "alias", "detach", "to",
        "float", "half", "bfloat16", "type", "type_as", "truediv", TO_COPY,
    }
)  # fmt: skip
"""What works on each token by itself if values before and behind are [B, S, .], beside operators of single elements."""


def find_entry(merged: fx.Node, attention: fx.Node) -> fx.Node:
    """The value that is gathered.

    Raises:
        AttentionNotFoundError: layers without keys stand in front of the attention, and later ones read what stands in
            front of those.
    """
    after = dependents(merged)
    entry = last_dominator(merged, {attention} | dependents(attention), after)
    if entry is not merged:
        between = (ancestors(entry) & after) - {entry}
        needed = any(tokens_may_meet(node, merged) or adds_position(node, merged) for node in {*between, entry})
        return entry if needed else merged
    if layer := layer_of(attention):
        refuse_meeting_tokens(merged, attention, layer, after)
    return merged


def last_dominator(merged: fx.Node, targets: set[fx.Node], after: set[fx.Node]) -> fx.Node:
    """The last value with a row for each token that all ways of values from `merged` to any of the targets go through.

    Cooper, Harvey, Kennedy, "A Simple, Fast Dominance Algorithm": in a graph without circles one pass is enough.
    """
    place: dict[fx.Node, int] = {merged: 0}
    above: dict[fx.Node, fx.Node] = {merged: merged}

    def meet(left: fx.Node, right: fx.Node) -> fx.Node:
        while left is not right:
            if place[left] > place[right]:
                left = above[left]
            else:
                right = above[right]
        return left

    for number, node in enumerate(in_order(merged.graph, after), start=1):
        if not isinstance(value(node), (Tensor, tuple, list)):
            continue  # a size says nothing of a token
        sources = [source for source in node.all_input_nodes if source in above]
        if sources:
            place[node] = number
            above[node] = sources[0]
            for source in sources[1:]:
                above[node] = meet(above[node], source)
    common = next(target for target in targets if target in above)
    for target in targets & above.keys():
        common = meet(common, target)
    while common is not merged and (common in targets or not has_tokens(common, merged)):
        common = above[common]
    return common


def has_tokens(node: fx.Node, merged: fx.Node) -> bool:
    """Whether a value is [B, S, ...] with S in no other place, so that removing tokens is one gather."""
    found, whole = tensor(node), tensor(merged)
    assert whole is not None
    rows, length = whole.shape[:2]
    if found is None or found.ndim < 3 or not found.is_floating_point():
        return False
    return same(found.shape[0], rows) and same(found.shape[1], length) and not any(
        same(size, length) for size in found.shape[2:]
    )


def tokens_may_meet(node: fx.Node, merged: fx.Node) -> bool:
    """Whether a value may hold, for a token, what comes from another one."""
    found = tensor(node)
    if found is None or found.ndim != 3 or not has_tokens(node, merged):
        return True
    return not is_call(node, *TOKENWISE) and not works_on_elements(op_name(node))


def adds_position(node: fx.Node, merged: fx.Node) -> bool:
    """Whether a value of the merged embeddings' shape is a sum with another that does not come from them."""
    if not is_call(node, "add", "iadd"):
        return False
    after = dependents(merged) | {merged}
    whole = shape_of(merged)
    return any(
        source not in after and (found := tensor(source)) is not None and found.ndim >= 2
        and same(found.shape[-1], whole[-1]) and same(found.shape[-2], whole[1])
        for source in node.all_input_nodes
    )  # fmt: skip


def works_on_elements(name: str) -> bool:
    packet = getattr(torch.ops.aten, name.strip("_"), None)
    overloads = () if packet is None else packet.overloads()
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in overloads)


def layer_of(node: fx.Node) -> int | None:
    """The number of the decoder layer that a node belongs to: the first index on the way from the model to its module.
    None if it belongs to none, or if the graph does not say."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    indexed = (re.search(r"(\d+)\W*$", path) for path in paths)
    return next((int(index[1]) for index in indexed if index is not None), None)


def refuse_meeting_tokens(merged: fx.Node, attention: fx.Node, layer: int, after: set[fx.Node]) -> None:
    """Layers in front that work on each token by itself (a multi-layer perceptron) are as well behind the cut."""
    numbers = {node: layer_of(node) for node in ancestors(attention) & after}
    earlier = [node for node, number in numbers.items() if number is not None and number < layer]
    if any(tokens_may_meet(node, merged) for node in earlier):
        raise AttentionNotFoundError(
            f"the first attention that can score, {attention.name}, stands in layer {layer}, behind layers in which "
            "tokens meet without keys, and there is no single [B, S, D] value between these and all that follows that "
            "tokens could be removed from: call hawk_compile.restore(model) to run the model whole"
        )
