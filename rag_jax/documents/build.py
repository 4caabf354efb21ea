"""A folder of documents to one file of passages: by several processes, in parts, so that it may be stopped."""

import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from rag_jax import files, untrusted
from rag_jax.documents import convert, copies, split
from rag_jax.errors import UserError
from rag_jax.progress import Counter

PASSAGES, UNREAD, PARTS = "passages.parquet", "unread.jsonl", "parts"
# Questions that were written from passages: those that are kept as rows, and all of them with what became of them.
ROWS, QUESTIONS = "rows.parquet", "questions.parquet"
# Documents of a part.
PART = 64
# Raise it when passages are made in another way.
FORMAT = 1
SKIPPED = {".git", ".hg", ".svn", "node_modules", "__pycache__", ".venv"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What passages depend on besides their documents."""

    most: int  # tokens of a passage
    tokenizer: str | None  # a file tokenizer.json; None: words are counted
    code: bool = False  # source code is read too


@dataclasses.dataclass(frozen=True)
class Result:
    documents: int
    read: int
    passages: int
    copies: int
    unread: dict[str, int]  # reason -> documents
    code: int  # files of source code that were left alone


def build(source: pathlib.Path, out: pathlib.Path, settings: Settings, processes: int) -> Result:
    """Writes `out/passages.parquet` and `out/unread.jsonl`. UserError for a folder without documents."""
    every = list(found(source))
    documents = [path for path in every if settings.code or path.suffix.lower() not in convert.CODE]
    if not any(path.suffix.lower() in convert.READERS for path in documents):
        code = f", but source code, which --code reads ({len(every)} files)" if len(every) > len(documents) else ""
        raise UserError(f"--documents={source}: holds none of {', '.join(convert.DOCUMENTS)}{code}")
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    parts = [
        (documents[i : i + PART], _key(documents[i : i + PART], source, settings))
        for i in range(0, len(documents), PART)
    ]
    todo = [(paths, key) for paths, key in parts if not _part(out, key).is_file()]
    with (
        Counter("documents", len(documents), done=len(documents) - sum(len(paths) for paths, _ in todo)) as counter,
        concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool,
    ):
        running: set[concurrent.futures.Future] = set()
        waiting = iter(todo)
        while True:
            # No more than the processes are busy with: what waits is not in memory.
            for paths, key in (pair for _, pair in zip(range(2 * processes - len(running)), waiting, strict=False)):
                running.add(pool.submit(make_part, paths, source, out, key, settings))
            if not running:
                break
            done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                counter.update(future.result())
    joined = _joined(out, [key for _, key in parts], len(documents))
    return dataclasses.replace(joined, code=len(every) - len(documents))


def found(source: pathlib.Path) -> Iterator[pathlib.Path]:
    """All files below a folder, or the file itself, in the order of their names. Links out of it are not followed."""
    if source.is_file():
        yield source
        return
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if name not in SKIPPED and not name.startswith("."))
        for name in sorted(names):
            path = pathlib.Path(folder) / name
            if not name.startswith(".") and path.is_file():
                yield path


def make_part(paths: list[pathlib.Path], source: pathlib.Path, out: pathlib.Path, key: str, settings: Settings) -> int:
    """The passages of some documents, or why there are none, as one file; how many documents these were."""
    splitter, lines = split.splitter(settings.tokenizer, settings.most), []
    for path in paths:
        name = str(path.relative_to(source)) if path != source else path.name
        try:
            if not path.resolve().is_relative_to(source.resolve()):
                raise convert.Unreadable("a link out of the folder")
            made = split.passages(convert.convert(path), name, splitter)
            if not made:
                raise convert.Unreadable("without words")
            lines += [{**dataclasses.asdict(one), "signature": copies.signature(one.passage).tolist()} for one in made]
        except (convert.Unreadable, OSError) as error:
            lines.append({"document": name, "unread": untrusted.one_line(error)})
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    files.write_whole(_part(out, key), content, errors="replace")
    return len(paths)


def _key(paths: list[pathlib.Path], source: pathlib.Path, settings: Settings) -> str:
    """Of the documents as they are now: one that has changed is read again."""
    about = [[str(path.relative_to(source.parent)), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    return files.content_key(FORMAT, about, dataclasses.asdict(settings))[:24]


def _part(out: pathlib.Path, key: str) -> pathlib.Path:
    return out / PARTS / f"{key}.jsonl"


def _joined(out: pathlib.Path, keys: list[str], num_documents: int) -> Result:
    """The parts as one file without copies, twice read, so that no more than signatures is in memory."""
    import pyarrow
    import pyarrow.parquet

    signatures, digests, unread = bytearray(), bytearray(), []
    for line in _lines(out, keys):
        if "unread" in line:
            unread.append(line)
        else:
            signatures += np.array(line["signature"], np.uint32).tobytes()
            digests += copies.digest(line["passage"])
    keep = copies.firsts(np.frombuffer(signatures, np.uint32).reshape(-1, copies.HASHES), digests)
    fields = [(field.name, pyarrow.string() if field.type is str else pyarrow.int32()) for field in _FIELDS]
    schema = pyarrow.schema(fields)
    with files.file_at_once(out / PASSAGES) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        rows: list[dict[str, Any]] = []
        for is_first, line in zip(keep, (line for line in _lines(out, keys) if "unread" not in line), strict=True):
            if is_first:
                rows.append({name: line[name] for name, _ in fields})
            if len(rows) == 10_000:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows.clear()
        writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    files.write_whole(
        out / UNREAD, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in unread), errors="replace"
    )
    reasons = collections.Counter(line["unread"].split(" (")[0] for line in unread)
    return Result(num_documents, num_documents - len(unread), int(keep.sum()), int((~keep).sum()), dict(reasons), 0)


def read_passages(out: pathlib.Path) -> list[dict[str, Any]]:
    """The passages that `build` has written, a row each."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(out / PASSAGES).to_pylist()


def write_rows(out: pathlib.Path, passages: list[dict[str, Any]], questions: list[dict[str, Any]]) -> None:
    """`out/rows.parquet` of the questions that are kept, and `out/questions.parquet` of all.

    `questions`: of each, besides what is written down, the number of its `passage`.
    """
    import pyarrow
    import pyarrow.parquet

    of_passage = ("passage", "title", "section", "document", "position")
    whole = [one | {name: passages[one["passage"]][name] for name in of_passage} for one in questions]
    kept = [{name: value for name, value in row.items() if name != "dropped"} for row in whole if not row["dropped"]]
    for path, rows in ((out / ROWS, kept), (out / QUESTIONS, whole)):
        if not rows:
            path.unlink(missing_ok=True)  # of an earlier command, perhaps
            continue
        with files.file_at_once(path) as file:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


_FIELDS = dataclasses.fields(split.Passage)


def _lines(out: pathlib.Path, keys: list[str]) -> Iterator[dict[str, Any]]:
    for key in keys:
        with _part(out, key).open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
