"""Settings of the Sphinx build: python -m sphinx -W docs docs/_build."""

import shutil
from importlib.metadata import version as version_of
from pathlib import Path

project = "latentlab"
author = "The latentlab contributors"
copyright = "The latentlab contributors, Apache License 2.0"
version = release = version_of("latentlab")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "conf.py", "**/.ipynb_checkpoints"]

# Sphinx reads only what lies below docs/, so the tutorials are copied in; git ignores the copies.
_here = Path(__file__).parent
_copies = _here / "tutorials"
shutil.rmtree(_copies, ignore_errors=True)
_copies.mkdir()
for _script in sorted((_here.parent / "tutorials").glob("[0-9]*.py")):
    shutil.copy2(_script, _copies)

# Pages: Markdown, and percent scripts that are run while the docs are built.
myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "auto"
nb_execution_timeout = 600  # of a cell, on a busy machine
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

# API: what a docstring says, in the order of the source.
# What torch says of a method that we override is not ours, and not always valid here.
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "furo"
html_title = "latentlab"
