"""Tables from files, folders and the hub: columns by name, whatever they lie in, and how that was read.

A source is a path, a glob, paths joined by commas, or a hub name; behind a colon may stand a split with a slice.
"""

import bz2
import codecs
import collections
import contextlib
import csv
import dataclasses
import gzip
import io
import itertools
import json
import lzma
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rag_jax import untrusted
from rag_jax.errors import UserError

Columns = dict[str, Sequence]
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
LINE_END = re.compile(r"\r\n|\r|\n")
# What may stand behind a source's name: @revision, :config, :split, [slice].
SELECTED = re.compile(
    r"(?P<base>.+?)(?:@(?P<revision>[\w./-]+))?(?::(?P<first>[\w.-]+))?(?::(?P<second>[\w.-]+))?(?P<slice>\[[\d%:-]*\])?"
)
SLICE = re.compile(r"\[(-?\d+%?)?(?::(-?\d+%?)?)?\]")
# Names of splits, and which a key takes, the first that is there.
TRAIN, HELD_OUT = ("train", "training"), ("validation", "valid", "val", "dev", "eval", "evaluation", "test", "testing")
CORPUS = ("corpus", "passages", "documents")
SPLITS = (*TRAIN, *HELD_OUT, *CORPUS)
WANTED = {"data.eval": (*HELD_OUT, *TRAIN), "data.passages": (*CORPUS, *TRAIN)}
# Between fields, in the order in which they are tried.
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
# What a folder of shards holds besides them.
NO_SHARDS = re.compile(r"dataset_infos?\.json|state\.json|dataset_dict\.json|config\.json|\..*")
# Characters of a text that is no column's name.
PROSE = 30
# A JSON file of one object that holds the rows does so under one of these names.
ROWS_UNDER = ("data", "rows", "examples", "records", "train", "instances")


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns that are read when they are asked for."""

    names: list[str]
    num_rows: int
    read: Callable[[Sequence[str]], Columns]  # the values of some of the names
    notes: tuple[str, ...] = ()  # how it was read, where that is not plain


@dataclasses.dataclass(frozen=True)
class Selected:
    """A source without what says which part of it."""

    base: str
    revision: str | None
    names: tuple[str, ...]  # behind colons: a config, a split, or both
    rows: str  # a slice, or ""


def open_table(source: str, where: str, key: str) -> Table:
    """The table of a source; `key` says which split is meant where it has several. UserError for what is no table."""
    local = _local(source, where)
    if local is not None:
        return _of_paths(local, where, key, ())
    selected = _selected(source)
    local = None if selected is None else _local(selected.base, where)
    if selected is not None and local is not None:
        return _sliced(_of_paths(local, where, key, selected.names), selected.rows, where)
    suffixes = pathlib.PurePath(source).suffixes
    if selected is None or {s.lower() for s in suffixes} & READERS.keys() or not HUB_NAME.fullmatch(selected.base):
        raise UserError(
            f"{where}: no such file or folder; fix the path (it is relative to {pathlib.Path.cwd()}), or name a data "
            "set of the hub, OWNER/NAME:CONFIG:SPLIT[SLICE]"
        )
    return _of_hub(selected, where, key)


def of_columns(columns: Columns, *notes: str) -> Table:
    """A table in memory."""
    num_rows = len(next(iter(columns.values()), ()))
    return Table(list(columns), num_rows, lambda names: {name: columns[name] for name in names}, notes)


def _local(source: str, where: str) -> list[pathlib.Path] | None:
    """The files or the folder that a source names; None where there is no such thing."""
    path = untrusted.path(source, where)
    if path.exists():
        return [path]
    if "," in source:
        parts = [_local(part.strip(), where) for part in source.split(",")]
        if all(parts):
            return list(itertools.chain.from_iterable(part for part in parts if part))
    if any(mark in source for mark in "*?["):
        root = pathlib.Path(path.anchor or ".")
        try:
            found = sorted(root.glob(str(path.relative_to(path.anchor) if path.anchor else path)))
        except (ValueError, NotImplementedError, IndexError, OSError):
            found = []
        if found:
            return found
        if "*" in source or "?" in source:
            raise UserError(f"{where}: no file matches; fix the path (it is relative to {pathlib.Path.cwd()})")
    return None


def _selected(source: str) -> Selected | None:
    found = SELECTED.fullmatch(source)
    if found is None or (found["slice"] and not SLICE.fullmatch(found["slice"])):
        return None
    names = tuple(name for name in (found["first"], found["second"]) if name)
    return Selected(found["base"], found["revision"], names, found["slice"] or "")


def _sliced(table: Table, rows: str, where: str) -> Table:
    """Some of the rows, as `datasets` counts: whole numbers, or percent."""
    found = SLICE.fullmatch(rows)
    if not rows or found is None:
        return table

    def place(text: str | None, default: int) -> int:
        if text is None:
            return default
        number = round(int(text[:-1]) * table.num_rows / 100) if text.endswith("%") else int(text)
        return min(max(number + table.num_rows if text.startswith("-") else number, 0), table.num_rows)

    start, stop = (place(found[1], 0), place(found[2], table.num_rows)) if ":" in rows else (0, 0)
    if start >= stop:
        raise UserError(f"{where}: [..] leaves none of {table.num_rows} rows; write [FROM:TO], in rows or percent")

    def read(names: Sequence[str]) -> Columns:
        return {name: values[start:stop] for name, values in table.read(names).items()}

    return Table(table.names, stop - start, read, (*table.notes, f"rows {start:,} to {stop:,}"))


def _of_paths(paths: Sequence[pathlib.Path], where: str, key: str, names: tuple[str, ...]) -> Table:
    if len(names) > 1:
        raise UserError(f"{where}: no such folder has a config {names[0]!r}; write FOLDER:SPLIT")
    split = names[0] if names else None
    if len(paths) == 1 and paths[0].is_dir():
        return _of_folder(paths[0], where, key, split)
    if folders := [path for path in paths if path.is_dir()]:
        raise UserError(f"{where}: {folders[0]} is a folder among files; name files alone, or one folder")
    if split is not None:
        raise UserError(f"{where}: {paths[0].name} is a file, which has no split {split!r}; name it without")
    return _joined([_of_file(path, where if len(paths) == 1 else f"{where}: {path}") for path in paths], paths, where)


def _joined(tables: Sequence[Table], paths: Sequence[pathlib.Path], where: str) -> Table:
    """The rows of all, one after the other."""
    if len(tables) == 1:
        return tables[0]
    names = list(dict.fromkeys(itertools.chain.from_iterable(table.names for table in tables)))
    for table, path in zip(tables, paths, strict=True):
        missing = [name for name in names if name not in table.names]
        if missing and not _may_lack(path):
            raise UserError(f"{where}: {path} has no column {missing[0]!r}, which others have; give files of one kind")

    def read(asked: Sequence[str]) -> Columns:
        parts = []
        for table in tables:
            found = table.read([name for name in asked if name in table.names])
            parts.append({name: found.get(name, [None] * table.num_rows) for name in asked})
        return {name: list(itertools.chain.from_iterable(part[name] for part in parts)) for name in asked}

    notes = dict.fromkeys(itertools.chain.from_iterable(table.notes for table in tables))
    return Table(names, sum(table.num_rows for table in tables), read, (f"{len(tables)} files", *notes))


def _may_lack(path: pathlib.Path) -> bool:
    """Of a record of JSON what is not known is often not there."""
    return bool({".json", ".jsonl", ".ndjson"} & {suffix.lower() for suffix in path.suffixes})


def _of_file(path: pathlib.Path, where: str) -> Table:
    kind = kind_of(path)
    if kind is None:
        raise UserError(
            f"{where} is of an unknown kind: name it {', '.join(READERS)}, and {', '.join(OPENERS)} behind that where "
            "it is compressed"
        )
    if path.stat().st_size == 0:
        raise UserError(f"{where} is an empty file")
    untrusted.refuse_pointer(path, where)
    try:
        return READERS[kind](path, where)
    except UserError:
        raise
    except Exception as error:  # pyarrow raises many kinds for what it does not like
        raise UserError(f"{where} cannot be read as {kind[1:]}: {untrusted.one_line(error)}") from error


def kind_of(path: pathlib.PurePath) -> str | None:
    """The suffix of a file that says how it is read, one of its compression left out."""
    suffix = path.suffix.lower()
    suffix = path.with_suffix("").suffix.lower() if suffix in OPENERS else suffix
    return suffix if suffix in READERS else None


# Folders.


def _of_folder(path: pathlib.Path, where: str, key: str, split: str | None) -> Table:
    if (path / "qrels").is_dir() and _beir_file(path, "corpus") and _beir_file(path, "queries"):
        return _of_beir(path, where, key, split)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _of_saved(path, where, key, split)
    shards = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_shard(file.relative_to(path))]
    if not shards:
        _of_saved(path, where, key, split)  # says what it lacks
    by_split: dict[str, list[pathlib.Path]] = collections.defaultdict(list)
    for file in shards:
        by_split[_split_of(file.relative_to(path))].append(file)
    if "" in by_split and len(by_split) > 1:
        raise UserError(
            f"{where}: {by_split[''][0].name} names no split, and others do; name the files that are meant, "
            "such as FOLDER/*.parquet"
        )
    chosen, note = _choose(list(by_split), key, split, where)
    files = by_split[chosen]
    kinds = sorted({str(kind_of(file)) for file in files})
    if len(kinds) > 1:
        raise UserError(
            f"{where} holds {' and '.join(kinds)}; name the files that are meant, such as FOLDER/*{kinds[0]}"
        )
    table = _joined([_of_file(file, f"{where}: {file.relative_to(path)}") for file in files], files, where)
    return dataclasses.replace(table, notes=(*note, *table.notes))


def _beir_file(path: pathlib.Path, name: str) -> pathlib.Path | None:
    found = (file for file in sorted(path.glob(f"{name}.jsonl*")) if kind_of(file) == ".jsonl")
    return next(found, None)


def _of_beir(path: pathlib.Path, where: str, key: str, split: str | None) -> Table:
    """BEIR's corpus, or a row for each query that its qrels find passages for, all right ones in one list."""
    corpus, queries = (_beir_file(path, name) for name in ("corpus", "queries"))
    assert corpus is not None and queries is not None
    found = _of_file(corpus, f"{where}: {corpus.name}")
    if key in ("data.passages", "--passages"):
        return dataclasses.replace(found, notes=(*found.notes, f"the corpus of {path.name}"))
    chosen, note = _choose(sorted(file.stem for file in (path / "qrels").glob("*.tsv")), key, split, where)
    judged = _of_file(path / "qrels" / f"{chosen}.tsv", f"{where}: qrels/{chosen}.tsv")
    columns = found.read([name for name in ("_id", "title", "text") if name in found.names])
    titles = columns.get("title") or [""] * found.num_rows
    texts = {
        str(name): f"{title or ''} {text or ''}".strip()
        for name, title, text in zip(columns["_id"], titles, columns["text"], strict=True)
    }
    asked = _of_file(queries, f"{where}: {queries.name}").read(["_id", "text"])
    query_of = dict(zip(map(str, asked["_id"]), asked["text"], strict=True))
    right: dict[str, list[str]] = collections.defaultdict(list)
    lost = 0
    judgements = judged.read(judged.names)
    for query, passage, score in zip(*(judgements[name] for name in judged.names[:3]), strict=True):
        if int(score) > 0:
            is_there = query in query_of and passage in texts
            lost += not is_there
            if is_there:
                right[query].append(texts[passage])
    rows: Columns = {"query": [query_of[query] for query in right], "passage": list(right.values())}
    gone = f", {lost:,} judgements of what is not there left out" if lost else ""
    return of_columns(
        rows, *note, f"{len(right):,} queries with the passages that qrels/{chosen}.tsv judges right{gone}"
    )


def _is_shard(path: pathlib.PurePath) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return kind_of(path) is not None and not hidden and not NO_SHARDS.fullmatch(path.name)


def _split_of(path: pathlib.PurePath) -> str:
    """The split that a shard's path names, as in train-00000-of-00002.parquet or validation/rows.jsonl; else ""."""
    words = [*re.split(r"[^A-Za-z]+", path.name), *reversed(path.parts[:-1])]
    return next((word.lower() for word in words if word.lower() in SPLITS), "")


def _choose(splits: Sequence[str], key: str, asked: str | None, where: str) -> tuple[str, tuple[str, ...]]:
    """The split that is asked for, else the one that a key means; and a note of that where there are others."""
    if asked is not None and asked not in splits:
        raise UserError(f"{where}: no split {asked!r}; it has: {', '.join(filter(None, splits)) or 'none'}")
    usual = (name for name in WANTED.get(key, TRAIN) if name in splits)
    split = next(usual, splits[0]) if asked is None else asked
    return split, (f"split {split} of {', '.join(splits)}",) if len(splits) > 1 else ()


def _of_saved(path: pathlib.Path, where: str, key: str, split: str | None) -> Table:
    import datasets

    _check_inside(path, where)
    try:
        saved = datasets.load_from_disk(str(path), keep_in_memory=True)
    except Exception as error:  # of many kinds, for what is missing or of another shape
        reason = untrusted.one_line(error)
        raise UserError(
            f"{where} is a folder that save_to_disk did not write completely, and holds no files of rows: {reason}"
        ) from error
    return _of_dataset(saved, where, key, split)


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


def _of_hub(selected: Selected, where: str, key: str) -> Table:
    import datasets

    *config, split = selected.names if len(selected.names) == 2 else (*selected.names, None)
    if split is None and config and config[0].lower() in SPLITS:
        config, split = [], config[0]
    more = {} if selected.revision is None else {"revision": selected.revision}
    if split is not None:
        more["split"] = split + selected.rows
    try:
        loaded = datasets.load_dataset(selected.base, *config, **more)
    except Exception as error:  # the hub's client raises errors of many libraries
        raise UserError(
            f"{where} is neither a file or folder here nor a data set that the hub gives: {untrusted.one_line(error)}"
        ) from error
    table = _of_dataset(loaded, where, key, None)
    return table if split is not None else _sliced(table, selected.rows, where)


def _of_dataset(dataset: Any, where: str, key: str, split: str | None) -> Table:
    note: tuple[str, ...] = ()
    if isinstance(dataset, Mapping):
        chosen, note = _choose(list(dataset), key, split, where)
        dataset = dataset[chosen]
    elif split is not None:
        raise UserError(f"{where}: has no splits; name it without {split!r}")

    def read(names: Sequence[str]) -> Columns:
        try:
            columns = _values(dataset.select_columns(list(names)).with_format("arrow")[:])
        except Exception as error:  # of many kinds, for what is damaged
            raise UserError(
                f"{where} is a folder that save_to_disk did not write completely: {untrusted.one_line(error)}"
            ) from error
        labels = {name: getattr(dataset.features[name], "names", None) for name in names}
        return {name: _labelled(values, labels[name]) for name, values in columns.items()}

    return Table(list(dataset.column_names), len(dataset), read, note)


def _labelled(values: Sequence, names: Sequence[str] | None) -> Sequence:
    """The names of classes in the place of their numbers."""
    if not names:
        return values
    return [names[value] if isinstance(value, int) and 0 <= value < len(names) else value for value in values]


# Text.


def _zstd(path: pathlib.Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


OPENERS: dict[str, Callable[[pathlib.Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstd,
}


def _bytes(path: pathlib.Path) -> Any:
    """A file's content as it was before it was compressed."""
    opener = OPENERS.get(path.suffix.lower())
    return path.open("rb") if opener is None else opener(path)


def _lines(path: pathlib.Path, where: str) -> Iterator[str]:
    """The lines of a file of UTF-8, each with its end, whichever of the three kinds that is."""
    try:
        with io.TextIOWrapper(_bytes(path), encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(file, start=1):
                if "\0" in line:
                    raise UserError(
                        f"{where}: line {number} holds a NUL byte: it is damaged or not UTF-8 text (UTF-16?); "
                        "fix the line or save the file as UTF-8"
                    )
                yield line
    except UnicodeDecodeError:
        raise UserError(f"{where}: {_not_utf8(path)}; save the file as UTF-8") from None
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, OSError) as error:
        if path.suffix.lower() not in OPENERS:
            raise
        raise UserError(f"{where} is cut off or damaged ({untrusted.one_line(error)}); fetch it again") from None


def _not_utf8(path: pathlib.Path) -> str:
    """Where a file stops being UTF-8. The decoder's own error counts from the start of its buffer."""
    begin = 0
    with _bytes(path) as file:
        for number, line in enumerate(io.BufferedReader(file) if not hasattr(file, "readline") else file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at position {begin + error.start}"
                utf16 = " (UTF-16?)" if number == 1 and line[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
                return f"line {number} is not UTF-8{utf16}: {byte} of the file"
            begin += len(line)
    raise AssertionError("the file has changed while it was read")


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How a separated file is written."""

    separator: str
    quotes: bool = True  # fields may stand in quotes
    skipped: int = 0  # lines before the header

    def __str__(self) -> str:
        return f"fields between {SEPARATORS[self.separator]}" + ("" if self.quotes else ", quotes read as text")


def _separated(usual: Dialect) -> Callable[[pathlib.Path, str], Table]:
    def read(path: pathlib.Path, where: str) -> Table:
        csv.field_size_limit(2**31 - 1)
        dialect = _dialect(path, where, usual)
        problem = rows = None
        try:
            header, rows = _fields(path, where, dialect)
        except UserError as error:
            header, problem = [], error
        # Text between tabs is mostly not quoted, and one quote at the beginning of a field would then swallow rows.
        if dialect.separator == "\t":
            plain = _unquoted(path, where, dialect)
            if plain is not None and (rows is None or len(plain[1]) > len(rows)):
                dialect = dataclasses.replace(dialect, quotes=False)
                (header, rows), problem = plain, None
        if problem is not None or rows is None:
            assert problem is not None
            raise problem
        notes = [] if dialect == usual else [str(dialect)]
        if names := _headless(header, dialect):
            header, rows = names, [header, *rows]
            notes.append(f"no header: {', '.join(names)}")

        def values(names: Sequence[str]) -> Columns:
            _once(names, header, where)
            return {name: [row[i] for row in rows] for i, name in enumerate(header) if name in names}

        return Table(list(dict.fromkeys(header)), len(rows), values, tuple(notes))

    return read


def _headless(first: Sequence[str], dialect: Dialect) -> list[str] | None:
    """Names for the columns of MS MARCO's files, which have no header; None for others."""
    is_prose = [len(field) >= PROSE and " " in field for field in first]
    if dialect.separator == "\t" and len(first) == 3 and all(is_prose[1:]):
        return ["query", "positive", "negative"]
    if dialect.separator == "\t" and len(first) == 2 and first[0].isdecimal() and is_prose[1]:
        return ["_id", "text"]
    return None


def _dialect(path: pathlib.Path, where: str, usual: Dialect) -> Dialect:
    """What the first lines say: a line sep=; as spreadsheets write it, or a header that its usual marks do not part."""
    lines = list(itertools.islice(_lines(path, where), 2))
    if not lines:
        return usual
    if declared := re.fullmatch(r'"?sep=(.)"?\s*', lines[0]):
        return Dialect(declared[1], usual.quotes, 1) if declared[1] in SEPARATORS else usual
    counts = {mark: _num_fields(lines[0], mark) for mark in SEPARATORS}
    best = max(SEPARATORS, key=lambda mark: counts[mark])
    return usual if counts[usual.separator] > 1 or counts[best] < 2 else dataclasses.replace(usual, separator=best)


def _num_fields(line: str, separator: str) -> int:
    return len(next(csv.reader([line], delimiter=separator), []))


def _fields(path: pathlib.Path, where: str, dialect: Dialect) -> tuple[list[str], list[list[str]]]:
    """Header and rows by the rules of RFC 4180; UserError for what breaks them."""
    skipped = dialect.skipped
    lines = csv.reader(itertools.islice(_lines(path, where), skipped, None), delimiter=dialect.separator, strict=True)
    rows, ended = [], 0  # the line that the last complete row ended in
    try:
        header = next(lines, [])
        ended = lines.line_num
        for row in lines:
            if len(row) == len(header):
                rows.append(row)
            elif row:  # an empty line is no row
                raise UserError(
                    f"{where}: line {skipped + lines.line_num} has {len(row)} fields, the header has {len(header)}; "
                    "quote fields that hold separators or line breaks"
                )
            ended = lines.line_num
    except csv.Error as error:
        if "unexpected end" in str(error):
            opened = _open_quote(path, where, dialect)
            raise UserError(
                f"{where}: a quote opens in line {opened} and never closes: close it, or double the quotes inside "
                "of a field"
            ) from None
        raise UserError(
            f"{where}: line {skipped + lines.line_num} (of a row that begins in line {skipped + ended + 1}): text "
            f"follows a closing quote: double the quotes inside of a field, or close the one before ({error})"
        ) from None
    return header, rows


def _unquoted(path: pathlib.Path, where: str, dialect: Dialect) -> tuple[list[str], list[list[str]]] | None:
    """Header and rows where every line is a row and quotes are text; None where a line has another number of fields."""
    header: list[str] = []
    rows = []
    for line in itertools.islice(_lines(path, where), dialect.skipped, None):
        row = line.rstrip("\r\n").split(dialect.separator)
        if not header:
            header = row
        elif len(row) == len(header):
            rows.append(row)
        elif row != [""]:
            return None
    return header, rows


def _open_quote(path: pathlib.Path, where: str, dialect: Dialect) -> int:
    """The line of the quote that swallowed the rest of the file: its field is the last one read."""
    lines = itertools.islice(_lines(path, where), dialect.skipped, None)
    last, reader = [""], csv.reader(lines, delimiter=dialect.separator)
    for row in reader:
        last = row or last
    swallowed = last[-1]
    swallowed_lines = len(LINE_END.findall(swallowed)) - swallowed.endswith(("\r", "\n"))
    return dialect.skipped + reader.line_num - swallowed_lines


# JSON.


def _of_json(path: pathlib.Path, where: str) -> Table:
    """One object a line, a list of objects, or an object that holds such a list or its columns."""
    lines = ((number, line) for number, line in enumerate(_lines(path, where), start=1) if line.strip())
    begin = list(itertools.islice(lines, 2))
    if not begin:
        return of_columns({})
    first = begin[0][1].lstrip()
    if not first.startswith("[") and not (first.startswith("{") and _is_whole(begin)):
        records = [(number, _json_line(line, number, where)) for number, line in itertools.chain(begin, lines)]
        return of_columns(_of_records(records, "line", where))
    content = _parsed("".join(line for _, line in itertools.chain(begin, lines)), where)
    if isinstance(content, dict) and all(isinstance(value, list) for value in content.values()) and content:
        if len({len(values) for values in content.values()}) == 1 and not _are_objects(next(iter(content.values()))):
            return of_columns(content, "an object of columns")
    if isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
        keys = next(iter(content.values())).keys()
        if len(content) > 1 and keys and all(value.keys() == keys for value in content.values()):
            columns: Columns = {name: list(values.values()) for name, values in content.items()}
            return of_columns(columns, "an object of columns, as pandas writes it")
    if isinstance(content, dict):
        under = next((name for name in ROWS_UNDER if _are_objects(content.get(name))), None)
        if under is None:
            return of_columns(_of_records([(1, content)], "item", where))
        records, note = content[under], [f"the rows under {under!r}"]
        if _are_objects(records[0].get("paragraphs")):
            records, note = list(_questions(records)), ["SQuAD's articles, a row a question"]
        return of_columns(_of_records(list(enumerate(records, start=1)), "item", where), *note)
    return of_columns(_of_records(list(enumerate(content, start=1)), "item", where))


def _is_whole(lines: Sequence[tuple[int, str]]) -> bool:
    """Whether a file that begins with these lines, the first with {, is one object, not one a line."""
    try:
        json.loads(lines[0][1])
    except (ValueError, RecursionError):
        # A line that is no object: one of the file's objects is damaged, or the first goes on below.
        return lines[0][1].strip() == "{" or (len(lines) > 1 and not lines[1][1].lstrip().startswith("{"))
    return len(lines) == 1


def _are_objects(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, dict) for value in values)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at = f"{error.msg} in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else None
        raise UserError(f"{where} cannot be read as json: {at or untrusted.one_line(error)}") from None


def _of_records(records: Sequence[tuple[int, Any]], kind: str, where: str) -> Columns:
    """A column for each key; one that a record lacks is an empty field."""
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


def _questions(articles: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """A row for each question of SQuAD's own layout."""
    for article in articles:
        for paragraph in article.get("paragraphs") or ():
            for asked in paragraph.get("qas") or ():
                yield {"title": article.get("title"), "context": paragraph.get("context"), **asked}


# Arrow.


def _of_parquet(path: pathlib.Path, where: str) -> Table:
    import pyarrow.parquet  # here: half a second that other formats need not wait for

    file = pyarrow.parquet.ParquetFile(path)
    schema = file.schema_arrow

    def read(names: Sequence[str]) -> Columns:
        _once(names, schema.names, where)
        return _with_labels(_values(file.read(columns=list(names))), schema)

    return Table(list(dict.fromkeys(schema.names)), file.metadata.num_rows, _told(read, path, where))


def _of_arrow(path: pathlib.Path, where: str) -> Table:
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:  # not mapped: if another process truncated the file, this one would crash
        try:
            table = pyarrow.ipc.open_file(file).read_all()
        except pyarrow.ArrowInvalid:  # the other of Arrow's two file layouts, which `datasets` writes
            file.seek(0)
            table = pyarrow.ipc.open_stream(file).read_all()

    def read(names: Sequence[str]) -> Columns:
        _once(names, table.column_names, where)
        return _with_labels(_values(table.select(list(names))), table.schema)

    return Table(list(dict.fromkeys(table.column_names)), table.num_rows, _told(read, path, where))


def _told(read: Callable[[Sequence[str]], Columns], path: pathlib.Path, where: str) -> Callable[..., Columns]:
    def told(names: Sequence[str]) -> Columns:
        try:
            return read(names)
        except UserError:
            raise
        except Exception as error:  # pyarrow raises many kinds
            raise UserError(f"{where} cannot be read as {path.suffix[1:]}: {untrusted.one_line(error)}") from error

    return told


def _once(names: Sequence[str], present: Sequence[str], where: str) -> None:
    if twice := [name for name in names if present.count(name) > 1]:
        raise UserError(f"{where} has column {twice[0]!r} more than once; rename all but one")


def _values(table: Any) -> Columns:
    """The values of an Arrow table, checked first: none may point outside its buffers."""
    table.validate(full=True)
    return table.to_pydict()


def _with_labels(columns: Columns, schema: Any) -> Columns:
    """Names of classes, where `datasets` has noted them in a file."""
    features: Any = {}
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    found = {}
    for name, values in columns.items():
        about = features.get(name) if isinstance(features, dict) else None
        names = about.get("names") if isinstance(about, dict) and about.get("_type") == "ClassLabel" else None
        found[name] = _labelled(values, names if isinstance(names, list) else None)
    return found


READERS: dict[str, Callable[[pathlib.Path, str], Table]] = {
    ".csv": _separated(Dialect(",")),
    ".tsv": _separated(Dialect("\t")),
    ".json": _of_json,
    ".jsonl": _of_json,
    ".ndjson": _of_json,
    ".parquet": _of_parquet,
    ".arrow": _of_arrow,
}
