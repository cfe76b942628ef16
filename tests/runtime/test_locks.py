"""Every lock that a call may run under is asked whether it is held, by `tests.runtime.load.leftovers`."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator, Mapping

from tests.messages import sources
from tests.runtime.load.leftovers import holders, locks
from tests.runtime.models import fresh, generate, picture

LOCK = r"R?Lock|Condition|(Bounded)?Semaphore"
ELSEWHERE = {("hawk_compile.exporting.executorch", "running"), ("hawk_compile.exporting.tensorrt", "running"),
             ("hawk_compile.serving.vllm.tally", "Tally.lock")}  # fmt: skip
"""Locks that no optimised model runs under."""


def locks_made(tree: ast.Module) -> set[str]:
    """What a module makes locks for: globals by their names, attributes as "Class.name", and what nobody keeps, ""."""
    annotations = {id(inner) for node in ast.walk(tree) for field in ("annotation", "returns")
                   for inner in ast.walk(getattr(node, field, None) or ast.Pass())}  # fmt: skip

    def within(node: ast.AST, owner: str, kept_as: str) -> Iterator[str]:
        if id(node) in annotations:
            return
        if isinstance(node, (ast.Name, ast.Attribute)) and re.fullmatch(LOCK, ast.unparse(node).rpartition(".")[2]):
            yield kept_as
        if isinstance(node, ast.ClassDef):
            owner = f"{node.name}."
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            kept_as = owner + target.rpartition(".")[2]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setdefault":
            kept_as = ast.unparse(node.func.value)
        for child in ast.iter_child_nodes(node):
            yield from within(child, owner, kept_as)

    return {*within(tree, "", "")}


def test_every_lock_is_known() -> None:
    """A new one must be found by the check that none is held."""
    model = fresh("qwen2_5_vl", image_cache="1MB")
    generate(model, picture("qwen2_5_vl"), 1)
    known = {id(lock) for lock in locks(model).values()}
    carried = {
        (kind.__module__, f"{kind.__name__}.{name}")
        for holder in holders(model) for name, value in vars(holder).items() if id(value) in known
        for kind in type(holder).__mro__
    }  # fmt: skip
    unseen = set()
    for path, tree in sources():
        module = ".".join(path.with_suffix("").parts)
        for name in locks_made(tree):
            value = None if "." in name else getattr(importlib.import_module(module), name or "no name", None)
            held_in = {id(each) for each in value.values()} if isinstance(value, Mapping) else {id(value)}
            if (module, name) not in carried and not (held_in and held_in <= known):
                unseen.add((module, name))
    assert unseen == ELSEWHERE


def test_locks_are_seen_wherever_they_are_made() -> None:
    source = """
plain = threading.Lock()
typed: Lock = RLock()
ALL: dict[str, Lock] = {}
class Held:
    field: Lock = field(default_factory=threading.Lock)
    def __init__(self, given: Lock) -> Lock:
        self.lock: Lock = threading.Lock()
        self.given = given
def use():
    with ALL.setdefault("a", Lock()):
        return Lock()
"""
    assert locks_made(ast.parse(source)) == {"plain", "typed", "ALL", "Held.field", "Held.lock", ""}
