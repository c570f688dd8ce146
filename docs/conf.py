"""Sphinx configuration: strict, with the tutorials and the snippets of pages executed at build."""

import os
import shutil
import sys
from pathlib import Path

import jupytext

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]
os.environ["PYTHONPATH"] = str(ROOT)  # for the kernels that run the tutorials

import tables  # noqa: E402

import energynet  # noqa: E402


def copy_tutorials() -> list[str]:
    """The tutorials below Sphinx's source folder, each with a link to itself as a notebook; their names."""
    folder = HERE / "tutorials"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "notebooks").mkdir(parents=True)
    scripts = sorted((ROOT / "tutorials").glob("*.py"))
    for script in scripts:
        jupytext.write(jupytext.read(script), folder / "notebooks" / f"{script.stem}.ipynb")
        head, title, *cells = script.read_text(encoding="utf-8").split("\n# %%")
        link = f" [markdown]\n# {{download}}`Download as a notebook <notebooks/{script.stem}.ipynb>`\n"
        (folder / script.name).write_text("\n# %%".join([head, title, link, *cells]), encoding="utf-8")
    return [script.stem for script in scripts]


tables.write(HERE / "results", HERE / "_generated", notebooks=copy_tutorials())

project = "energynet"
author = copyright = "energynet contributors"
version = release = energynet.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb", "mathml"]
exclude_patterns = ["*.py", "_build", "_generated", "results", "figures", "tutorials/notebooks", "**/.ipynb_checkpoints"]
default_role = "any"
html_theme = "furo"
html_title = "energynet"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["energynet.css"]
html_show_sphinx = False

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autosummary_generate = False  # the tables link to what autodoc shows on the same page
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]
autodoc_inherit_docstrings = False  # an override without a docstring is that of PyTorch or of the base class: not shown
nitpick_ignore_regex = [
    (r"any", r"torch\..*|Energy\.forward"),  # no inventory of PyTorch is fetched; forward has no docstring of its own
    (r"py:class", r"(torch|collections\.abc)\..*|Axes|energynet\.regularizers\.M"),  # annotations
    (r"py:class", r".*\.line_search\.Search|.*\.HessianPreconditioner"),  # abstract classes of the package that are not public
    (r"py:class", r"(∇E|a minimization)"),  # a property's "∇E of a minimization: ..." is read as a type
]
