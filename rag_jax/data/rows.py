"""Rows of (query, passages, answer) texts, and corpora of passages, from tables of all kinds."""

import ast
import collections
import dataclasses
import datetime
import decimal
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rag_jax import untrusted
from rag_jax.data import formats, tables
from rag_jax.data.formats import Asked
from rag_jax.errors import UserError

# Columns of scores, and what they are of.
SCORED = {"passage_score": "passage", "negative_score": "negative"}
# Of the passages of a corpus, where the config names none.
CORPUS_COLUMN = "Abstract"
# What says where a passage comes from, and the columns that are looked for where the config has none.
SOURCE_COLUMNS = {"passage": CORPUS_COLUMN, "document": "document", "section": "section"}
# What is used as it prints.
PRINTED = (str, int, float, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta, type(None))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Texts of each row, empty where it lacks one; negatives and documents are None where no such column is named."""

    queries: list[str]
    passages: list[list[str]]  # known to answer the query: none, one or several a row
    answers: list[str]
    negatives: list[list[str]] | None = None  # passages given as wrong ones, none or several a row
    documents: list[str] | None = None  # in which the answer stands
    scores: list[dict[str, float]] | None = None  # of the passages and negatives that have one
    accepted: list[list[str]] | None = None  # all right answers, `answers` first, where some row has several
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # how they were read, where not plainly

    def __len__(self) -> int:
        return len(self.queries)

    def take(self, indices: Iterable[int]) -> "Rows":
        rows = list(indices)
        columns = {name: column for name, column in vars(self).items() if name != "notes"}
        taken = {name: column and [column[i] for i in rows] for name, column in columns.items()}
        return Rows(**taken, notes=self.notes)


def columns_of(section: Any, key: str) -> dict[str, Asked | None]:
    """Where the parts of a source are; `section`: the config's `data`, `key`: the source's own, such as data.eval."""
    own = {"data.eval": section.eval_columns, "data.passages": section.passages_columns}.get(key, {})
    return section.columns.to_dict() | {part: name for part, name in dict(own).items() if name is not None}


def read_rows(
    source: str,
    key: str,
    columns: Mapping[str, Asked | None],
    *,
    with_answers: bool = True,
    with_negatives: bool = False,
    passages_may_miss: bool = False,
    layout: str = "auto",
) -> Rows:
    """All rows of `source` (see `tables`), in file order.

    `columns` says where "query", "passage", "answer", "document" and "passage_score" are, None where there is none, and
    "negative" and "negative_score" `with_negatives` (see `formats`); where they are not there, the table may be of a
    known `layout`. That of "passage" may not be there if `passages_may_miss`. A cell of passages, negatives or answers
    is a text or a list of texts, one of scores a number or a list. `key` is the config key that errors name.
    Raises UserError for a source that is missing, unreadable, without such columns or without rows.
    """
    asked = {"answer": with_answers, "negative": with_negatives, "negative_score": with_negatives}
    left_out = {part for part, is_asked in asked.items() if not is_asked}
    wanted = {part: name for part, name in columns.items() if name is not None and part not in left_out}
    may_miss = {"passage"} if passages_may_miss else set()
    where = f"{key}={source!r}"
    cells, names, notes = _cells(source, where, key, wanted, may_miss, layout)
    cells = {part: values for part, values in cells.items() if part not in left_out}
    found: dict[str, Any] = {}
    for part, values in cells.items():
        if part not in SCORED:
            read = _texts if part in ("query", "document") else _lists
            found[part] = read(_plain(part, values, names[part], notes), f"{where}: column {names[part]}")
    nothing = [""] * len(found["query"])
    answers = found.get("answer")
    scored = SCORED.keys() & cells.keys()
    return Rows(
        found["query"],
        found.get("passage") or [[] for _ in nothing],
        nothing if answers is None else [texts[0] if texts else "" for texts in answers],
        found.get("negative"),
        found.get("document"),
        _scores(cells, names, where) if scored else None,
        answers if answers is not None and any(len(texts) > 1 for texts in answers) else None,
        tuple(notes),
    )


def _scores(cells: Mapping[str, Sequence], names: Mapping[str, str], where: str) -> list[dict[str, float]]:
    """The scores of each row's texts; one that stands twice has its first."""
    scores: list[dict[str, float]] = [{} for _ in next(iter(cells.values()))]
    for part, of in SCORED.items():
        pairs = zip(scores, cells.get(of, ()), cells.get(part, ()), strict=False)
        for number, (row, texts, numbers) in enumerate(pairs, start=1):
            texts, numbers = ([cell] if not isinstance(cell, list) else cell for cell in (texts, numbers))
            if len(texts) != len(numbers):
                raise UserError(
                    f"{where}: row {number} has {len(texts)} texts in column {names[of]} and {len(numbers)} scores "
                    f"in column {names[part]}; give each its own"
                )
            at = f"{where}: column {names[part]} holds"
            for text, number_of_text in zip(texts, (_number(value, at, number) for value in numbers), strict=True):
                if number_of_text is not None and isinstance(text, str):
                    row.setdefault(text, number_of_text)
    return scores


def _number(value: Any, holds: str, row: int) -> float | None:
    """None where there is none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"{holds} {untrusted.short(value)} in row {row}: give a finite number")
    return number


def read_corpus(
    source: str, key: str, columns: Mapping[str, Asked | None], *, may_miss: bool = False, layout: str = "auto"
) -> tuple[list[tuple[str, str]], list[str]]:
    """(passage, document) of every passage that is not blank, in file order; the document is "" where none is named.

    And how they were read, where that is not plain.

    `may_miss`: a file without the column of passages has none.
    """
    passage, document = columns.get("passage") or CORPUS_COLUMN, columns.get("document")
    wanted = {"passage": passage} | ({} if document is None else {"document": document})
    where, missing = f"{key}={source!r}", {"passage"} if may_miss else set()
    cells, names, notes = _cells(source, where, key, wanted, missing, layout, corpus=True)
    read = {part: _plain(part, values, names[part], notes) for part, values in cells.items()}
    texts = _lists(read["passage"], f"{where}: column {names['passage']}")
    documents = [""] * len(texts)
    if "document" in read:
        documents = _texts(read["document"], f"{where}: column {names['document']}")
    return [(text, name) for row, name in zip(texts, documents, strict=True) for text in row], notes


def read_passages(source: str, columns: Mapping[str, Asked | None], key: str, *, may_miss: bool = False) -> list[str]:
    """The distinct non-empty passages of a source, in file order."""
    corpus, _ = read_corpus(source, key, {"passage": columns.get("passage")}, may_miss=may_miss)
    return list(dict.fromkeys(passage for passage, _ in corpus))


def read_sources(source: str, columns: Mapping[str, Asked | None], key: str) -> dict[str, str]:
    """Where passages come from, by their texts: the document and, in a column `section`, the headings above them.

    The document is in its column of the config, else in one called so; none of a file without either.
    """
    where = f"{key}={source!r}"
    table = tables.open_table(source, where, key)
    asked: dict[str, Asked | None] = {part: columns.get(part) or name for part, name in SOURCE_COLUMNS.items()}
    if not formats.columns_of(asked["passage"] or "", table.names):
        found = formats.recognised(table, {}, "auto", where, corpus=True)
        asked["passage"] = found.parts.get("passage") if found else None
    there = {part: name for part, name in asked.items() if name and formats.columns_of(name, table.names)}
    if not {"passage", "document"} <= there.keys():
        return {}
    values = table.read(formats.columns_of(tuple(there.values()), table.names))
    cells = {
        part: _plain(part, formats.cells(name, values, table.num_rows), _name(name), []) for part, name in there.items()
    }
    passages = _lists(cells["passage"], f"{where}: column {there['passage']}")
    of_row = [_texts(cells[part], f"{where}: column {there[part]}") for part in SOURCE_COLUMNS if part in cells][1:]
    named = [" > ".join(part for part in parts if part) for parts in zip(*of_row, strict=True)]
    return {text: name for row, name in zip(passages, named, strict=True) for text in row if name}


def read_queries(source: str, key: str, columns: Mapping[str, Asked | None]) -> list[str]:
    """The queries alone."""
    where = f"{key}={source!r}"
    cells, names, notes = _cells(source, where, key, {"query": columns["query"] or ""}, (), "auto")
    return _texts(_plain("query", cells["query"], names["query"], notes), f"{where}: column {names['query']}")


def _cells(
    source: str,
    where: str,
    key: str,
    wanted: Mapping[str, Asked],
    may_miss: Collection[str],
    layout: str,
    *,
    corpus: bool = False,
) -> tuple[dict[str, Sequence], dict[str, str], list[str]]:
    """The cells of each part, not yet as texts; what they were read from; and how, where that is not plain.

    Those of a part that is not there and `may_miss` are None.
    """
    table = tables.open_table(source, where, key)
    if not table.num_rows:
        raise UserError(f"{where} has no rows: give it at least a header line and rows below it")
    notes = list(table.notes)
    missing = [part for part, asked in wanted.items() if not formats.columns_of(asked, table.names)]
    parts: Mapping[str, Asked] = wanted
    if layout not in ("auto", "columns") or (layout == "auto" and set(missing) - set(may_miss)):
        found = formats.recognised(table, wanted, layout, where, corpus=corpus)
        if found is not None and (corpus or "query" in found.parts) and ("passage" in found.parts or not corpus):
            parts, notes = found.parts, [*notes, formats.shown(found)]
            missing = [part for part in wanted if part not in parts]
            may_miss = {*may_miss, "passage", "answer"}  # the others stand in no config unless somebody wants them
    absent = [f"{_name(wanted[part])} (data.columns.{part})" for part in missing if part not in may_miss]
    if absent:
        hint = "; rows that name no passage take a file of passages, data.passages" if key == "data.train" else ""
        raise UserError(
            f"{where} has no column {' nor '.join(absent)}; it has: {formats.shown_names(table.names)}"
            + (hint if "passage" in missing else "")
        )
    there = {part: asked for part, asked in parts.items() if formats.columns_of(asked, table.names)}
    columns = table.read(formats.columns_of(tuple(there.values()), table.names))
    cells = {part: formats.cells(asked, columns, table.num_rows) for part, asked in there.items()}
    cells |= {part: [None] * table.num_rows for part in missing}
    return cells, {part: _name(there.get(part, wanted.get(part, part))) for part in cells}, notes


def _name(asked: Asked) -> str:
    return repr(asked) if isinstance(asked, str) else ", ".join(map(repr, asked))


def _plain(part: str, values: Sequence, name: str, notes: list[str]) -> Sequence:
    """Cells of the shapes that others write, as texts and lists of texts; what was done to all of them is noted."""
    values = [formats.texts_of(part, value) for value in values]
    given = [value for value in values if value is not None and value == value and value != ""]
    if given and all(isinstance(value, float) and value.is_integer() for value in given):
        notes.append(f"whole numbers in column {name} without .0")
        return [int(value) if isinstance(value, float) and value == value else value for value in values]
    if part in ("passage", "negative", "answer") and given and all(_printed_list(value) is not None for value in given):
        notes.append(f"lists that stand as texts in column {name}")
        found = [_printed_list(value) for value in values]
        return [value if texts is None else texts for value, texts in zip(values, found, strict=True)]
    return values


def _printed_list(value: Any) -> list[str] | None:
    """The texts of a list as Python prints it, as pandas writes it to CSV."""
    if not isinstance(value, str) or not (value.startswith("[") and value.endswith("]")):
        return None
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    is_list = isinstance(found, list) and all(isinstance(each, str) for each in found)
    # numpy prints no commas, and Python would join what stands between them.
    return found if is_list and not re.search(r"""['"]\s+['"]""", value) else None


def _texts(values: Iterable[Any], where: str) -> list[str]:
    """One text per row."""
    return [_text(value, f"{where} holds", f"in row {number}") for number, value in enumerate(values, start=1)]


def _lists(values: Iterable[Any], where: str) -> list[list[str]]:
    """The texts of each row that are not blank: of a list, or of one text."""
    rows = enumerate((value if isinstance(value, list) else [value] for value in values), start=1)
    texts = ([_text(value, f"{where} holds", f"in row {number}") for value in row] for number, row in rows)
    return [[text for text in row if text.strip()] for row in texts]


def _text(value: Any, holds: str, at: str) -> str:
    """Numbers and dates as they print, a missing value as the empty text; a list, record or image is refused."""
    if not isinstance(value, PRINTED):
        raise UserError(f"{holds} a {type(value).__name__} {at}: make it one text per row")
    nothing = value is None or value != value  # NaN is how tables of numbers say nothing
    text = "" if nothing else str(value)
    if not untrusted.is_unicode(text):
        raise UserError(f"{holds} half a character (a lone surrogate) {at}: fix its encoding")
    if "\0" in text:
        raise UserError(f"{holds} a NUL character {at}: remove it")
    return text


def empty_fields(rows: Rows, needed: Iterable[str]) -> tuple[list[int], collections.Counter[str]]:
    """Indices of the rows that have all of what is `needed`, and how many of the others lack which of it first.

    Of "query", "passage" and "answer", a row can never do without the first.
    """
    fields: dict[str, Sequence] = {"query": rows.queries, "passage": rows.passages, "answer": rows.answers}
    fields = {name: column for name, column in fields.items() if name in {"query", *needed}}
    kept, empty = [], collections.Counter()
    for i in range(len(rows)):
        lacking = next((name for name, column in fields.items() if not _has_text(column[i])), None)
        if lacking is None:
            kept.append(i)
        else:
            empty[f"an empty {lacking}"] += 1
    return kept, empty


def _has_text(cell: str | list[str]) -> bool:
    return bool(cell) and (isinstance(cell, list) or bool(cell.strip()))
