"""Sphinx's configuration of the book. `make book` first writes the sources to book/_build/source: see tools/book.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import book_hooks

project = "kvgather"
author = "the kvgather authors"
copyright = author
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.linkcode", "sphinx.ext.napoleon"]

nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # their scripts would come from a network
nb_merge_streams = True
myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 3

default_role = "code"
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
# Sphinx would take the first name of "key_cache, value_cache: the pools" for the type of the second.
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
linkcode_resolve = book_hooks.link_to_source

html_theme = "furo"
html_title = "kvgather"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
# Summaries are fetched, which a browser refuses for pages that it opened from a disk.
html_show_search_summary = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "a11y-light"
pygments_dark_style = "a11y-dark"


def setup(app: object) -> None:
    book_hooks.connect(app)
