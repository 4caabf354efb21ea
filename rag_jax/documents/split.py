"""Markdown cut along headings and paragraphs into passages of so many tokens, each with the headings above it."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rag_jax.documents.convert import Document

HEADING = re.compile(r"^(#{1,6})\s+(.+?)\s*#*\s*$")
FENCE = re.compile(r"^\s*(```|~~~)")


@dataclasses.dataclass(frozen=True)
class Passage:
    passage: str
    title: str
    section: str  # headings above it, outermost first
    document: str
    position: int  # in its document, from 0
    tokens: int


def words(text: str) -> int:
    """Tokens, roughly, where no tokenizer is given: four for three words or marks."""
    return -(-len(re.findall(r"\w+|[^\w\s]", text)) * 4 // 3)


class Splitter(NamedTuple):
    cut: Callable[[str], list[tuple[int, str]]]  # a text's pieces, and where they begin
    count: Callable[[str], int]  # tokens, without those that stand around a text


@functools.lru_cache(maxsize=4)
def splitter(tokenizer: str | None, most: int) -> Splitter:
    """Of pieces of at most so many tokens of a tokenizer.json; None: `words`."""
    import semantic_text_splitter
    import tokenizers

    kind = semantic_text_splitter.MarkdownSplitter
    if tokenizer is None:
        return Splitter(kind.from_callback(words, most).chunk_indices, words)
    own = tokenizers.Tokenizer.from_file(tokenizer)
    own.no_truncation()
    own.no_padding()
    cut = kind.from_huggingface_tokenizer(own, most).chunk_indices
    return Splitter(cut, lambda text: len(own.encode(text, add_special_tokens=False).ids))


def passages(document: Document, name: str, splitter: Splitter) -> list[Passage]:
    """The passages of a document in their order; pieces without words, such as a lone heading, are left out."""
    headings = _headings(document.text)
    found: list[Passage] = []
    for start, text in splitter.cut(document.text):
        if _is_heading(text) or not any(c.isalnum() for c in text):
            continue  # a heading is the section of what follows
        section = _section(headings, start, document.title)
        found.append(Passage(text, document.title, section, name, len(found), splitter.count(text)))
    return found


def _is_heading(text: str) -> bool:
    return all(HEADING.match(line) for line in text.splitlines() if line.strip())


def _headings(text: str) -> list[tuple[int, int, str]]:
    """(place, level, words) of each heading outside of code."""
    found, at, fenced = [], 0, False
    for line in text.splitlines(keepends=True):
        fenced ^= bool(FENCE.match(line))
        match = None if fenced else HEADING.match(line.rstrip("\n"))
        if match:
            found.append((at, len(match[1]), re.sub(r"[*_`]", "", match[2])))
        at += len(line)
    return found


def _section(headings: Sequence[tuple[int, int, str]], start: int, title: str) -> str:
    """The headings above a place, its own among them; the document's title is not said again."""
    path: list[tuple[int, str]] = []
    for at, level, text in headings:
        if at > start:
            break
        path = [(above, named) for above, named in path if above < level] + [(level, text)]
    names = [named for _, named in path]
    return " > ".join(names[1:] if names[:1] == [title] else names)
