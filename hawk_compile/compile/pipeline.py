"""The passes, in the order they run, and the switches around them.

Environment switches, read at each compilation:

    HAWK_DUMP=dir       write the graph before the first pass and after each one to dir/NNN_<pass>.py
    HAWK_DISABLE=a,b    leave out passes by name; each list says which of its passes are optional
    HAWK_FUEL=n         run at most n optional passes (to find the one that breaks something)
"""

import functools
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from hawk_compile.errors import ConfigError
from hawk_compile.passes.compare_slots import compare_slots
from hawk_compile.passes.fold_layers import fold_layers
from hawk_compile.passes.functionalize_writes import functionalize_writes
from hawk_compile.passes.gather_by_shape import gather_by_shape
from hawk_compile.passes.inline_operators import inline_operators
from hawk_compile.passes.insert_budget import insert_budget
from hawk_compile.passes.insert_quotas import insert_quotas
from hawk_compile.passes.insert_ranking import insert_ranking
from hawk_compile.passes.insert_scoring import Ranks, insert_scoring
from hawk_compile.passes.insert_selection import insert_selection
from hawk_compile.passes.locate_prefill import locate_prefill
from hawk_compile.passes.refresh_values import refresh_values
from hawk_compile.passes.refuse_branches import refuse_branches
from hawk_compile.passes.remove_assertions import remove_assertions
from hawk_compile.passes.remove_unread_rows import remove_unread_rows
from hawk_compile.passes.replace_masked_add import replace_masked_add
from hawk_compile.passes.replace_masked_scatter import replace_masked_scatter
from hawk_compile.passes.split_at_merge import split_at_merge

log = logging.getLogger("hawk_compile")
dumped = itertools.count()


@dataclass(frozen=True)
class Step:
    """One pass: what it does, in a line, and whether the pruned graph can do without it."""

    run: Callable[..., fx.GraphModule]
    summary: str
    options: tuple[str, ...] = ()
    optional: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__


PRUNING = (
    Step(remove_unread_rows, "remove rows of which only the number is looked at", optional=True),
    Step(functionalize_writes, "write what is written in place as new values"),
    Step(locate_prefill, "find the merge, the visual tokens and the first attention"),
    Step(compare_slots, "compare slots of keys with slots of queries, not with their positions"),
    Step(replace_masked_add, "add rows at a mask without reading their number back", optional=True),
    Step(split_at_merge, "order the graph: full length first, pruned length behind"),
    Step(insert_scoring, "score every visual token", ("normalization", "head_weights", "query", "ranks")),
    Step(insert_budget, "count how many visual tokens every row keeps", ("removed", "mass")),
    Step(refuse_branches, "refuse branches on the prompt's length that differ at the pruned length"),
    Step(insert_ranking, "let a selector rank the visual tokens", ("ranking", "ranking_options")),
    Step(insert_quotas, "let every image keep its floor of visual tokens"),
    Step(insert_selection, "choose the positions that every row keeps"),
    Step(gather_by_shape, "gather what crosses over, by its symbolic shape"),
    Step(refresh_values, "work out the pruned shapes and check them", optional=True),
)

PASSES = (
    *PRUNING,
    Step(replace_masked_scatter, "merge by counting rows, not elements", optional=True),
    Step(fold_layers, "let equal layers share one graph", optional=True),
)
"""What runs in front of a compiler."""

PLAIN_PASSES = tuple(step for step in PASSES if step.run is not fold_layers)
"""Where modes see each operator: of a layer that others share they would see one call."""

EXPORT_PASSES = (
    Step(remove_assertions, "remove torch.export's checks, which pin values at full length"),
    *PRUNING,
)
"""The same passes on torch.export's graph."""

PORTABLE_PASSES = (
    Step(inline_operators, "compute the hawk operators by their definitions", ("selection",)),
    Step(replace_masked_scatter, "merge with fixed shapes, without NonZero"),
)
"""What targets need that know ATen operators only, and no data-dependent shape; run behind EXPORT_PASSES."""


@dataclass(frozen=True)
class PassOptions:
    """What the passes may be told. See the passes for the meaning of each."""

    normalization: str = "l2"
    query: str = "mean"
    ranks: Ranks | None = None
    head_weights: Tensor | None = None
    removed: Fraction = Fraction(0)
    mass: float | None = None
    ranking: Callable[..., Tensor] | None = None
    ranking_options: tuple[tuple[str, Any], ...] = ()
    selection: str = "sort"


def run_passes(
    gm: fx.GraphModule, example_inputs: list[Any], options: PassOptions, passes: Sequence[Step] = PASSES
) -> fx.GraphModule:
    """Run every pass of a list on a graph. On an error the graph must be thrown away: it may be half rewritten.

    Raises:
        GraphError: a pass refuses the graph.
        ConfigError: an environment switch names no pass, or one that this list cannot do without.
    """
    skipped = left_out(passes)
    serial = next(dumped)
    dump(gm, serial, 0, "captured")
    for number, step in enumerate(passes, start=1):
        if step.name in skipped:
            log.warning("%d. %s: left out (HAWK_DISABLE or HAWK_FUEL)", number, step.name)
            continue
        before, started = len(gm.graph.nodes), time.perf_counter()
        gm = step.run(gm, example_inputs, **{name: getattr(options, name) for name in step.options})
        gm.graph.lint()
        spent = 1e3 * (time.perf_counter() - started)
        log.info("%d. %s: %d -> %d nodes, %.1f ms", number, step.name, before, len(gm.graph.nodes), spent)
        dump(gm, serial, number, step.name)
    gm.recompile()
    return gm


@functools.cache
def source_tag() -> str:
    """A hash of the passes' and operators' sources, for compilers' caches: a changed pass never meets an old graph."""
    digest = hashlib.sha256()
    for room in ("passes", "kernels"):
        for path in sorted((Path(__file__).parents[1] / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return f"hawk-{digest.hexdigest()[:16]}"


def left_out(passes: Sequence[Step]) -> set[str]:
    """The names that HAWK_DISABLE and HAWK_FUEL leave out, among these passes only what is optional there.

    Raises:
        ConfigError: HAWK_DISABLE names no pass at all, or one that this list cannot do without; HAWK_FUEL is no number.
    """
    optional = [step.name for step in passes if step.optional]
    mandatory = {step.name for step in passes} - set(optional)
    known = [step.name for step in (*PASSES, *EXPORT_PASSES, *PORTABLE_PASSES)]
    names = {name.strip() for name in os.environ.get("HAWK_DISABLE", "").split(",") if name.strip()}
    for name in names:
        if name not in known:
            raise ConfigError(f"HAWK_DISABLE names {name!r}; the passes are {', '.join(dict.fromkeys(known))}")
        if name in mandatory:
            raise ConfigError(
                f"HAWK_DISABLE names {name!r}, without which this graph would be unpruned, wrong or not to be "
                f"exported: name optional passes alone; here these are {', '.join(optional) or 'none'}"
            )
    fuel = os.environ.get("HAWK_FUEL")
    if fuel is None:
        return names
    if not fuel.isdecimal():
        raise ConfigError(f"HAWK_FUEL must be a whole number of optional passes, 0 or more, got {fuel!r}")
    return names | set([name for name in optional if name not in names][int(fuel) :])


def dump(gm: fx.GraphModule, serial: int, number: int, name: str) -> None:
    """Write the graph as readable code, if HAWK_DUMP asks for it."""
    folder = os.environ.get("HAWK_DUMP")
    if folder:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        code = gm.graph.python_code("self").src
        (path / f"graph{serial:03d}_{number}_{name}.py").write_text(code)
