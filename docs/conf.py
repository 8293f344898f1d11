"""Sphinx's configuration of the course's site; ``make site`` builds it from what docs/source.py writes."""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

from colab import repository  # noqa: E402
from source import as_rst  # noqa: E402

project = "kvlearn"
author = "The kvlearn authors"
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["**/.ipynb_checkpoints"]
nitpicky = False

nb_execution_mode = "off"  # outputs as they are committed
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]  # a score's own type, which has an HTML form beside it

highlight_language = "text"  # literal blocks of docstrings are equations more often than code
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False

html_theme = "sphinx_book_theme"
html_title = "kvlearn"
html_static_path = [str(ROOT / "docs" / "static")]
html_css_files = ["kvlearn.css"]
html_theme_options = {
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    **(
        {
            "repository_url": repository(ROOT),
            "repository_branch": "main",
            "use_repository_button": True,
            "launch_buttons": {"binderhub_url": "https://mybinder.org"},
        }
        if repository(ROOT)
        else {}
    ),
}


def setup(app: object) -> None:
    """Docstrings are plain text: their equations and tables stay as they are written."""
    app.connect("autodoc-process-docstring", lambda *given: as_rst(given[-1]))  # type: ignore[attr-defined]
