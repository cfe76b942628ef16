"""Let every image keep its floor of visual tokens, where the plan has floors.

    before: scores [B, S] (or what a selector made of them), budget [B] | decoder(merged)
    after:  scores [B, S], budget [B]
            ranks [B, S] = guaranteed_first(scores, HAWK's scores, visual tokens, image [B, S], floor [B, S])
            | decoder(merged)

The best of each image stand first, in their order, and all others behind them. The rest of the graph is unchanged.
"""

from typing import Any

import torch
from torch import fx

from hawk_compile.kernels.select.budgets import guaranteed_first
from hawk_compile.passes.graph import Builder
from hawk_compile.passes.site import Located, Ordered, Ranked, Scored, Split, find, note, read


def insert_quotas(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Put what is guaranteed first, and note what visual tokens are then chosen by."""
    if find(gm, Ordered) is not None:
        return gm
    located, scored, ranked = read(gm, Located), read(gm, Scored), read(gm, Ranked)
    ranks, image = ranked.scores, located.planned("image")
    if image is not None:
        build = Builder(gm, read(gm, Split).boundary)
        candidate = build.call(torch.logical_and, scored.visual_mask, scored.token_mask)
        floor = located.planned("floor")
        ranks = build.call(guaranteed_first, ranked.scores, ranked.tie_scores, candidate, image, floor)
    note(gm, Ordered(ranks))
    return gm
