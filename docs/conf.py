"""Sphinx configuration: pages in MyST Markdown, the API reference from the docstrings. `make docs` builds build/docs."""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # document this working tree, whatever is installed

project = "mcseg"
author = "The mcseg maintainers"
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
release = _PROJECT["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # as GitHub does: a page can link to another page's headings

# A name in single backticks is a link if it is a documented object, and code otherwise.
default_role = "py:obj"
add_module_names = False
python_maximum_signature_line_length = 100
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Every reference to an object of mcseg has to resolve; other libraries' objects are not part of this site.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!mcseg\.).*")]

html_theme = "furo"
html_title = f"mcseg {release}"
html_show_copyright = False


def link_to_repository(app: Any, docname: str, source: list[str]) -> None:
    """Let links to files outside docs/, which GitHub shows, lead to the repository."""
    folder = (ROOT / "docs" / docname).parent

    def url(match: re.Match[str]) -> str:
        file = (folder / match[1]).resolve()
        if not file.is_relative_to(ROOT) or file.is_relative_to(ROOT / "docs"):
            return match[0]
        return f"]({_PROJECT['urls']['Source']}/blob/main/{file.relative_to(ROOT).as_posix()}"

    source[0] = re.sub(r"\]\((\.\./[^)#\s]+)", url, source[0])


def setup(app: Any) -> None:
    """Register the rewriting of links."""
    app.connect("source-read", link_to_repository)
