"""Refuse code that branches on the prompt's length, or its visual tokens, where the pruned ones take the other branch.

    if hidden.shape[1] < 40: ...      traced at S = 47; the graph holds what is done then, and runs at S' = 28

Before and after: the graph is unchanged. Python's branches are no nodes of it: what is left of them are the conditions
on sizes under which it is right, which whoever compiles it tests at each call. Here each condition on S or V is tested
for S' and V' too, by which it becomes one more condition on these: a later call whose S' lies on the other side is
captured anew, and refused or not by its own lengths. What operators ask of sizes is asked again where shapes
are worked out anew (`refresh_values`). Of the model's own conditions all count, since what follows from one that was
met is not asked again; so code in front of the merge, where S is right, is refused too if its branch differs.
"""

from typing import Any

from sympy import Expr, Symbol
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from hawk_compile.passes.compat import asked_by_code
from hawk_compile.passes.errors import ShapeError
from hawk_compile.passes.graph import Builder, expr, value
from hawk_compile.passes.places import in_words
from hawk_compile.passes.site import Budgeted, Located, Split, read

MASKS = "masking_utils.py"
"""Where transformers asks by the length whether a mask can be left out: one that is there serves fewer tokens too."""


def refuse_branches(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Hold what is true of S to be true of S'.

    Raises:
        ShapeError: names the line whose branch comes out otherwise, or may do so.
    """
    located, budgeted = read(gm, Located), read(gm, Budgeted)
    build = Builder(gm, read(gm, Split).boundary)
    if build.fake_mode is None or build.fake_mode.shape_env is None:
        return gm
    env = build.fake_mode.shape_env
    names: dict[Symbol, str] = {}
    pruned: dict[Symbol, Expr] = {}
    for name, size, kept in (
        ("length", located.length, budgeted.kept_length),
        ("number of visual tokens", sum(located.visual), budgeted.kept_visual),
    ):
        whole, smaller = expr(size), expr(value(kept) if isinstance(kept, fx.Node) else kept)
        if isinstance(whole, Expr) and len(whole.free_symbols) == 1:
            symbol = next(iter(whole.free_symbols))
            names[symbol] = f"{name}, {whole} = {smaller}"
            pruned[symbol] = symbol + smaller - whole
    for guard in list(env.guards):
        condition = env.simplify(guard.expr)
        asked_of = next((symbol for symbol in pruned if symbol in condition.free_symbols), None)
        if asked_of is None or not is_of_code(guard):
            continue
        if not guard_or_false(env.create_symboolnode(condition.subs(pruned))):
            raise ShapeError(
                f"the model branches on a size of its prompt{in_words(guard.sloc)}: {condition} (the {names[asked_of]} "
                "when pruned) is true of the whole prompt, and not of what is kept of it, or it cannot be known, so "
                "that the graph would hold the wrong branch. Compute it from the size without a branch, let it not "
                "depend on it, or call hawk_compile.restore(model) to run the model whole"
            )
    return gm


def is_of_code(guard: Any) -> bool:
    """Whether a condition is one of the model's code, on which what it computes depends."""
    return asked_by_code(guard) and MASKS not in str(guard.sloc.maybe_user_loc)
