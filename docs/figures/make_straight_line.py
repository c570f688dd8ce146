"""Draw the straight line of CONTRIBUTING.md: ``python docs/figures/make_straight_line.py`` writes straight_line.svg.

A blue arrow is an import, which tests/test_docs.py checks; an orange arrow is the way of the backward pass.
"""

from pathlib import Path

FORWARD, BACKWARD, INK, PALE = "#0072b2", "#c4500a", "#24292f", "#eef5fb"
LINE = {  # the main column, from top to bottom: module or folder, and what it does
    "layer": "stores configuration and parameters",
    "solve": "minimize and fixed_point",
    "engine.adjoint": "how gradients come back",
    "engine.root_gradient": "differentiates a root, to any order",
    "engine.driver": "who runs a task: Python here",
    "engine.tasks": "a solve and a gradient, of tensors only",
    "engine.loop": "the only loop; judges every sample",
    "solvers": "how to move, and what a problem is",
    "step": "the map g and its condition F = 0",
    "energy": "E(x, z; θ), which you write",
}
BRANCH = {  # the column on the right, each beside a piece of the line
    "engine.equation": "engine.loop",
    "engine.binding": "solvers",
}
ARROWS = [
    *zip(LINE, [*LINE][1:], strict=False),
    ("engine.tasks", "engine.equation"),
    ("engine.equation", "engine.binding"),
    ("engine.binding", "step"),
]
BRANCH_SAYS = {"engine.equation": "F = 0 and Aᵀu = v", "engine.binding": "tensors as inputs"}
WIDTH, ROW, TOP, LEFT, BOX, TALL, ASIDE = 736, 58, 58, 24, 180, 36, 486


def place(name: str) -> tuple[int, int]:
    """The upper left corner of a box."""
    beside = BRANCH.get(name, name)
    return (LEFT if name in LINE else ASIDE), TOP + ROW * [*LINE].index(beside)


def text(x: float, y: float, words: str, size: int = 15, color: str = INK, **style: str) -> str:
    more = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}"{more}>{words}</text>'


def box(name: str) -> str:
    x, y = place(name)
    shape = f'<rect x="{x}" y="{y}" width="{BOX}" height="{TALL}" rx="8" fill="{PALE}" stroke="{FORWARD}" stroke-width="1.6"/>'
    return shape + text(x + BOX / 2, y + TALL / 2 + 5, name, 14, text_anchor="middle", font_weight="600")


def path(way: str, color: str) -> str:
    head = "forward" if color == FORWARD else "backward"
    return f'<path d="{way}" fill="none" stroke="{color}" stroke-width="1.8" marker-end="url(#{head})"/>'


def arrow(start: str, end: str) -> str:
    """Down within a column; across in one bend."""
    (x, y), (to_x, to_y) = place(start), place(end)
    middle = BOX / 2
    if x == to_x:
        return path(f"M{x + middle} {y + TALL} V{to_y - 2}", FORWARD)
    if x < to_x:  # to the right: out at the side, down from above
        return path(f"M{x + BOX} {y + TALL / 2 + 8} H{to_x + middle - 10} q10 0 10 10 V{to_y - 2}", FORWARD)
    return path(f"M{x + middle} {y + TALL} V{to_y + TALL / 2 - 10} q0 10 -10 10 H{to_x + BOX + 2}", FORWARD)


def marker(name: str, color: str) -> str:
    return (f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="{color}"/></marker>')  # fmt: skip


def explanations() -> list[str]:
    right = [text(LEFT + BOX + 14, place(name)[1] + (13 if name in {"engine.tasks", "step"} else 23), says, 14)
             for name, says in LINE.items()]  # fmt: skip
    below = [text(ASIDE + BOX / 2 + 12, place(name)[1] + TALL + 15, says, 13) for name, says in BRANCH_SAYS.items()]
    return right + below


def backward() -> list[str]:
    """The adjoint's linear equation runs through the same loop; the gradients leave through the step."""
    edge, start, end = WIDTH - 30, place("engine.adjoint")[1] + 8, place("engine.loop")[1] - 17
    x, y, out = LEFT + BOX, place("step")[1], place("step")[1] + TALL + 10
    around = f"M{x + 1} {start} H{edge - 8} q8 0 8 8 V{end - 8} q0 8 -8 8"
    return [
        path(f"{around} H{x - 12} q-8 0 -8 8 V{end + 15}", BACKWARD),
        text(edge - 8, start + 26, "Aᵀu = v by the same loop", 13, BACKWARD, text_anchor="end"),
        text(edge - 8, start + 43, "with a linear solver", 13, BACKWARD, text_anchor="end"),
        path(f"M{x - 30} {y + TALL + 1} Q{x - 24} {out} {x - 8} {out} H{edge}", BACKWARD),
        text(edge, out - 7, "the step’s vector–Jacobian product: gradients of z and θ", 13, BACKWARD, text_anchor="end"),
    ]


def drawing() -> str:
    height = TOP + ROW * len(LINE) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="Helvetica, Arial, sans-serif" '
        'role="img" aria-label="The straight line: each module imports those that its arrows lead to.">',
        f"<defs>{marker('forward', FORWARD)}{marker('backward', BACKWARD)}</defs>",
        f'<rect width="{WIDTH}" height="{height}" rx="12" fill="#ffffff"/>',
        text(LEFT + BOX / 2, 34, "imports ↓", 16, FORWARD, text_anchor="middle", font_weight="600"),
        text(WIDTH - 34, 34, "backward pass", 16, BACKWARD, text_anchor="end", font_weight="600"),
        *(box(name) for name in (*LINE, *BRANCH)),
        *(arrow(*pair) for pair in ARROWS),
        *explanations(),
        *backward(),
    ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("straight_line.svg").write_text(drawing(), encoding="utf-8")
