"""Sphinx configuration: pages in MyST Markdown, the API reference from the docstrings. `make docs` builds build/docs."""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # document this working tree, whatever is installed

project = "mcseg"
author = "The mcseg maintainers"
release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

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
