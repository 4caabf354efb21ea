"""The page, put together: a skeleton, a style, a script, and the data as JSON that no text can break out of."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from rag_jax import files
from rag_jax.report import collect, tables

NAME = "report.html"
MARK = "<!-- a report of rag_jax -->"
HERE = pathlib.Path(__file__).parent
# Of a text inside a script element: nothing that ends the element or begins a comment, and no end of a line.
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def write(path: pathlib.Path, runs: Sequence[collect.Run]) -> None:
    """The report of the first run, beside the others, whole or not at all."""
    content = collect.page(runs) | {"markdown": tables.markdown(runs), "latex": tables.latex(runs)}
    files.write_whole(path, html(content))


def html(content: dict[str, Any]) -> str:
    parts = {name: (HERE / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")}
    return (
        parts["page.html"]
        .replace("{{mark}}", MARK)
        .replace("{{style}}", parts["page.css"])
        .replace("{{script}}", parts["page.js"])
        .replace("{{data}}", escaped(content))
    )


def escaped(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    for character, escape in ESCAPES.items():
        text = text.replace(character, escape)
    return text


def is_report(path: pathlib.Path) -> bool:
    """Whether a file is such a page, which another may take the place of."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return MARK in file.read(1000)
