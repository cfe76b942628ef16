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
from hawk_compile.passes.site import site_of


def insert_quotas(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Put what is guaranteed first; `site.ranks` names the new order."""
    site = site_of(gm)
    assert site is not None and site.boundary is not None
    image, floor = site.planned("image"), site.planned("floor")
    if image is None or site.ranks is not None:
        return gm
    build = Builder(gm, site.boundary)
    candidate = build.call(torch.logical_and, site.visual_mask, site.token_mask)
    site.ranks = build.call(guaranteed_first, site.scores, site.hawk_scores or site.scores, candidate, image, floor)
    return gm
