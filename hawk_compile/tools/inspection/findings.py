"""What the passes found in a graph, in words: nodes as module paths of the model, sizes as letters."""

from dataclasses import dataclass
from typing import Any

from torch import fx
from transformers import PreTrainedModel

from hawk_compile.capture.modalities import placeholders_by_modality
from hawk_compile.passes.graph import ancestors, dependents, in_order, is_call, same, tensor
from hawk_compile.passes.places import module_path
from hawk_compile.passes.site import Gathered as Gathering
from hawk_compile.passes.site import Located, Selected, read
from hawk_compile.plan.ids import SpecialIds


@dataclass(frozen=True)
class Gathered:
    """A value that crosses from the full prompt to the pruned one, with its shape in letters."""

    name: str
    shape: tuple[str, ...]
    along: str
    """'tokens' (S becomes S'), 'visual tokens' (V becomes V') or 'length' (the number S becomes S')."""


def described(gm: fx.GraphModule) -> dict[str, Any]:
    """What the passes know of a graph, in words: nodes as module paths, sizes as letters."""
    located, keep = read(gm, Located), read(gm, Selected).keep
    sizes = [(located.length, "S"), (located.rows, "B"), *((count, "V") for count in located.visual)]

    def letter(size: Any) -> str:
        return next((name for known, name in sizes if same(size, known) and not isinstance(size, int)), str(size))

    query, key = projection_of(located, keep, located.query), projection_of(located, keep, located.key)
    return {
        "merges": tuple(merge.name for merge in located.merges),
        "attention": module_path(located.attention) or located.attention.name,
        "scoring_layer": located.layer,
        "norm": None if query is None else module_path(query.args[0]),  # type: ignore[arg-type]
        "query_projection": None if query is None else module_path(query),
        "key_projection": None if key is None else module_path(key),
        "heads": located.heads,
        "kv_heads": located.kv_heads,
        "head_dim": located.head_dim,
        "width": width_of(located),
        "form": located.form,
        "why": why(located, keep),
        "gathered": tuple(
            Gathered(name.strip("_").removeprefix("l_"), tuple(map(letter, shape)), along)
            for name, shape, along in read(gm, Gathering).values
        ),
    }


def projection_of(located: Located, keep: fx.Node, node: fx.Node) -> fx.Node | None:
    """The linear that makes these queries or keys, whatever else stands in between; None if several do."""
    linears = [each for each in behind_the_cut(located, keep, node) if is_call(each, "linear")]
    return linears[0] if len(linears) == 1 else None


def behind_the_cut(located: Located, keep: fx.Node, *nodes: fx.Node) -> set[fx.Node]:
    """What the nodes are computed from at the pruned length; the copies that the score reads stand before the cut."""
    return (ancestors(*nodes) & dependents(located.merged)) - ancestors(keep)


def why(located: Located, keep: fx.Node) -> str:
    if located.form == "folded":
        return "queries and keys are linear in the norm's output, so no key of a visual token is made"
    linears = {projection_of(located, keep, node) for node in (located.query, located.key)}
    if None in linears:
        return "queries and keys do not come from one linear each, so the keys of all tokens are made"
    behind = set().union(*(dependents(linear) for linear in linears if linear is not None))
    between = in_order(located.merged.graph, behind & behind_the_cut(located, keep, located.query, located.key))
    modules = dict.fromkeys(module_path(node) for node in between)
    names = [path for path in modules if path and path != module_path(located.attention)] or list(located.between)
    return f"{', '.join(names)} between projection and position, so the keys of all tokens are made"


def width_of(located: Located) -> int:
    merged = tensor(located.merged)
    assert merged is not None
    return int(merged.shape[-1])


def identifiers(model: PreTrainedModel, ids: SpecialIds) -> dict[str, Any]:
    named = placeholders_by_modality(model).values()
    return {
        "placeholders": tuple(dict.fromkeys(each for each in named if each is not None)),
        "vision_end": ids.vision_end,
        "end_of_turn": ids.end_of_turn,
    }
