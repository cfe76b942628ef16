"""An attention's query or key as it is before position enters it.

A value is *position-free* if it is computed from the merged embeddings and from values without a dimension S (weights,
numbers): rotary tables have one, so the last position-free value on the way to the attention is the query or key before
RoPE.

Where there is no one such value, because a part of each head is made and rotated apart from the rest, as in latent
attention (MLA):

    k_nope [B, H, S, n], k_rope [B, 1, S, r]                 of two projections
    key    [B, H, S, n + r] = cat(k_nope, expand(rope(k_rope)))

the key is computed as the attention computes it, with `k_rope` in the place of `rope(k_rope)`: what is scored is the
whole head, its part without position and its part that rotates, before it does (shared by all heads here).

The query, all of which comes through one value, is then computed in the same way where its rotated part is not just a
slice of it: a rotation that first puts the dimensions in another order does so in both.

So it is where a norm stands behind position: key = norm(rope(k)) is computed as norm(k). An attention never sees how
long a key is that it norms.
"""

from typing import Any

from torch import fx

from hawk_compile.passes.compat import TO_COPY
from hawk_compile.passes.entry import works_on_elements
from hawk_compile.passes.errors import AttentionNotFoundError
from hawk_compile.passes.graph import (
    LAYOUT_OPS,
    ancestors,
    dependents,
    in_order,
    is_call,
    op_name,
    same,
    shape_of,
    sizes_equal_to,
    tensor,
)

PADDING_MASK = "attention_mask"
"""The one input that is known by its name: every Hugging Face model calls its [B, S] mask of real tokens so."""
FORMS_OF_A_MASK = ("getitem", "slice", "unsqueeze", "expand", "to", "bool", "float", TO_COPY)
SLICING = ("getitem", "slice", "narrow", "split", "split_with_sizes", "chunk", "contiguous")
SCALING = ("mul", "imul", "div", "truediv")
MOVING = (
    "to", "float", "half", "bfloat16", "type_as", TO_COPY, "expand", "repeat_interleave", "cat", "getitem", "slice",
    "narrow", "unsqueeze", "squeeze",
)  # fmt: skip
"""What moves or casts elements, beside `LAYOUT_OPS`."""


def position_free(merged: fx.Node, within: set[fx.Node], graph: fx.Graph, length: Any) -> set[fx.Node]:
    """The nodes of `within` computed from the merged embeddings and from values without a dimension S only."""
    free = {merged}
    after = dependents(merged)
    for node in in_order(graph, within & after):
        if any(holds_positions(source, length) for source in node.all_input_nodes if source not in after | {merged}):
            continue
        if all(source in free for source in node.all_input_nodes if source in after):
            free.add(node)
    return free


def holds_positions(node: fx.Node, length: Any) -> bool:
    """Whether a value may differ by position: it has a dimension S, and is not filled with one number, or none."""
    found = tensor(node)
    if found is None or not sizes_equal_to(found.shape, length) or marks_padding(node, length):
        return False
    return op_name(node).removeprefix("new_").removesuffix("_like") not in ("empty", "zeros", "ones", "full")


def marks_padding(node: fx.Node, length: Any) -> bool:
    """Whether a value is the mask of real tokens in another form: it says what is a token, not where it stands."""
    stack, seen = [node], set()
    while stack:
        source = stack.pop()
        found = tensor(source)
        if found is None or source in seen:  # a number, as the length that a mask is cut to, says nothing of tokens
            continue
        seen.add(source)
        stack += source.all_input_nodes
        if not sizes_equal_to(found.shape, length):
            continue
        if source.op == "placeholder":
            if PADDING_MASK not in source.name:
                return False
        elif not is_call(source, *FORMS_OF_A_MASK, *LAYOUT_OPS) and not works_on_elements(op_name(source)):
            return False
    return True


Heads = tuple[fx.Node, dict[fx.Node, fx.Node]]
"""An input of an attention before position, and what to compute it with; see `before_position`."""


def both_before_position(
    graph: fx.Graph, merged: fx.Node, query: fx.Node, key: fx.Node, length: Any
) -> tuple[Heads, Heads]:
    """An attention's query and key before position enters them, with the dimensions of heads in one order.

    Raises:
        AttentionNotFoundError: position enters in a way that cannot be left out.
    """
    targets = query, key
    found = [before_position(graph, merged, target, length) for target in targets]
    if is_in_parts(*found[0]) != is_in_parts(*found[1]):
        whole = int(is_in_parts(*found[0]))
        found[whole] = reordered(graph, merged, targets[whole], found[whole], length)
    return found[0], found[1]


def is_in_parts(node: fx.Node, rotated: dict[fx.Node, fx.Node]) -> bool:
    """Whether what rotates of heads is a part that is made apart from the rest."""
    return any(not same(shape_of(origin)[-1], shape_of(node)[-1]) for origin in rotated.values())


def reordered(graph: fx.Graph, merged: fx.Node, target: fx.Node, whole: Heads, length: Any) -> Heads:
    """Whole heads, or what they are computed with in parts, where the part that rotates is not just a slice of them."""
    after, within = dependents(merged), ancestors(target)
    free = position_free(merged, within, graph, length)
    behind = in_order(graph, dependents(whole[0]) & within)
    entering = entered(behind, after, length)
    for node in behind:
        origin = None if node in free else unrotated(graph, node, free)
        if origin is None or entering & ancestors(target, replaced={node: origin}):
            continue
        moved = (dependents(whole[0]) & ancestors(origin)) - {whole[0]}
        return whole if all(is_call(each, *SLICING) for each in moved) else (target, {node: origin})
    return whole


def entered(nodes: list[fx.Node], after: set[fx.Node], length: Any) -> set[fx.Node]:
    """Those of the nodes that take in what may differ by position from elsewhere than the merged embeddings."""
    return {
        node for node in nodes
        if any(holds_positions(source, length) for source in node.all_input_nodes if source not in after)
    }  # fmt: skip


def before_position(graph: fx.Graph, merged: fx.Node, target: fx.Node, length: Any) -> Heads:
    """An attention's input before position enters it.

    Returns:
        The node that it is: the last [B, H, S, d] or [B, S, H, d] value on the way to `target` that every position-free
        use comes through. Or one behind that, up to `target` itself, and what to compute it with: value in which
        position has entered -> value of the same shape before that.

    Raises:
        AttentionNotFoundError: position enters in a way that cannot be left out.
    """
    within = ancestors(target)
    free = position_free(merged, within, graph, length)
    for node in reversed(in_order(graph, common_sources(target, within, free))):
        found = tensor(node)
        heads = found is not None and found.ndim == 4 and sizes_equal_to(found.shape[1:3], length)
        if heads and same(shape_of(node)[-1], shape_of(target)[-1]) and only_rearranged(node, within):
            return changed_behind(graph, merged, node, within, length)
    return target, without_position(graph, merged, target, free, length)


def changed_behind(graph: fx.Graph, merged: fx.Node, node: fx.Node, within: set[fx.Node], length: Any) -> Heads:
    """What becomes of heads behind position: the last value on the way to the attention that is not the same numbers
    moved or scaled, and what to compute it with. The heads themselves where there is none."""
    after = dependents(merged)
    behind = in_order(graph, dependents(node) & within)
    entering = entered(behind, after, length)
    if not entering:
        return node, {}
    last = behind[-1]
    rotated = next(
        (each for each in behind if alike(each, node) and not entering & ancestors(last, replaced={each: node})), None
    )
    if rotated is None:
        return node, {}
    later = dependents(rotated)
    changed = [each for each in behind if each in later and alike(each, node) and changes_values(each)]
    return (changed[-1], {rotated: node}) if changed else (node, {})


def alike(left: fx.Node, right: fx.Node) -> bool:
    """Whether two values are heads [B, H, S, d] of the same sizes."""
    sizes = [each.shape for each in (tensor(left), tensor(right)) if each is not None and each.ndim == 4]
    return len(sizes) == 2 and all(map(same, *sizes))


def changes_values(node: fx.Node) -> bool:
    """Whether a node makes other numbers of one value than the same ones, moved, cast, or scaled all alike."""
    sources = [source for source in node.all_input_nodes if tensor(source) is not None]
    if is_call(node, *SCALING) and len(sources) == 1:
        return False
    return not is_call(node, *LAYOUT_OPS, *MOVING)


def common_sources(node: fx.Node, within: set[fx.Node], free: set[fx.Node]) -> set[fx.Node]:
    """The position-free values that every position-free value which `node` is computed from comes through."""
    frontier = [
        source
        for source in free & within
        if source is node or any(use in within and use not in free for use in source.users)
    ]
    return set.intersection(free, *(ancestors(source) for source in frontier))


def only_rearranged(node: fx.Node, within: set[fx.Node]) -> bool:
    """Whether no projection stands on the way from the node to what `within` are the ancestors of."""
    return not any(is_call(between, "linear") for between in dependents(node) & within)


def without_position(
    graph: fx.Graph, merged: fx.Node, target: fx.Node, free: set[fx.Node], length: Any
) -> dict[fx.Node, fx.Node]:
    """Each value on the way to `target` in which position has entered -> the last value of its shape before that."""
    after = dependents(merged)
    rotated: dict[fx.Node, fx.Node] = {}
    stack = [target]
    while stack:
        node = stack.pop()
        if node in free or node not in after or node in rotated:
            continue
        origin = unrotated(graph, node, free)
        if origin is not None:
            rotated[node] = origin
        elif any(holds_positions(source, length) for source in node.all_input_nodes if source not in after):
            raise AttentionNotFoundError(
                f"{target.name}, an input of the first attention, cannot be computed without position: {node.name} = "
                f"{op_name(node)} brings it in, and is not of the shape of a value before it: call "
                "hawk_compile.restore(model) to run the model whole"
            )
        else:
            stack.extend(node.all_input_nodes)
    if not free & ancestors(target) or len(shape_of(target)) != 4:
        raise AttentionNotFoundError(
            f"{target.name}, an input of the first attention, cannot be traced back to the merged embeddings: "
            "call hawk_compile.restore(model) to run the model whole"
        )
    return rotated


def unrotated(graph: fx.Graph, node: fx.Node, free: set[fx.Node]) -> fx.Node | None:
    """The last position-free value of the node's shape that all of the node comes through, if there is one."""
    if tensor(node) is None:
        return None
    within = ancestors(node)
    for source in reversed(in_order(graph, common_sources(node, within, free))):
        if alike(source, node) and only_rearranged(source, within):
            return source
    return None
