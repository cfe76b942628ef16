"""Draw who imports whom between the rooms of hawk_compile: docs/rooms.svg.

    python docs/draw_rooms.py        # needs grimp, which import-linter brings, and Graphviz's dot

An arrow is as thick as it has imports, and goes down; one that went up would be red. What every room may use (errors,
compat, progress, versions) is left out.
"""

import subprocess
from collections import Counter
from pathlib import Path

import grimp

PACKAGES = ("hawk_compile", "hawk_compile.passes", "hawk_compile.kernels")
FLOORS = (
    ("tools",), ("saved",), ("exporting", "serving"), ("runtime",), ("compile", "capture"),
    ("plan",), ("settings",), ("passes",), ("kernels",),
)  # fmt: skip
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def arrows() -> Counter[tuple[str, str]]:
    """(room, room that it imports) -> number of modules' imports."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    found: Counter[tuple[str, str]] = Counter()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            rooms = room_of(module), room_of(imported)
            if rooms[0] != rooms[1] and all(room in FLOOR for room in rooms):
                found[rooms] += 1
    return found


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


def main() -> None:
    lines = ["digraph rooms {", 'node [shape=box style=filled fillcolor="#eef3fb" fontname=Helvetica]', "ranksep=0.5"]
    for rooms in FLOORS:
        lines.append("{ rank=same " + " ".join(f'"{room}"' for room in rooms) + " }")
    for (room, imported), count in sorted(arrows().items()):
        color = "#33507a" if FLOOR[room] < FLOOR[imported] else "red"
        width = 1 + count / 12
        lines.append(f'"{room}" -> "{imported}" [penwidth={width:.1f} color="{color}" xlabel="{count}" fontsize=9]')
    lines.append("}")
    picture = Path(__file__).with_name("rooms.svg")
    subprocess.run(["dot", "-Tsvg", "-o", picture], input="\n".join(lines), text=True, check=True)
    print(f"{picture}: {sum(arrows().values())} imports between rooms")


if __name__ == "__main__":
    main()
