"""Formulas as MathML, which every browser draws by itself: no script, nothing loaded from the net. A Sphinx extension."""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)

# docutils knows these by their LaTeX names only.
NAMES = {"∇": r"\nabla ", "∂": r"\partial ", "≤": r"\le ", "≥": r"\ge ", "≈": r"\approx ", "∑": r"\sum ", "→": r"\to ",
         "∈": r"\in ", "·": r"\cdot ", "×": r"\times ", "−": "-", "∞": r"\infty ", "½": r"\tfrac12 ", "‖": r"\Vert ",
         "←": r"\leftarrow ", "…": r"\dots ", "ᵀ": r"^\top "}  # fmt: skip
TAG = re.compile(r"\\tag\{(.*?)\}")


def mathml(node: nodes.Element, as_block: bool) -> str:
    """The formula of a node; as it was written, with a warning, where docutils cannot read it."""
    source = TAG.sub("", node.astext()).translate(str.maketrans(NAMES)).replace(r"\tfrac", r"\frac").replace(r"\!", "")
    try:
        return latex2mathml.tex2mathml(source, as_block=as_block)
    except MathError as error:
        logger.warning("formula %r: %s", node.astext(), error, location=node)
        return f"<code>{node.astext()}</code>"


def inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(mathml(node, as_block=False))
    raise nodes.SkipNode


def block(translator: Any, node: nodes.math_block) -> None:
    tag = TAG.search(node.astext())
    number = f'<span class="eqno">({tag[1]})</span>' if tag else ""
    translator.body.append(f'<div class="math">{mathml(node, as_block=True)}{number}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
