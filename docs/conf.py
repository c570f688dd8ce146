"""Sphinx configuration: strict, with the tutorials executed at build."""

import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
os.environ["PYTHONPATH"] = str(HERE.parent)  # for the kernels that run the tutorials

import energynet  # noqa: E402

# The tutorials live beside the documentation; Sphinx reads what lies below its source folder.
shutil.rmtree(HERE / "tutorials", ignore_errors=True)
shutil.copytree(HERE.parent / "tutorials", HERE / "tutorials", ignore=shutil.ignore_patterns("__pycache__", ".*"))

project = "energynet"
author = copyright = "energynet contributors"
version = release = energynet.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_nb"]
exclude_patterns = ["conf.py", "_build", "results", "**/.ipynb_checkpoints"]
default_role = "any"
html_theme = "furo"
html_title = "energynet"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures show them; the shapes stand in the text
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]
autodoc_inherit_docstrings = False  # an override without a docstring is that of PyTorch or of the base class: not shown
nitpick_ignore_regex = [
    (r"any", r"torch\..*|Energy\.forward"),  # no inventory of PyTorch is fetched; forward has no docstring of its own
    (r"py:class", r"(torch\..*|∇E|a minimisation)"),  # a property's "∇E of a minimisation: ..." is read as a type
]
