"""Rows of (query, passages, answer) texts from files, `save_to_disk` folders and the hub, and corpora of passages."""

import codecs
import collections
import csv
import dataclasses
import datetime
import decimal
import itertools
import json
import math
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rag_jax import untrusted
from rag_jax.errors import UserError

Columns = dict[str, Sequence]
# Columns of scores, and what they are of.
SCORED = {"passage_score": "passage", "negative_score": "negative"}
# Of the passages of a corpus, where the config names none.
CORPUS_COLUMN = "Abstract"
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
LINE_END = re.compile(r"\r\n|\r|\n")
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

    def __len__(self) -> int:
        return len(self.queries)

    def take(self, indices: Iterable[int]) -> "Rows":
        rows = list(indices)
        return Rows(*(column and [column[i] for i in rows] for column in vars(self).values()))


def read_rows(
    source: str,
    key: str,
    columns: Mapping[str, str | None],
    *,
    with_answers: bool = True,
    with_negatives: bool = False,
    passages_may_miss: bool = False,
) -> Rows:
    """All rows of `source` (csv, tsv, json, jsonl, parquet, arrow, a save_to_disk folder or a hub name), in file order.

    `columns` gives the column of "query", "passage", "answer", "document" and "passage_score", None where there is
    none, and of "negative" and "negative_score" `with_negatives`; that of "passage" may not be there if
    `passages_may_miss`. A cell of passages or negatives is a text or a list of texts, one of scores a number or a list.
    `key` is the config key that errors name.
    Raises UserError for a source that is missing, unreadable, without such columns or without rows.
    """
    asked = {"answer": with_answers, "negative": with_negatives, "negative_score": with_negatives}
    left_out = {part for part, is_asked in asked.items() if not is_asked}
    wanted = {part: name for part, name in columns.items() if name is not None and part not in left_out}
    may_miss = {"data.columns.passage"} if passages_may_miss else set()
    values = _columns(source, key, {f"data.columns.{part}": name for part, name in wanted.items()}, may_miss)
    found: dict[str, list] = {}
    cells = dict(zip(wanted, values, strict=True))
    for part, name in wanted.items():
        if part not in SCORED:
            read = _lists if part in ("passage", "negative") else _texts
            found[part] = read(cells[part], f"{key}={source!r}: column {name!r}")
    nothing = [""] * len(found["query"])
    return Rows(
        found["query"],
        found.get("passage") or [[] for _ in nothing],
        found.get("answer") or nothing,
        found.get("negative"),
        found.get("document"),
        _scores(cells, columns, f"{key}={source!r}") if SCORED.keys() & cells.keys() else None,
    )


def _scores(cells: Mapping[str, Sequence], columns: Mapping[str, str | None], where: str) -> list[dict[str, float]]:
    """The scores of each row's texts; one that stands twice has its first."""
    scores: list[dict[str, float]] = [{} for _ in next(iter(cells.values()))]
    for part, of in SCORED.items():
        pairs = zip(scores, cells.get(of, ()), cells.get(part, ()), strict=False)
        for number, (row, texts, numbers) in enumerate(pairs, start=1):
            texts, numbers = ([cell] if not isinstance(cell, list) else cell for cell in (texts, numbers))
            if len(texts) != len(numbers):
                raise UserError(
                    f"{where}: row {number} has {len(texts)} texts in column {columns[of]!r} and {len(numbers)} scores "
                    f"in column {columns[part]!r}; give each its own"
                )
            at = f"{where}: column {columns[part]!r} holds"
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
    source: str, key: str, columns: Mapping[str, str | None], *, may_miss: bool = False
) -> list[tuple[str, str]]:
    """(passage, document) of every passage that is not blank, in file order; the document is "" where none is named.

    `may_miss`: a file without the column of passages has none.
    """
    passage, document = columns["passage"] or CORPUS_COLUMN, columns.get("document")
    wanted = {"data.columns.passage": passage} | ({} if document is None else {"data.columns.document": document})
    passages, *documents = _columns(source, key, wanted, {"data.columns.passage"} if may_miss else ())
    where = f"{key}={source!r}: column"
    texts = _lists(passages, f"{where} {passage!r}")
    names = _texts(documents[0], f"{where} {document!r}") if documents else [""] * len(texts)
    return [(text, name) for row, name in zip(texts, names, strict=True) for text in row]


def read_passages(source: str, column: str | None, key: str, *, may_miss: bool = False) -> list[str]:
    """The distinct non-empty passages of one column, in file order."""
    corpus = read_corpus(source, key, {"passage": column}, may_miss=may_miss)
    return list(dict.fromkeys(passage for passage, _ in corpus))


def read_columns(source: str, key: str, wanted: Mapping[str, str]) -> list[list[str]]:
    """The wanted columns as texts, in the order of `wanted` (config key -> column name)."""
    columns = zip(wanted.values(), _columns(source, key, wanted), strict=True)
    return [_texts(values, f"{key}={source!r}: column {name!r}") for name, values in columns]


def _columns(source: str, key: str, wanted: Mapping[str, str], may_miss: Collection[str] = ()) -> list[Sequence]:
    """The wanted columns, not yet as texts; cells of None where one is not there that `may_miss`."""
    where = f"{key}={source!r}"
    table = _read_table(source, where, list(dict.fromkeys(wanted.values())))
    if not any(table.values()):
        raise UserError(f"{where} has no rows: give it at least a header line and rows below it")
    absent = {config_key: name for config_key, name in wanted.items() if name not in table}
    missing = [f"{name!r} ({config_key})" for config_key, name in absent.items() if config_key not in may_miss]
    if missing:
        present = ", ".join(table)
        raise UserError(f"{where} has no column {' nor '.join(missing)}; it has: {present}")
    nothing = [None] * len(next(iter(table.values())))
    return [table.get(name, nothing) for name in wanted.values()]


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


def _read_table(source: str, where: str, names: Sequence[str]) -> Columns:
    """Column name -> values; a column outside `names` may come without its values."""
    path = untrusted.path(source, where)
    if path.is_dir():
        return _read_folder(path, where, names)
    if path.is_file():
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise UserError(f"{where} is of an unknown kind: name it {', '.join(READERS)}")
        if path.stat().st_size == 0:
            raise UserError(f"{where} is an empty file")
        try:
            return reader(path, where, names)
        except UserError:
            raise
        except Exception as error:  # pyarrow raises many kinds for what it does not like
            raise UserError(f"{where} cannot be read as {path.suffix[1:]}: {untrusted.one_line(error)}") from error
    if path.suffix.lower() in READERS or not HUB_NAME.fullmatch(source):
        raise UserError(f"{where}: no such file or folder; fix the path (it is relative to {pathlib.Path.cwd()})")
    return _read_hub(source, where, names)


def _lines(path: pathlib.Path, where: str) -> Iterator[str]:
    """The lines of a file of UTF-8, each with its end, whichever of the three kinds that is."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(file, start=1):
                if "\0" in line:
                    raise UserError(
                        f"{where}: line {number} holds a NUL byte: it is damaged or not UTF-8 text (UTF-16?); "
                        "fix the line or save the file as UTF-8"
                    )
                yield line
    except UnicodeDecodeError:
        raise UserError(f"{where}: {_not_utf8(path)}; save the file as UTF-8") from None


def _not_utf8(path: pathlib.Path) -> str:
    """Where a file stops being UTF-8. The decoder's own error counts from the start of its buffer."""
    begin = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at position {begin + error.start}"
                utf16 = " (UTF-16?)" if number == 1 and line[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
                return f"line {number} is not UTF-8{utf16}: {byte} of the file"
            begin += len(line)
    raise AssertionError("the file has changed while it was read")


def _read_separated(separator: str) -> Callable[[pathlib.Path, str, Sequence[str]], Columns]:
    def read(path: pathlib.Path, where: str, names: Sequence[str]) -> Columns:
        csv.field_size_limit(2**31 - 1)
        lines = csv.reader(_lines(path, where), delimiter=separator, strict=True)
        rows, ended = [], 0  # the line that the last complete row ended in
        try:
            header = next(lines, [])
            _once(names, header, where)
            ended = lines.line_num
            for row in lines:
                if len(row) == len(header):
                    rows.append(row)
                elif row:  # an empty line is no row
                    raise UserError(
                        f"{where}: line {lines.line_num} has {len(row)} fields, the header has {len(header)}; "
                        "quote fields that hold separators or line breaks"
                    )
                ended = lines.line_num
        except csv.Error as error:
            if "unexpected end" in str(error):
                opened = _open_quote(path, where, separator)
                raise UserError(
                    f"{where}: a quote opens in line {opened} and never closes: close it, or double the quotes inside "
                    "of a field"
                ) from None
            raise UserError(
                f"{where}: line {lines.line_num} (of a row that begins in line {ended + 1}): text follows a closing "
                f"quote: double the quotes inside of a field, or close the one before ({error})"
            ) from None
        return {name: [row[i] for row in rows] for i, name in enumerate(header)}

    return read


def _open_quote(path: pathlib.Path, where: str, separator: str) -> int:
    """The line of the quote that swallowed the rest of the file: its field is the last one read."""
    last, reader = [""], csv.reader(_lines(path, where), delimiter=separator)
    for row in reader:
        last = row or last
    swallowed = last[-1]
    return reader.line_num - len(LINE_END.findall(swallowed)) + swallowed.endswith(("\r", "\n"))


def _once(names: Sequence[str], present: Sequence[str], where: str) -> None:
    if twice := [name for name in names if present.count(name) > 1]:
        raise UserError(f"{where} has column {twice[0]!r} more than once; rename all but one")


def _read_json(path: pathlib.Path, where: str, names: Sequence[str]) -> Columns:
    """One object a line, or one list of objects; a key that an object lacks is an empty field."""
    lines = ((number, line) for number, line in enumerate(_lines(path, where), start=1) if line.strip())
    first = next(lines, (0, ""))
    kind = "item" if first[1].lstrip().startswith("[") else "line"
    if kind == "item":
        records = list(enumerate(json.loads(first[1] + "".join(line for _, line in lines)), start=1))
    else:
        records = [(n, _json_line(line, n, where)) for n, line in itertools.chain([first], lines) if line]
    for number, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{where}: {kind} {number} is not a JSON object with the columns as keys")
    present = dict.fromkeys(name for _, record in records for name in record)
    return {name: [record.get(name) for _, record in records] for name in present}


def _json_line(line: str, number: int, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        at = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else None
        raise UserError(f"{where}: line {number} is not a JSON object: {at or untrusted.one_line(error)}") from None


def _read_parquet(path: pathlib.Path, where: str, names: Sequence[str]) -> Columns:
    import pyarrow.parquet  # here: half a second that other formats need not wait for

    file = pyarrow.parquet.ParquetFile(path)
    present = file.schema_arrow.names
    _once(names, present, where)
    return _values(file.read(columns=[name for name in names if name in present]), present, file.metadata.num_rows)


def _read_arrow(path: pathlib.Path, where: str, names: Sequence[str]) -> Columns:
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:  # not mapped: if another process truncated the file, this one would crash
        try:
            table = pyarrow.ipc.open_file(file).read_all()
        except pyarrow.ArrowInvalid:  # the other of Arrow's two file layouts, which `datasets` writes
            file.seek(0)
            table = pyarrow.ipc.open_stream(file).read_all()
        _once(names, table.column_names, where)
        present = table.select([name for name in names if name in table.column_names])
        return _values(present, table.column_names, table.num_rows)


def _values(table: Any, present: Sequence[str], num_rows: int) -> Columns:
    """The values of an Arrow table, checked first: none may point outside its buffers."""
    table.validate(full=True)
    return {name: range(num_rows) for name in present} | table.to_pydict()


def _read_folder(path: pathlib.Path, where: str, names: Sequence[str]) -> Columns:
    import datasets

    _check_inside(path, where)
    try:
        return _read_dataset(datasets.load_from_disk(str(path), keep_in_memory=True), names)
    except Exception as error:  # of many kinds, for what is missing or of another shape
        reason = untrusted.one_line(error)
        raise UserError(f"{where} is a folder that save_to_disk did not write completely: {reason}") from error


def _check_inside(path: pathlib.Path, where: str) -> None:
    """UserError for a save_to_disk folder that sends its reader to files elsewhere."""
    named: list[Any] = []
    for file in (path / "dataset_dict.json", *sorted(path.glob("state.json")), *sorted(path.glob("*/state.json"))):
        content = untrusted.read_json(file, f"{where}: {file.name}") if file.is_file() else None
        for key in ("splits", "_data_files"):
            entries = content.get(key) if isinstance(content, dict) else None
            named += entries if isinstance(entries, list) else []
    named = [entry.get("filename") if isinstance(entry, dict) else entry for entry in named]
    if outside := [name for name in named if isinstance(name, str) and name != pathlib.PurePath(name).name]:
        raise UserError(f"{where} points outside of its folder, to {outside[0]}; save it again with save_to_disk")


def _read_hub(name: str, where: str, names: Sequence[str]) -> Columns:
    import datasets

    try:
        return _read_dataset(datasets.load_dataset(name), names)
    except Exception as error:  # the hub's client raises errors of many libraries
        raise UserError(
            f"{where} is neither a file or folder here nor a data set that the hub gives: {untrusted.one_line(error)}"
        ) from error


def _read_dataset(dataset: Any, names: Sequence[str]) -> Columns:
    if isinstance(dataset, Mapping):
        split = next((name for name in ("train", "training") if name in dataset), next(iter(dataset)))
        dataset = dataset[split]
    wanted = dataset.select_columns([name for name in names if name in dataset.column_names])
    return _values(wanted.with_format("arrow")[:], dataset.column_names, len(dataset))


READERS = {
    ".csv": _read_separated(","),
    ".tsv": _read_separated("\t"),
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


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
