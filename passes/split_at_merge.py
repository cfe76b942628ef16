"""Order a graph so that all that runs at full length stands before all that will run at the pruned length.

    before: ids, mask_from(S), merged, decoder(merged, mask)      masks may be built before the merge
    after:  ids, merged | mask_from(S), decoder(merged, mask)     | = `site.boundary`

At full length stay the inputs, the merge and what it depends on, checks that nothing depends on, and positions that the
graph counts itself. Everything else (masks, rotary tables, the decoder) moves behind. Numerics are unchanged: nodes only
change places.
"""

from typing import Any

from torch import fx

from hawk_compile.passes.graph import ancestors, output_node
from hawk_compile.passes.site import Site, site_of


def split_at_merge(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Move every node that will run at the pruned length behind the last that runs at full length."""
    site = site_of(gm)
    assert site is not None
    site.full = full_length_nodes(gm.graph, site)
    output = output_node(gm.graph)
    behind = [node for node in gm.graph.nodes if node not in site.full and node is not output]
    for node in behind:
        output.prepend(node)
    site.boundary = behind[0]
    return gm


def full_length_nodes(graph: fx.Graph, site: Site) -> set[fx.Node]:
    inputs = [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    plan = [site.plan, *site.plan.users] if site.plan is not None else []
    full = ancestors(site.merged, *inputs, *plan, *site.position_chain)
    needed = ancestors(output_node(graph))
    for node in graph.nodes:
        if node not in needed and node.op != "output" and all(source in full for source in node.all_input_nodes):
            full.add(node)
    return full
