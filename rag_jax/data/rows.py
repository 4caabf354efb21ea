"""Rows of (query, passage, answer) texts from files, `save_to_disk` folders and the hub."""

import collections
import csv
import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rag_jax.errors import UserError

Columns = dict[str, list]
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Three texts a row; `answers` are empty texts where no answer column was asked for."""

    queries: list[str]
    passages: list[str]
    answers: list[str]

    def __len__(self) -> int:
        return len(self.queries)

    def take(self, indices: Iterable[int]) -> "Rows":
        rows = list(indices)
        return Rows(*([column[i] for i in rows] for column in (self.queries, self.passages, self.answers)))


def read_rows(source: str, key: str, columns: Mapping[str, str], *, with_answers: bool = True) -> Rows:
    """All rows of `source` (csv, tsv, json, jsonl, parquet, arrow, a save_to_disk folder or a hub name), in file order.

    `columns` gives the column of "query", "passage" and "answer"; `key` is the config key that errors name.
    Raises UserError for a source that is missing, unreadable, without such columns or without rows.
    """
    wanted = {f"data.columns.{part}": columns[part] for part in ("query", "passage", "answer")}
    if not with_answers:
        del wanted["data.columns.answer"]
    queries, passages, *answers = read_columns(source, key, wanted)
    return Rows(queries, passages, answers[0] if answers else [""] * len(queries))


def read_passages(source: str, column: str, key: str) -> list[str]:
    """The distinct non-empty passages of one column, in file order."""
    (passages,) = read_columns(source, key, {"data.columns.passage": column})
    return [passage for passage in dict.fromkeys(passages) if passage.strip()]


def read_columns(source: str, key: str, wanted: Mapping[str, str]) -> list[list[str]]:
    """The wanted columns as texts, in the order of `wanted` (config key -> column name)."""
    where = f"{key}={source!r}"
    table = _read_table(source, where, list(dict.fromkeys(wanted.values())))
    if not any(table.values()):
        raise UserError(f"{where} has no rows: give it at least a header line and rows below it")
    missing = [f"{name!r} ({config_key})" for config_key, name in wanted.items() if name not in table]
    if missing:
        present = ", ".join(table)
        raise UserError(f"{where} has no column {' nor '.join(missing)}; it has: {present}")
    return [_texts(table[name], f"{where}: column {name!r}") for name in wanted.values()]


def _texts(values: Iterable[Any], where: str) -> list[str]:
    """Numbers as they print, nothing as the empty text; a list or a record is no text."""
    texts = []
    for number, value in enumerate(values, start=1):
        if isinstance(value, (list, tuple, dict, bytes)):
            raise UserError(f"{where} holds a {type(value).__name__} in row {number}: make it one text per row")
        nothing = value is None or value != value  # NaN is how tables of numbers say nothing
        texts.append("" if nothing else str(value))
        if not _is_unicode(texts[-1]):
            raise UserError(f"{where} holds half a character (a lone surrogate) in row {number}: mend its encoding")
    return texts


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_table(source: str, where: str, names: Sequence[str]) -> Columns:
    """Column name -> values; a column outside `names` may come without its values."""
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, where, names)
    if path.is_file():
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise UserError(f"{where} is of no known kind: name it {', '.join(READERS)}")
        if path.stat().st_size == 0:
            raise UserError(f"{where} is an empty file")
        try:
            return reader(path, where, names)
        except (OSError, ValueError, RecursionError, csv.Error) as error:  # pyarrow's errors are among these
            raise UserError(f"{where} cannot be read as {path.suffix[1:]}: {_one_line(error)}") from error
    if path.suffix.lower() in READERS or not HUB_NAME.fullmatch(source):
        raise UserError(f"{where}: no such file or folder; mend the path (it is relative to {pathlib.Path.cwd()})")
    return _read_hub(source, where, names)


def _read_separated(separator: str) -> Callable[[pathlib.Path, str, Sequence[str]], Columns]:
    def read(path: pathlib.Path, where: str, names: Sequence[str]) -> Columns:
        csv.field_size_limit(2**31 - 1)
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter=separator)
            header = next(lines, [])
            if twice := [name for name in names if header.count(name) > 1]:
                raise UserError(f"{where} has column {twice[0]!r} more than once; rename all but one")
            rows = []
            for row in lines:
                if len(row) == len(header):
                    rows.append(row)
                elif row:  # an empty line is no row
                    raise UserError(
                        f"{where}: line {lines.line_num} has {len(row)} fields, the header has {len(header)}; "
                        "quote fields that hold separators or line breaks"
                    )
        return {name: [row[i] for row in rows] for i, name in enumerate(header)}

    return read


def _read_json(path: pathlib.Path, where: str, names: Sequence[str]) -> Columns:
    """One object a line, or one list of objects; a key that an object lacks is an empty field."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        records = list(enumerate(json.loads(text), start=1))
    else:
        records = [(n, _json_line(line, n, where)) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for number, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{where}: line {number} is no JSON object with the columns as keys")
    present = dict.fromkeys(name for _, record in records for name in record)
    return {name: [record.get(name) for _, record in records] for name in present}


def _json_line(line: str, number: int, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: line {number} is no JSON object: {_one_line(error)}") from error


def _read_parquet(path: pathlib.Path, where: str, names: Sequence[str]) -> Columns:
    import pyarrow.parquet  # here: half a second that other formats need not wait for

    file = pyarrow.parquet.ParquetFile(path)
    present = file.schema_arrow.names
    values = file.read(columns=[name for name in names if name in present])
    return _placeholders(present, file.metadata.num_rows) | values.to_pydict()


def _read_arrow(path: pathlib.Path, where: str, names: Sequence[str]) -> Columns:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        try:
            table = pyarrow.ipc.open_file(file).read_all()
        except pyarrow.ArrowInvalid:  # the other of Arrow's two file layouts, which `datasets` writes
            file.seek(0)
            table = pyarrow.ipc.open_stream(file).read_all()
        values = table.select([name for name in names if name in table.column_names])
        return _placeholders(table.column_names, table.num_rows) | values.to_pydict()


def _placeholders(names: Sequence[str], num_rows: int) -> Columns:
    return {name: [None] * num_rows for name in names}


def _read_folder(path: pathlib.Path, where: str, names: Sequence[str]) -> Columns:
    import datasets

    try:
        return _read_dataset(datasets.load_from_disk(str(path)), names)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{where} is a folder that save_to_disk did not write: {_one_line(error)}") from error


def _read_hub(name: str, where: str, names: Sequence[str]) -> Columns:
    import datasets

    try:
        return _read_dataset(datasets.load_dataset(name), names)
    except Exception as error:  # the hub's client raises errors of many libraries
        raise UserError(
            f"{where} is neither a file or folder here nor a data set that the hub gives: {_one_line(error)}"
        ) from error


def _read_dataset(dataset: Any, names: Sequence[str]) -> Columns:
    if isinstance(dataset, Mapping):
        split = next((name for name in ("train", "training") if name in dataset), next(iter(dataset)))
        dataset = dataset[split]
    values = {name: list(dataset[name]) for name in names if name in dataset.column_names}
    return _placeholders(dataset.column_names, len(dataset)) | values


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


READERS = {
    ".csv": _read_separated(","),
    ".tsv": _read_separated("\t"),
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def empty_fields(rows: Rows, *, with_answers: bool) -> tuple[list[int], collections.Counter[str]]:
    """Indices of the rows whose fields all hold text, and how many of the others lack which field first."""
    fields = {"query": rows.queries, "passage": rows.passages, "answer": rows.answers}
    if not with_answers:
        del fields["answer"]
    kept, empty = [], collections.Counter()
    for i in range(len(rows)):
        lacking = next((name for name, column in fields.items() if not column[i].strip()), None)
        if lacking is None:
            kept.append(i)
        else:
            empty[f"an empty {lacking}"] += 1
    return kept, empty
