"""One tree of errors: `except hawk_compile.HawkError` catches all that this package raises on purpose."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hawk_compile
from hawk_compile import errors
from hawk_compile.compile.backend import hawk
from tests.messages import constants, named, sources, template
from tests.passes import graphs

BUILT_IN = {name for name, found in vars(builtins).items() if isinstance(found, type) and issubclass(found, Exception)}
NOT_OURS = {"AssertionError", "AttributeError"}
"""What says that the code itself is wrong, and how Python wants to be told that a module has no such name."""
CAUGHT = {("hawk_compile/files.py", "ValueError"), ("hawk_compile/files.py", "OSError")}
"""What is caught: json wants to be told by a ValueError that it reads what no file should hold, and who writes files
waits for the system's errors."""


def test_every_error_is_of_the_tree_and_at_hand():
    kinds = {name: found for name, found in vars(errors).items() if isinstance(found, type)}
    assert set(errors.__all__) == kinds.keys()
    assert all(issubclass(found, errors.HawkError) for found in kinds.values())
    assert hawk_compile.HawkError is errors.HawkError
    assert {name for name in hawk_compile.__all__ if name.endswith("Error")} <= kinds.keys()


def test_the_page_lists_them_with_their_bases() -> None:
    page = (Path(__file__).parents[1] / "docs/calls.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(?:errors\.)?(\w+Error)` \| (?:`(\w+)`)? ?\|", page, flags=re.MULTILINE)
    public = {name for name in hawk_compile.__all__ if name.endswith("Error")} - {"HawkError"}
    assert public <= {name for name, _ in told}
    for name, base in told:
        kind, other = getattr(errors, name), getattr(builtins, base, None) or getattr(errors, base or "HawkError")
        assert issubclass(kind, other), name


def raised() -> Iterator[tuple[str, str, ast.Call, ast.Module]]:
    """(file, class, call, module) of whatever the package raises, but what it raises again."""
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                yield str(path), ast.unparse(node.exc.func), node.exc, tree


def test_nothing_else_is_raised() -> None:
    others = {(file, name) for file, name, _, _ in raised() if name in BUILT_IN - NOT_OURS}
    assert others == CAUGHT


OF_ANY_CLASS = "refusal"
"""What `hawk_compile.files` calls the class that it is told to raise."""
REMEDY = re.compile(
    r"(?:^|[:;,.(] |\bor |\band |\bso |\bthen |\bfirst )(?:do not |a )?"
    r"(?:give|take|leave|call|pass|pip install|install|set|put|load|use|export|copy|start|add|write|let|go on|ask"
    r"|prefill|crop|restore|convert|reshape|choose|remove|replace|correct|mend|send|download|raise|switch|capture|compile|run"
    r"|look|draft|make|save|name|try|pad|skip|mark|prune|check|enter|deploy|hawk_compile\.restore)\b",
    re.IGNORECASE,
)
"""What tells a reader to do something, at the beginning of a clause."""
ALLOWED = re.compile(
    r"\bmust (?:[^;:]*?\b)?(?:"
    r"(?:one|one or more|at least one|among)(?: of)?(?: the methods)? \.\.\."  # the names that there are
    r"|be \w+ or \w+,|\.\.\. or (?:None|a function)\b|or None,|each once"
    r"|in [\[(]|at least (?:\d|\.\.\.|one\b)|or more,|numbers >= 0|\d+ to \d+\b"  # the range
    r"|NAME="
    r")|\b(?:such as|like|as) [\[{\"\d]"  # an example
    r"|(?:^|; )(?:the|a server's|its|there)\b[^;]* are "  # what there is to choose from
)
"""What lists all that may be given, names the range that it may lie in or shows an example, which is a remedy too. That
a thing must be of a kind is none: `REMEDY` must say what to do then."""
TOLD_BY_ANOTHER = {
    "hawk_compile/versions.py": "texts of `difference` and `lacking`, which end in a pip command",
    "hawk_compile/tools/calibration/processes.py": "what stopped another process, in its own words",
    "hawk_compile/exporting/bounds.py": "a reason, which `encoder.py` puts into a message with its remedy",
}
"""Files whose messages hold those of others."""


def made() -> Iterator[tuple[str, str, ast.Call, ast.Module]]:
    """(file, class, call, module) of each of our errors that the package makes, to raise it there or elsewhere."""
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in {*errors.__all__, OF_ANY_CLASS}:
                yield str(path), name, node, tree


def says_what_to_do(call: ast.Call, names: dict[str, str]) -> bool:
    text = " ".join(template(part, names) for part in call.args)
    by_name = (ast.unparse(part).lower() for part in ast.walk(call) if isinstance(part, (ast.Name, ast.Call)))
    return bool(REMEDY.search(text) or ALLOWED.search(text) or any("remedy" in name for name in by_name))


def test_each_message_says_what_to_do_or_what_would_be_right() -> None:
    """As far as words show it: whether the remedy helps, no test can say."""
    silent = [
        f"{file}:{call.lineno} {name}: {' '.join(template(part) for part in call.args)}"
        for file, name, call, tree in made()
        if not says_what_to_do(call, constants() | named(tree, constants()))
    ]
    assert [line for line in silent if line.partition(":")[0] not in TOLD_BY_ANOTHER] == []
    assert {line.partition(":")[0] for line in silent} <= TOLD_BY_ANOTHER.keys()


@pytest.mark.parametrize(("text", "enough"), [
    ("question_mask must be a tensor [B, S], got str", False),
    ("question_mask must be a tensor [B, S], got str: give one", True),
    ("min must not be above max, got 3 and 2", False), ("out must be a file, got a folder", False),
    ("ratios must be a sequence of fractions in [0, 1), got 3", True), ("seed must be 0 or more, got -1", True),
    ("normalization must be one of ..., got 'L2'", True), ("compile_vision must be True or False, got 1", True),
    ("HAWK_DISABLE names x; the passes are ...", True), ("the cache is wrong", False),
])  # fmt: skip
def test_a_rule_that_does_not_say_what_is_allowed_is_no_remedy(text: str, enough: bool) -> None:
    call = ast.parse(f"ConfigError({text!r})", mode="eval").body
    assert isinstance(call, ast.Call) and says_what_to_do(call, {}) == enough


def test_a_pass_an_operator_and_a_setting_raise_it():
    gm = graphs.captured(graphs.Decoder(), *graphs.prompt(length=graphs.WIDTH), dynamic=False)
    with pytest.raises(hawk_compile.HawkError, match="dynamic=True"):
        hawk(gm, [], options={"ratio": 0.5, "backend": "eager"})
    with pytest.raises(hawk_compile.HawkError, match="keep must be"):
        torch.ops.hawk.gather(torch.zeros(1, 4), torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(hawk_compile.HawkError, match="ratio"):
        hawk(gm, [], options={"ratio": 2})
