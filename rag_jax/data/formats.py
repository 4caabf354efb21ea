"""What a table's columns mean: named by the config, or recognised as one of the layouts that others write.

A part is "query", "passage" and so on. What is asked for it is a column's name, a path into its values such as
`answers.text` or `ctxs[0].text`, a template such as `{title} {text}`, or several of these, whose values are one list.
"""

import dataclasses
import itertools
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from rag_jax.data.tables import Columns, Table
from rag_jax.errors import UserError

Asked = str | tuple[str, ...]
STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
MOST_SHOWN = 80  # characters of a column's name


@dataclasses.dataclass(frozen=True)
class Format:
    """A layout: the columns by which it is known, and where its parts are; those that are not there are left out."""

    name: str
    known_by: frozenset[str]
    parts: Mapping[str, Asked]


def _format(name: str, known_by: str, **parts: Asked) -> Format:
    return Format(name, frozenset(known_by.split()), parts)


ANSWERS = ("answer", "answers", "answer_text", "response")  # whichever is there
# The first whose columns are there.
FORMATS = (
    _format(
        "dpr",
        "question positive_ctxs",
        query="question",
        passage="positive_ctxs",
        negative="hard_negative_ctxs",
        answer="answers",
    ),
    _format(
        "tevatron", "query positive_passages", query="query", passage="positive_passages", negative="negative_passages"
    ),
    _format(
        "ms-marco", "query passages answers", query="query", passage="passages", negative="passages", answer="answers"
    ),
    _format(
        "flagembedding",
        "query pos",
        query="query",
        passage="pos",
        negative="neg",
        passage_score="pos_scores",
        negative_score="neg_scores",
    ),
    _format("squad", "question context answers", query="question", passage="context", answer="answers"),
    _format("squad", "question context", query="question", passage="context"),
    _format("sentence-transformers", "anchor positive", query="anchor", passage="positive", negative="negative"),
    _format("sentence-transformers", "query positive", query="query", passage="positive", negative="negative"),
    _format(
        "prepared questions",
        "question passage answer document position",
        query="question",
        passage="passage",
        answer="answer",
    ),
    _format("question and passage", "question passage", query="question", passage="passage"),
    _format("query and passage", "query passage", query="query", passage="passage"),
    _format("chat", "messages", query="messages", answer="messages"),
    _format("chat", "conversations", query="conversations", answer="conversations"),
    _format("question and answer", "question answer", query="question", answer="answer"),
    _format("question and answer", "question answers", query="question", answer="answers"),
)
# Of a corpus alone.
CORPORA = (
    _format("prepared documents", "passage title section document position", passage="passage", document="document"),
    _format("beir", "_id title text", passage="{title} {text}"),
    _format("beir", "_id text", passage="text"),
    _format("tevatron", "docid title text", passage="{title} {text}"),
    _format("title and text", "title text", passage="{title} {text}"),
    _format("passages", "passage", passage="passage"),
    _format("text", "text", passage="text"),
    _format("contexts", "context", passage="context"),
)
NAMES = sorted({each.name for each in (*FORMATS, *CORPORA)})


def columns_of(asked: Asked | Sequence[Asked], names: Sequence[str]) -> list[str]:
    """The columns that are read for it, [] for one that is not there."""
    if not isinstance(asked, str):
        return list(dict.fromkeys(itertools.chain.from_iterable(columns_of(each, names) for each in asked)))
    if asked in names:
        return [asked]
    fields = _fields(asked)
    if fields:
        found = [columns_of(field, names) for field in fields]
        return list(dict.fromkeys(itertools.chain.from_iterable(found))) if all(found) else []
    base = next((name for name in names if asked.startswith((f"{name}.", f"{name}["))), None)
    return [base] if base is not None and _steps(asked[len(base) :]) is not None else []


def cells(asked: Asked, columns: Columns, num_rows: int) -> Sequence:
    """What is asked for, a row each, from the values of its columns."""
    if isinstance(asked, tuple):
        parts = [cells(each, columns, num_rows) for each in asked]
        return [list(row) for row in zip(*parts, strict=True)]
    if asked in columns:
        return columns[asked]
    fields = _fields(asked)
    if fields:
        parts = [cells(field, columns, num_rows) for field in fields]
        return [_filled(asked, dict(zip(fields, row, strict=True))) for row in zip(*parts, strict=True)]
    base = next(name for name in columns if asked.startswith((f"{name}.", f"{name}[")))
    steps = _steps(asked[len(base) :]) or []
    return [_walk(value, steps) for value in columns[base]]


def _fields(asked: str) -> list[str]:
    """The columns that a template names; [] where it is none."""
    if "{" not in asked:
        return []
    try:
        return [name for _, name, _, _ in string.Formatter().parse(asked) if name]
    except ValueError:
        return []


def _filled(template: str, values: Mapping[str, Any]) -> Any:
    """The template with a row's values; of lists, as many texts as the longest has."""
    lengths = [len(value) for value in values.values() if isinstance(value, list)]

    def text(at: int) -> str:
        each = {
            name: (value[at] if at < len(value) else "") if isinstance(value, list) else value
            for name, value in values.items()
        }
        parts = string.Formatter().parse(template)
        return "".join(f"{literal}{_plain(each[name]) if name else ''}" for literal, name, _, _ in parts).strip()

    return [text(at) for at in range(max(lengths))] if lengths else text(0)


def _plain(value: Any) -> str:
    return "" if value is None else str(value)


def _steps(path: str) -> list[str | int] | None:
    """`.text` and `[0]` one after the other; None for what is no such path."""
    found = [(key, index) for key, index in STEP.findall(path)]
    written = "".join(f".{key}" if key else f"[{index}]" for key, index in found)
    return [key if key else int(index) for key, index in found] if written == path and found else None


def _walk(value: Any, steps: Sequence[str | int]) -> Any:
    """What stands at the end of a path; of a list each entry's, where the path names a key."""
    for n, step in enumerate(steps):
        if isinstance(step, int):
            value = value[step] if isinstance(value, list) and step < len(value) else None
        elif isinstance(value, list):
            return [_walk(each, steps[n:]) for each in value]
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def recognised(table: Table, wanted: Mapping[str, Asked], name: str, where: str, *, corpus: bool) -> Format | None:
    """The layout of a table, by the name that is given or else by its columns; None for none."""
    known = CORPORA + FORMATS if corpus else FORMATS
    if name in ("auto", "columns"):
        found = next((each for each in known if each.known_by <= set(table.names)), None)
    else:
        named = [each for each in known if each.name == name]
        found = next((each for each in named if each.known_by <= set(table.names)), None)
        if found is None:
            needed = " or ".join(", ".join(sorted(each.known_by)) for each in named) or "nothing, for a corpus"
            raise UserError(
                f"{where} is not of data.format={name}, which has columns {needed}; it has: {shown_names(table.names)}"
            )
    return None if found is None else complete(found, table.names, wanted)


def complete(found: Format, names: Sequence[str], wanted: Mapping[str, Asked]) -> Format:
    """The layout with only what is there: answers under any usual name, all of negative_1, negative_2 and so on."""
    parts = {part: asked for part, asked in found.parts.items() if columns_of(asked, names)}
    if "answer" not in parts:
        answer = next((name for name in ANSWERS if name in names and name not in parts.values()), None)
        parts |= {} if answer is None else {"answer": answer}
    if "negative" not in parts and "negative" in found.parts:
        several = sorted(
            (name for name in names if re.fullmatch(r"negative_?\d+", name)),
            key=lambda name: int(re.sub(r"\D", "", name)),
        )
        parts |= {"negative": tuple(several)} if several else {}
    # A document that the config names is no matter of the layout.
    own = {part: asked for part, asked in wanted.items() if part not in found.parts and columns_of(asked, names)}
    return dataclasses.replace(found, parts=own | parts)


def shown(found: Format) -> str:
    """What was recognised, for the start of a run."""
    parts = ", ".join(
        f"{part} from {asked!r}" if isinstance(asked, str) else f"{part} from {', '.join(map(repr, asked))}"
        for part, asked in found.parts.items()
    )
    return f"recognised as {found.name}: {parts}"


def shown_names(names: Sequence[str]) -> str:
    """Columns for a message on one line: a quote that does not close makes a name of half a file."""
    return ", ".join(" ".join(name.split())[:MOST_SHOWN] for name in names)


# What cells of others hold.


def texts_of(part: str, cell: Any) -> Any:
    """A text or a list of texts, of the shapes that others give to a cell; what is none of these stays as it is."""
    if isinstance(cell, list) and cell and all(isinstance(each, dict) for each in cell):
        if all("role" in each or "from" in each for each in cell):
            return _said(part, cell)
        found = [texts_of(part, each) for each in cell]
        flat = itertools.chain.from_iterable(each if isinstance(each, list) else [each] for each in found)
        return list(flat)
    if not isinstance(cell, dict):
        return cell
    if "passage_text" in cell and "is_selected" in cell:  # MS MARCO: the passages of a search, and which was right
        pairs = zip(cell["passage_text"] or (), cell["is_selected"] or (), strict=False)
        return [text for text, is_right in pairs if bool(is_right) == (part != "negative")]
    if "value" in cell and "aliases" in cell:  # TriviaQA
        return list(dict.fromkeys([cell["value"], *(cell["aliases"] or ())]))
    if "text" in cell:
        title = cell.get("title")
        text = cell["text"]
        return f"{title}\n{text}" if title and isinstance(text, str) and part != "answer" else text
    return cell


def _said(part: str, messages: Sequence[Mapping[str, Any]]) -> Any:
    """Of a conversation the last answer of the assistant, and what the user asked before it."""
    said = [(str(each.get("role", each.get("from"))), each.get("content", each.get("value"))) for each in messages]
    last = next((i for i in reversed(range(len(said))) if said[i][0] in ("assistant", "gpt", "model")), len(said))
    asked = next((text for role, text in reversed(said[:last]) if role in ("user", "human")), None)
    answer = said[last][1] if last < len(said) else None
    return {"query": asked, "answer": answer}.get(part)
