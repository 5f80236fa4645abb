"""The documentation site: `make docs` builds it into build/docs, to be read from files, search included."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "src"))

import ramulus  # noqa: E402

project, author = "ramulus", "The ramulus authors"
copyright = author
version = release = ramulus.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"ramulus {release}"
html_copy_source, html_show_search_summary = False, False  # a page from files may not fetch another one
html_show_sphinx = False
default_role = "code"
nitpicky = False
suppress_warnings = ["config.cache"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88
napoleon_google_docstring, napoleon_numpy_docstring = True, False


def public_names(room: str) -> list[str]:
    """Directives for the public names of a room, types first."""
    names = [name for name, home in ramulus._HOME_OF.items() if home.split(".")[1] == room]
    kinds = {name: "class" if inspect.isclass(getattr(ramulus, name)) else "function" for name in names}
    told = []
    for name in sorted(names, key=lambda name: (kinds[name], name)):
        thing = getattr(ramulus, name)
        told += [f".. auto{kinds[name]}:: {thing.__module__}.{name}", ""]
    return told


def fill_in(app: Any, page: str, source: list[str]) -> None:
    """@API room@ becomes its public names; @REST@ in the index the pages that it does not name; pages outside of docs/ are named, not linked."""
    source[0] = re.sub(r"@API (\w+)@", lambda found: "\n".join(public_names(found[1])), source[0])
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\.md(#[^)]*)?\)", r"\1", source[0])
    if "@REST@" in source[0]:
        named = set(re.findall(r"^([\w/-]+)$", source[0], re.MULTILINE)) | {"index"}
        source[0] = source[0].replace("@REST@", "\n".join(sorted(app.project.docnames - named)))


def plain(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """A docstring of plain text: nothing but `code` means anything in it; examples and directives stay as they are."""
    for at, line in enumerate(lines):
        if line and not line.startswith((" ", ">>>", "...", ".. ", ":")):
            parts = re.split(r"(`[^`]+`)", line)
            lines[at] = "".join(f"`{part}`" if part[:1] == "`" and len(part) > 1 else escaped(part) for part in parts)


def escaped(text: str) -> str:
    """Text without any mark-up."""
    return re.sub(r"([*|\\`]|_(?=\W|$))", r"\\\1", text)


def setup(app: Any) -> None:
    """Connect what fills pages in."""
    app.connect("source-read", fill_in)
    app.connect("autodoc-process-docstring", plain, priority=600)
