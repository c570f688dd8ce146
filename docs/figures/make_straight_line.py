"""Draw the straight line of docs/concepts.md: ``python docs/figures/make_straight_line.py`` writes straight_line.svg."""

from pathlib import Path

FORWARD, BACKWARD, INK, PALE = "#0072b2", "#c4500a", "#24292f", "#eef5fb"
LINE = [
    ("layer", "configuration, parameters"),
    ("solve", "checks what is passed"),
    ("adjoint", "how gradients come back"),
    ("derivative", "differentiates a root, any order"),
    ("driver", "Python, or a compiled program"),
    ("pure", "what it evaluates: tensors only"),
    ("equation", "F = 0, and its linear equation"),
    ("loop", "the only while; sample by sample"),
    ("problem", "what is being solved"),
    ("step", "the map g and its F"),
    ("energy", "E(x, z; θ): what you write"),
]
WIDTH, ROW, TOP, LEFT, BOX, TALL = 560, 58, 58, 24, 112, 36


def top(name: str) -> int:
    return TOP + ROW * [piece for piece, _ in LINE].index(name)


def middle(name: str) -> float:
    return top(name) + TALL / 2


def text(x: float, y: float, words: str, size: int = 15, color: str = INK, **style: str) -> str:
    more = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}"{more}>{words}</text>'


def box(x: float, y: float, words: str, color: str = FORWARD) -> str:
    shape = f'<rect x="{x}" y="{y}" width="{BOX}" height="{TALL}" rx="8" fill="{PALE}" stroke="{color}" stroke-width="1.6"/>'
    return shape + text(x + BOX / 2, y + TALL / 2 + 5, words, text_anchor="middle", font_weight="600")


def arrow(path: str, color: str, start: bool = False) -> str:
    head = "forward" if color == FORWARD else "backward"
    both = f' marker-start="url(#{head})"' if start else ""
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.8" marker-end="url(#{head})"{both}/>'


def marker(name: str, color: str) -> str:
    return (f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="{color}"/></marker>')  # fmt: skip


def drawing() -> str:
    height = TOP + ROW * len(LINE) + 18
    center, right, edge = LEFT + BOX / 2, LEFT + BOX, WIDTH - 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="Helvetica, Arial, sans-serif" '
        'role="img" aria-label="The straight line: each piece imports only those below it.">',
        f"<defs>{marker('forward', FORWARD)}{marker('backward', BACKWARD)}</defs>",
        f'<rect width="{WIDTH}" height="{height}" rx="12" fill="#ffffff"/>',
        text(center, 34, "forward ↓", 16, FORWARD, text_anchor="middle", font_weight="600"),
        text(edge, 34, "backward", 16, BACKWARD, text_anchor="end", font_weight="600"),
    ]
    for (name, says), following in zip(LINE, [*LINE[1:], None], strict=True):
        parts.append(box(LEFT, top(name), name))
        if name != "loop":
            parts.append(text(right + 14, middle(name) + 5, says, 14))
        if following:
            parts.append(arrow(f"M{center} {top(name) + TALL} V{top(following[0]) - 2}", FORWARD))
    # Beside the loop: who moves.
    parts.append(arrow(f"M{right + 3} {middle('loop')} H{right + 49}", FORWARD, start=True))
    parts.append(box(right + 52, top("loop"), "solver"))
    parts.append(text(right + 52 + BOX + 10, middle("loop") + 5, "how to move", 14))
    # Back: the adjoint's linear equation through the same loop; then the vjp of the step.
    start, down = top("adjoint") + 5, middle("loop") + 26
    around = f"H{edge - 8} Q{edge} {start} {edge} {start + 8} V{down - 8} Q{edge} {down} {edge - 8} {down}"
    parts.append(arrow(f"M{right + 1} {start} {around} H{center + 66} L{center + 50} {top('loop') + TALL + 2}", BACKWARD))
    parts.append(text(edge - 8, middle("derivative") + 34, "Aᵀu = v, the same loop,", 13, BACKWARD, text_anchor="end"))
    parts.append(text(edge - 8, middle("derivative") + 51, "a linear solver", 13, BACKWARD, text_anchor="end"))
    y = middle("step") + 29
    parts.append(arrow(f"M{right - 12} {top('step') + TALL + 2} Q{right - 6} {y} {right + 10} {y} H{edge - 6}", BACKWARD))
    parts.append(text(edge - 8, y - 8, "the step’s vjp: gradients of z and θ", 13, BACKWARD, text_anchor="end"))
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("straight_line.svg").write_text(drawing(), encoding="utf-8")
