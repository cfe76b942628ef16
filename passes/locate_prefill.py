"""Find where a graph merges visual features into token embeddings, and the first attention that reads the result.

Before and after: the graph is unchanged; what was found is noted as `Located`.

    embeds  [B, S, D] = embedding(ids)
    merged  [B, S, D] = embeds.masked_scatter(mask, features)        <- merge (the last of them)
    normed  [B, S, D] = norm(merged)                                 <- what the projections read
    q, k              = linear(normed, Wq), linear(normed, Wk)       <- folded if only layout follows and W is plain
    query, key        = qk_norm(q), qk_norm(k)                       <- just before position enters
    attention         = scaled_dot_product_attention(rope(query), rope(key), v)

Everything is recognised by operator and shape; `position.py` says how the query and the key before RoPE are found, of
which `Located.rotated` keeps what was left out. The graph must be free of writes in place (`functionalize_writes`).
"""

from typing import Any

from torch import SymInt, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from hawk_compile.passes.attention import attends, query_and_key
from hawk_compile.passes.compat import TO_COPY
from hawk_compile.passes.entry import find_entry, layer_of
from hawk_compile.passes.errors import AttentionNotFoundError, GraphError, MergeNotFoundError, ShapeError
from hawk_compile.passes.graph import (
    LAYOUT_OPS,
    ancestors,
    argument,
    dependents,
    expr,
    is_call,
    is_plain,
    memories,
    op_name,
    same,
    shape_of,
    tensor,
    value,
    written_by,
)
from hawk_compile.passes.places import where_fixed
from hawk_compile.passes.position import PADDING_MASK, both_before_position
from hawk_compile.passes.site import Located, find, note
from hawk_compile.passes.slots import find_position_chain


def locate_prefill(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Note where the graph merges, and what the first attention reads.

    Raises:
        MergeNotFoundError: no masked_scatter into [B, S, D] embeddings.
        AttentionNotFoundError: no attention over the prompt's tokens follows the merge, or its query or key cannot be
            traced back to the merged embeddings.
        GraphError: its query or key is read from an input of the graph that is written in place, or features enter
            behind layers that attend.
        ShapeError: the sizes of the graph are specialised in a way that makes S ambiguous.
    """
    if find(gm, Located) is not None:
        return gm
    merges = find_merges(gm.graph)
    merged = merges[-1]
    rows, length, _ = shape_of(merged)
    check_length(gm.graph, merged, length)
    after = dependents(merged)
    attention, attending_query, attending_key = find_attention(gm.graph, after, length)
    entry = find_entry(merged, attention)
    found = both_before_position(gm.graph, entry, attending_query, attending_key, length)
    (query, query_rotated), (key, key_rotated) = found
    refuse_unfollowed_writes(gm.graph, ancestors(query, key))
    heads, head_dim = heads_of(query, length)
    kv_heads, _ = heads_of(key, length)
    query_linear, query_between = projection(query, entry, length, query_rotated)
    key_linear, key_between = projection(key, entry, length, key_rotated)
    position_chain = find_position_chain(gm.graph, merged, length)
    between = tuple(dict.fromkeys(query_between + key_between))
    one_input = query_linear is not None and key_linear is not None and query_linear.args[0] is key_linear.args[0]
    folded = one_input and not between and all(map(holds_plain_weights, (query_linear, key_linear)))
    located = Located(
        merged=merged,
        merges=tuple(merges),
        entry=entry,
        layer=layer_of(attention) or 0,
        rows=rows,
        length=length,
        visual=tuple(visual_count(merge) for merge in merges),
        padding_mask=find_padding_mask(gm.graph, length),
        attention=attention,
        query=query,
        key=key,
        rotated=query_rotated | key_rotated,
        normed=query_linear.args[0] if one_input else None,  # type: ignore[union-attr,arg-type]
        form="folded" if folded else "projected",
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        query_linear=query_linear,
        key_linear=key_linear,
        between=between,
        plan=next((node for node in gm.graph.nodes if is_call(node, "plan")), None),
        position_chain=frozenset(position_chain),
    )
    note(gm, located)
    return gm


def find_merges(graph: fx.Graph) -> list[fx.Node]:
    """The chain of masked_scatter into one embedding [B, S, D], first to last; the chain that ends last counts."""
    found = [node for node in graph.nodes if is_merge(node)]
    if not found:
        raise MergeNotFoundError(
            "no merge of visual features into token embeddings was found: the graph has no masked_scatter into a "
            "[B, S, D] floating-point value. A text-only graph has nothing to prune; a model that merges in another "
            "way cannot be pruned: call hawk_compile.restore(model) to run it whole"
        )
    if len(found) > 1:  # later layers may add features of their own in this way
        first = [node for node in found if not is_behind_layers(node)]
        found = first or found
    chain = [found[-1]]
    while (before := previous_merge(chain[0])) is not None:
        chain.insert(0, before)
    refuse_late_merge(chain[0])
    return chain


def refuse_late_merge(merge: fx.Node) -> None:
    """Refuse features that enter behind layers that attend: these keep the keys of every token.

    Raises:
        GraphError: names the layer.
    """
    layers = [number for node in in_front(merge) if attends(node) and (number := layer_of(node)) is not None]
    if layers:
        raise GraphError(
            f"visual features enter this model behind the attention of layer {min(layers)} ({merge.name} merges them "
            "into what that layer gives), where visual tokens are nothing yet that could be scored; its keys are those "
            "of every token, and a cache of unequal layers serves no further one. Call hawk_compile.restore(model) to "
            "run the model whole"
        )


def is_behind_layers(merge: fx.Node) -> bool:
    """Whether what is merged into has passed an attention or a numbered layer."""
    return any(attends(node) or layer_of(node) is not None for node in in_front(merge))


def in_front(merge: fx.Node) -> set[fx.Node]:
    """What a merge's embeddings are computed from; not the encoder, which gives what is merged into them."""
    stack, seen = [merge.args[0]], set()
    while stack:
        node = stack.pop()
        if isinstance(node, fx.Node) and node not in seen:
            seen.add(node)
            stack.extend(node.args[:1] if is_merge(node) else node.all_input_nodes)
    return seen


def is_merge(node: fx.Node) -> bool:
    result = tensor(node)
    return is_call(node, "masked_scatter") and result is not None and result.ndim == 3 and result.is_floating_point()


def previous_merge(merge: fx.Node) -> fx.Node | None:
    node = merge.args[0]
    while isinstance(node, fx.Node) and not is_merge(node):
        if not is_call(node, "to", TO_COPY, "clone", "contiguous", "alias"):
            return None
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def visual_count(merge: fx.Node) -> Any:
    """V of one merge: the rows of its features [V, D] (or [1, V, D], [images, tokens, D], [V * D])."""
    features: Any = merge.args[2]
    while is_call(features, "view", "reshape", "flatten", "to", TO_COPY) and len(shape_of(features)) == 1:
        features = features.args[0]
    shape = shape_of(features)
    if is_call(features, "add", "iadd"):  # to what stands in their places: as many, which only the features say
        shape = next((shape_of(part) for part in features.all_input_nodes if not counts_data(part)), shape)
    count: Any = 1
    for size in shape[:-1]:
        count = count * size
    return count


def counts_data(node: fx.Node) -> bool:
    """Whether a value has as many rows as something of the prompt is true of."""
    rows = shape_of(node)[0]
    return isinstance(rows, SymInt) and bool(free_unbacked_symbols(rows))


def check_length(graph: fx.Graph, merged: fx.Node, length: Any) -> None:
    """A specialised S is told from other sizes by its number, which must then be no other size of the graph. One that
    was symbolic, and was made a number by code that reads it, may be part of other numbers."""
    if isinstance(length, SymInt):
        if expr(length).is_number:  # type: ignore[union-attr]
            raise ShapeError(
                f"the model makes a number of the length of its prompt{where_fixed(tensor(merged), int(length))}, so "
                f"that its graph holds {int(length)} where fewer tokens are kept: compute with the length as a size "
                "(torch.arange, a mean, a product), or call hawk_compile.restore(model) to run the model whole"
            )
        return
    fixed = {int(length)} & {int(size) for size in shape_of(merged)[2:]}
    for node in graph.nodes:
        found = tensor(node)
        if found is not None and node.op in ("placeholder", "get_attr") and not found.dtype.is_floating_point:
            continue
        if found is not None and node.op in ("placeholder", "get_attr") and found.ndim <= 2:
            fixed |= {int(length)} & {int(size) for size in found.shape if isinstance(size, int)}
    if fixed or int(length) < 8:
        raise ShapeError(
            f"the prompt length S = {int(length)} is a fixed number in this graph and also another size of the model, "
            "so the two cannot be told apart: compile with torch.compile(..., dynamic=True)"
        )


def find_attention(graph: fx.Graph, after: set[fx.Node], length: Any) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The first attention over the prompt's tokens behind the merge, its queries and its keys."""
    for node in graph.nodes:
        if node in after and (pair := query_and_key(node, length)) is not None:
            return node, *pair
    raise AttentionNotFoundError(
        "no attention over the prompt's tokens follows the merge in this graph, neither scaled_dot_product_attention "
        "nor a softmax of the product of queries and keys. Either the model attends in another way (load it with "
        'attn_implementation="sdpa", as optimize captures it; what has none cannot be pruned: call '
        "hawk_compile.restore(model) to run it whole), or the graph breaks between merge and decoder (run the vision "
        "encoder first and pass its result as mm_encoder_outputs, as hawk_compile.optimize does)"
    )


def refuse_unfollowed_writes(graph: fx.Graph, needed: set[fx.Node]) -> None:
    """Refuse to score with what is read from an input of the graph behind a write into it.

    Raises:
        GraphError: names the read and the write.
    """
    written: dict[int, fx.Node] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes if node in needed else ():
            for memory in memories(value(source)) & written.keys():
                raise GraphError(
                    f"{node.name} reads {source.name} behind {written[memory].name} = {op_name(written[memory])}, "
                    "which writes into an input of the graph in place, so it cannot be told what is scored: let the "
                    "model write into a copy, or give it no cache whose tensors it fills; where layers pack their "
                    "weights in their first call, restore the model, call it once, and optimize it then"
                )
        written |= {memory: node for target in written_by(node) for memory in memories(value(target))}


def heads_of(node: fx.Node, length: Any) -> tuple[int, int]:
    """(heads, head width) of a [B, H, S, d] or [B, S, H, d] value; in the first, S may stand behind a cache's past."""
    shape = shape_of(node)
    return int(shape[2] if same(shape[1], length) and not same(shape[2], length) else shape[1]), int(shape[3])


def projection(
    node: fx.Node, merged: fx.Node, length: Any, rotated: dict[fx.Node, fx.Node]
) -> tuple[fx.Node | None, list[str]]:
    """The linear that makes the heads, and the names of operators in between that change values.

    Layout alone lies in between if every operator moves elements and the first four-dimensional value is [B, S, H, d],
    so that row h * d + i of the weight belongs to head h.
    """
    between: list[str] = []
    current = node
    while not is_call(current, "linear"):
        current = rotated.get(current, current)
        sources = [source for source in current.all_input_nodes if tensor(source) is not None]
        hidden = [source for source in sources if source is merged or merged in ancestors(source)]
        found = tensor(current)
        splits_heads = found is not None and found.ndim == 4 and all(len(shape_of(source)) == 3 for source in hidden)  # type: ignore[union-attr]
        if not is_layout(current) or (splits_heads and not same(found.shape[1], length)):  # type: ignore[union-attr]
            between.append(op_name(current))
        if len(hidden) != 1 or hidden[0] is merged:
            return None, between or [op_name(current)]
        current = hidden[0]
    return current, between


def holds_plain_weights(linear: fx.Node | None) -> bool:
    """Whether a projection's weight and bias are floating-point numbers in plain tensors, as custom operators take
    them."""
    given = [] if linear is None else [argument(linear, 1, "weight"), argument(linear, 2, "bias")]
    found = [tensor(node) for node in given if node is not None]
    return all(is_plain(each) and each.is_floating_point() for each in found)  # type: ignore[union-attr]


def is_layout(node: fx.Node) -> bool:
    if is_call(node, "to", TO_COPY):
        return tensor(node).dtype == tensor(node.args[0]).dtype  # type: ignore[union-attr]
    return is_call(node, *LAYOUT_OPS)


def find_padding_mask(graph: fx.Graph, length: Any) -> fx.Node | None:
    for node in graph.nodes:
        found = tensor(node)
        named = node.op == "placeholder" and PADDING_MASK in node.name
        if named and found is not None and found.ndim == 2 and same(found.shape[1], length):
            return node
    return None
