"""Order a graph so that all that runs at full length stands before all that will run at the pruned length.

    before: ids, mask_from(S), merged, decoder(merged, mask)      masks may be built before the merge
    after:  ids, merged | mask_from(S), decoder(merged, mask)     | = `Split.boundary`

At full length stay the inputs, the merge and what it depends on, checks of inputs, features of visual tokens, and
positions that the graph counts itself. Everything else (masks, rotary tables, the decoder) moves behind. Numerics are
unchanged: nodes only change places.
"""

from typing import Any

from torch import SymInt, fx

from hawk_compile.passes.compat import CHECK_NAMES
from hawk_compile.passes.errors import GraphError
from hawk_compile.passes.graph import (
    Builder,
    ancestors,
    dependents,
    memories,
    op_name,
    output_node,
    same,
    sizes_equal_to,
    tensor,
    value,
    written_by,
)
from hawk_compile.passes.site import Located, Split, find, note, read


def split_at_merge(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Move every node that will run at the pruned length behind the last that runs at full length."""
    if find(gm, Split) is not None:
        return gm
    located = read(gm, Located)
    at_merge = full_length_nodes(gm.graph, located)
    full = at_merge | layers_before(located)
    refuse_reordered_writes(gm.graph, full)
    output = output_node(gm.graph)
    behind = [node for node in gm.graph.nodes if node not in full and node is not output]
    # What both parts need and the prompt's tokens do not enter (masks, rotary tables) is computed in both, each time
    # from inputs of its own length.
    twice = (full - at_merge - dependents(located.merged)) & ancestors(*behind)
    copies = Builder(gm, output).clone(twice, {})
    for node in behind:
        for source in node.all_input_nodes:
            if source in copies:
                node.replace_input_with(source, copies[source])
        output.prepend(node)
    note(gm, Split(frozenset(full), next(iter(copies.values()), behind[0])))
    return gm


def layers_before(located: Located) -> set[fx.Node]:
    """What stands between the merge and the entry, the states that it leaves included, and what that needs besides."""
    if located.entry is located.merged:
        return set()
    return ancestors(located.entry, *(dependents(located.merged) - dependents(located.entry)))


def full_length_nodes(graph: fx.Graph, located: Located) -> set[fx.Node]:
    inputs = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    plan = [located.plan, *located.plan.users] if located.plan is not None else []
    decoder = dependents(located.merged)
    checks = [node for node in graph.nodes if is_check(node) and node not in decoder]
    features = [node for node in graph.nodes if node not in decoder and holds_features(node, located)]
    full = ancestors(located.merged, *inputs, *plan, *located.position_chain, *checks, *features)
    return full | ancestors(*until_rows(full, decoder, located))


def until_rows(full: set[fx.Node], decoder: set[fx.Node], located: Located) -> set[fx.Node]:
    """What is computed of positions [S] that all rows share, up to where it has a dimension for rows: in a batch each
    row keeps others of them."""
    if same(located.rows, 1):
        return set()
    further: set[fx.Node] = set()
    stack = [node for node in full if lacks_rows(node, located)]
    while stack:
        users = {user for user in stack.pop().users if user.op != "output"} - decoder - full - further
        further |= users
        stack += [user for user in users if lacks_rows(user, located)]
    return further


def lacks_rows(node: fx.Node, located: Located) -> bool:
    """Whether a value has a dimension S, and none that a batch's rows could have to the left of it."""
    found = tensor(node)
    if found is None or not (lengths := sizes_equal_to(found.shape, located.length)):
        return False
    return not any(same(size, located.rows) or same(size, 1) for size in found.shape[: lengths[0]])


def refuse_reordered_writes(graph: fx.Graph, full: set[fx.Node]) -> None:
    """Writes into the graph's inputs stay in place: no access that is to come before one may stand behind it.

    Raises:
        GraphError: what runs at full length would no longer see such a write, or would see it too early.
    """
    written = set().union(*(memories(value(target)) for node in graph.nodes for target in written_by(node)))
    if not written:
        return
    passed: dict[int, list[tuple[fx.Node, bool]]] = {}
    for node in graph.nodes:
        writes = set().union(*(memories(value(target)) for target in written_by(node)))
        accessed = set().union(*(memories(value(source)) for source in node.all_input_nodes)) & written
        for memory in accessed:
            for earlier, wrote in passed.get(memory, []):
                if node in full and earlier not in full and (wrote or memory in writes):
                    raise GraphError(
                        f"{earlier.name} and {node.name} share an input of the graph, which one of them writes in "
                        f"place; {node.name} is needed before visual tokens are removed and {earlier.name} runs "
                        "behind: let the model write into a copy of its input"
                    )
            passed.setdefault(memory, []).append((node, memory in writes))


def holds_features(node: fx.Node, located: Located) -> bool:
    """Whether the node's value has one row per visual token, as features that later layers add."""
    found = tensor(node)
    if found is None or not found.is_floating_point() or located.ambiguous:
        return False
    return any(isinstance(count, SymInt) and sizes_equal_to(found.shape, count) for count in located.visual)


def is_check(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node).startswith((*CHECK_NAMES, "sym_constrain"))
