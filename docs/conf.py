"""How Sphinx makes the site: `make docs`. Markdown pages, and the reference from the docstrings."""

import re
from typing import Any

from jpo_ray import __version__

project = "jpo-ray"
author = "The jpo-ray authors"
copyright = "2026, the jpo-ray authors. Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "jpo-ray"
html_static_path = ["pictures"]
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
highlight_language = "none"  # of blocks that name no language

default_role = "code"  # docstrings write `name` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
add_module_names = False


def literal_stars(_app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: a star or a trailing underscore in them is no markup."""
    for place, line in enumerate(lines):
        pieces = re.split(r"(`[^`]*`)", line)
        lines[place] = "".join(
            piece if piece.startswith("`") else re.sub(r"([*|])|(?<=\w)(_)(?=\W|$)", r"\\\1\2", piece)
            for piece in pieces
        )


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", literal_stars)
