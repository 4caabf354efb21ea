"""Rows to tokenised examples: read, tokenise each distinct text once, keep on disk, drop what cannot be used."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rag_jax import files
from rag_jax.data import rows as row_files
from rag_jax.data import segments
from rag_jax.data.rows import Rows
from rag_jax.data.segments import Prompt, Ragged, RetrieverText, WholeString
from rag_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenised rows. Each distinct query and passage is there once; the fields of an unused model are None.

    Passages are those of the rows, and after them those that are given as negatives alone.
    """

    rows: Rows  # the texts
    queries: tuple[str, ...]  # distinct
    passages: tuple[str, ...]  # distinct
    query_key: np.ndarray  # (rows,) int32 into queries
    passage_key: np.ndarray  # (rows,) int32 into passages
    retriever_queries: Ragged | None = None  # one a distinct query
    retriever_passages: Ragged | None = None  # one a distinct passage
    prefixes: Ragged | None = None  # generator's passage segment, bos first: one a distinct passage
    prompt_queries: Ragged | None = None  # generator's query segment: one a distinct query
    answers: Ragged | None = None  # generator's answer segment, end-of-sequence last: one a row
    strings: Ragged | None = None  # objective "dalm": one a row
    string_answer_start: np.ndarray | None = None  # (rows,) int32
    negative_key: np.ndarray | None = None  # (rows, J) int32 into passages, -1: none; where negatives are given

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def right_key(self) -> np.ndarray:
        """(queries, R) int32: the passages that the rows of a query name, in their order, -1: no more."""
        right: list[dict[int, None]] = [{} for _ in self.queries]
        for query, passage in zip(self.query_key.tolist(), self.passage_key.tolist(), strict=True):
            right[query][passage] = None
        found = np.full((len(right), max(map(len, right), default=1)), -1, np.int32)
        for query, passages in enumerate(right):
            found[query, : len(passages)] = list(passages)
        return found


def fingerprint(examples: Examples) -> str:
    """A digest of all tokens and keys: equal where batches would be equal."""
    digest = hashlib.blake2b(digest_size=8)
    for field in dataclasses.fields(examples):
        value = getattr(examples, field.name)
        arrays = (value.tokens, value.starts) if isinstance(value, Ragged) else (value,)
        for array in arrays:
            if isinstance(array, np.ndarray):
                digest.update(f"{field.name} {array.dtype} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the rows, for the start-up summary."""

    rows_read: int
    rows: int
    dropped: dict[str, int]  # "an empty query" and the like -> rows
    queries: int  # distinct
    passages: int  # distinct
    cut: dict[str, int]  # which text -> rows in which it lost its end
    from_cache: bool
    negatives: str = ""  # what became of those that are given

    def __str__(self) -> str:
        def counts(numbers: Mapping[str, int], word: str) -> str:
            return ", ".join(f"{number:,} {word}{name}" for name, number in numbers.items() if number)

        parts = [f"{self.rows:,} rows, {self.queries:,} distinct queries, {self.passages:,} distinct passages"]
        if self.dropped:
            parts.append(f"dropped of {self.rows_read:,}: {counts(self.dropped, 'with ')}")
        if any(self.cut.values()):
            parts.append(f"too long and cut: {counts(self.cut, '')}")
        if self.negatives:
            parts.append(self.negatives)
        return "; ".join(parts)


def load_examples(
    source: str,
    *,
    key: str,
    columns: Mapping[str, str],
    bad_rows: str,
    retriever: RetrieverText | None,
    prompt: Prompt | None,
    whole_string: WholeString | None = None,
    min_rows: int = 1,
    negatives: int = 0,
) -> tuple[Examples, Report]:
    """Tokenised rows of `source` for the models that are used, and what became of the rows.

    `key` is the config key of `source`, `columns` the column of "query", "passage" and "answer" (which is not asked for
    when only the retriever is used), and of "negative" where so many `negatives` of each row's given ones are wanted.
    A row with an empty field, a query without tokens (from its last one the answer is predicted), or an answer longer
    than `prompt.answer_len` tokens is dropped or refused (`bad_rows`); too long a query or passage is cut. Raises
    UserError for an unreadable source, for fewer usable rows than `min_rows` (a batch to train on), and where a
    retriever has no two passages to tell apart.
    """
    with_answers = prompt is not None or whole_string is not None
    read = row_files.read_rows(source, key, columns, with_answers=with_answers, with_negatives=negatives > 0)
    kept, dropped = row_files.empty_fields(read, with_answers=with_answers)
    rows = read.take(kept) if dropped else read
    rows, labelled = choose_negatives(rows, negatives)

    queries, query_key = distinct(rows.queries)
    passages, passage_key, negative_key = _distinct_passages(rows, negatives)
    arrays, from_cache = files.cached(
        _content_key(rows, retriever, prompt, whole_string),
        lambda: _tokenise(rows, queries, passages, retriever, prompt, whole_string),
    )
    examples = _examples(rows, queries, passages, query_key, passage_key, negative_key, arrays)
    # -1, no negative, finds the False behind the last text: what does not exist is not cut.
    row_cut = {
        name: np.any(np.append(arrays[array], False)[index], axis=1)
        for name, array, index in _cut_of(query_key, passage_key, negative_key)
        if array in arrays
    }

    fits = np.ones(len(rows), bool)
    for reason, unfit in ({} if prompt is None else _unfit(prompt, query_key, arrays)).items():
        if number := int((unfit & fits).sum()):
            dropped[reason] = number
        fits &= ~unfit
    if not fits.all():
        row_cut = {name: cut[fits] for name, cut in row_cut.items()}
        examples = take(examples, np.flatnonzero(fits))
    _refuse(f"{key}={source!r}", bad_rows, dropped, len(read), len(examples), min_rows)
    if retriever is not None and min_rows > 1:
        _check_passages(f"{key}={source!r}", examples)
    report = Report(
        rows_read=len(read),
        rows=len(examples),
        dropped=dict(dropped),
        queries=len(examples.queries),
        passages=len(examples.passages),
        cut={name: int(cut.sum()) for name, cut in row_cut.items()},
        from_cache=from_cache,
        negatives=_negatives_line(examples.negative_key, labelled),
    )
    return examples, report


def _unfit(prompt: Prompt, query_key: np.ndarray, arrays: files.Arrays) -> dict[str, np.ndarray]:
    """Which rows (rows,) bool the generator cannot learn from, by what the report says of them."""
    return {
        "a query that has no tokens for the generator": arrays["prompt_queries.lengths"][query_key] == 0,
        f"an answer longer than data.answer_len={prompt.answer_len} tokens": (
            arrays["answers.lengths"] > prompt.answer_len
        ),
    }


def _refuse(where: str, bad_rows: str, dropped: Mapping[str, int], num_read: int, num_rows: int, min_rows: int) -> None:
    reasons = ", ".join(f"{number} with {reason}" for reason, number in dropped.items())
    if dropped and bad_rows == "refuse":
        raise UserError(
            f"{where} has bad rows among {num_read}: {reasons}; fix them, or leave them out with data.bad_rows=drop"
        )
    if num_rows < min_rows:
        lost = f" ({num_read} read; {reasons})" if dropped else ""
        rows = "1 usable row" if num_rows == 1 else f"{num_rows} usable rows"
        fix = f"fewer than a batch of {min_rows}: give more rows or lower batch_size" if min_rows > 1 else "none to use"
        raise UserError(f"{where} has {rows}{lost}, {fix}")


def _check_passages(where: str, examples: Examples) -> None:
    if len(examples.passages) == 1:
        raise UserError(
            f"{where} has one distinct passage in {len(examples)} rows, and a retriever learns by telling passages "
            "apart: give rows of others, or train the generator alone (objective.contrastive_weight=0, "
            "objective.candidates=1)"
        )


def distinct(texts: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The distinct texts in order of appearance, and each text's index among them (texts,) int32."""
    index: dict[str, int] = {}
    keys = [index.setdefault(text, len(index)) for text in texts]
    return tuple(index), np.array(keys, np.int32)


def choose_negatives(rows: Rows, num: int) -> tuple[Rows, int]:
    """The rows with the first `num` of their given negatives, and how many of those were right passages.

    A passage of any row of the same query is right for it, whatever another row says of it. Copies count once.
    """
    if rows.negatives is None:
        return rows, 0
    right: dict[str, set[str]] = {}
    for query, passage in zip(rows.queries, rows.passages, strict=True):
        right.setdefault(query, set()).add(passage)
    given = [list(dict.fromkeys(texts)) for texts in rows.negatives]
    wrong = [[t for t in texts if t not in right[q]] for q, texts in zip(rows.queries, given, strict=True)]
    chosen = dataclasses.replace(rows, negatives=[texts[:num] for texts in wrong])
    return chosen, sum(map(len, given)) - sum(map(len, wrong))


def _distinct_passages(rows: Rows, num: int) -> tuple[tuple[str, ...], np.ndarray, np.ndarray | None]:
    """All distinct passages, those of the rows first; each row's among them (rows,), and its negatives' (rows, num)."""
    if rows.negatives is None:
        return *distinct(rows.passages), None
    sizes = np.array([len(texts) for texts in rows.negatives], np.int64)
    passages, keys = distinct([*rows.passages, *itertools.chain.from_iterable(rows.negatives)])
    negative_key = np.full((len(rows), num), -1, np.int32)
    negative_key[np.arange(num) < sizes[:, None]] = keys[len(rows) :]
    return passages, keys[: len(rows)], negative_key


def _negatives_line(negative_key: np.ndarray | None, labelled: int) -> str:
    if negative_key is None:
        return ""
    short, num = int((negative_key < 0).any(axis=1).sum()), negative_key.shape[1]
    line = f"given negatives: {num} a row, {short:,} row{'s bring' if short != 1 else ' brings'} fewer"
    return line + (f", {labelled:,} left out as passages of their own query" if labelled else "")


def _content_key(rows: Rows, *settings: RetrieverText | Prompt | WholeString | None) -> str:
    plain: list[Any] = []
    for record in settings:
        fields = {} if record is None else {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        if fields:
            fields["tokenizer"] = files.tokenizer_key(fields["tokenizer"])
        plain.append(fields)
    negatives = [] if rows.negatives is None else [rows.negatives]
    return files.content_key(plain, rows.queries, rows.passages, rows.answers, *negatives)


def _tokenise(
    rows: Rows,
    queries: Sequence[str],
    passages: Sequence[str],
    retriever: RetrieverText | None,
    prompt: Prompt | None,
    whole_string: WholeString | None,
) -> files.Arrays:
    """Every array that depends on a tokenizer, by name; `.cut` tells which texts lost their end."""
    arrays: files.Arrays = {}

    def put(name: str, ragged: Ragged, cut: np.ndarray | None = None) -> None:
        arrays[f"{name}.tokens"], arrays[f"{name}.lengths"] = ragged.tokens, ragged.lengths
        if cut is not None:
            arrays[f"{name}.cut"] = cut

    if retriever is not None:
        r = retriever
        put("retriever_queries", *segments.retriever_tokens(r.tokenizer, queries, r.query_prefix, r.query_len))
        put("retriever_passages", *segments.retriever_tokens(r.tokenizer, passages, r.passage_prefix, r.passage_len))
    if prompt is not None:
        prefixes, prompt_queries = segments.prompt_segments(prompt, passages, queries)
        put("prefixes", *prefixes)
        put("prompt_queries", *prompt_queries)
        put("answers", segments.answer_segments(prompt, rows.answers))
    if whole_string is not None:
        texts = zip(rows.queries, rows.passages, rows.answers, strict=True)
        strings, arrays["string_answer_start"], cut = segments.string_segments(whole_string, texts)
        put("strings", strings, cut)
    return arrays


def _cut_of(
    query_key: np.ndarray, passage_key: np.ndarray, negative_key: np.ndarray | None
) -> list[tuple[str, str, np.ndarray]]:
    """(what the report calls it, array, rows (n, m) of that array for each row) of all that can be cut."""
    found = [
        ("queries (retriever)", "retriever_queries.cut", query_key[:, None]),
        ("passages (retriever)", "retriever_passages.cut", passage_key[:, None]),
        ("queries (generator)", "prompt_queries.cut", query_key[:, None]),
        ("passages (generator)", "prefixes.cut", passage_key[:, None]),
        ("strings", "strings.cut", np.arange(len(query_key))[:, None]),
    ]
    if negative_key is not None:
        found.append(("negatives (retriever)", "retriever_passages.cut", negative_key))
        found.append(("negatives (generator)", "prefixes.cut", negative_key))
    return found


def _examples(
    rows: Rows,
    queries: tuple[str, ...],
    passages: tuple[str, ...],
    query_key: np.ndarray,
    passage_key: np.ndarray,
    negative_key: np.ndarray | None,
    arrays: files.Arrays,
) -> Examples:
    ragged = {}
    for name in ("retriever_queries", "retriever_passages", "prefixes", "prompt_queries", "answers", "strings"):
        if f"{name}.tokens" in arrays:
            starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(arrays[f"{name}.lengths"])])
            ragged[name] = Ragged(arrays[f"{name}.tokens"], starts)
    start = arrays.get("string_answer_start")
    return Examples(
        rows, queries, passages, query_key, passage_key, **ragged, string_answer_start=start, negative_key=negative_key
    )


def take(examples: Examples, rows: np.ndarray) -> Examples:
    """Some of the rows, with the distinct texts that they use, keys counted anew."""
    used_queries, query_key = np.unique(examples.query_key[rows], return_inverse=True)
    negative_key = None if examples.negative_key is None else examples.negative_key[rows]
    read = [examples.passage_key[rows], *([] if negative_key is None else [negative_key[negative_key >= 0]])]
    used_passages = np.unique(np.concatenate(read))
    if negative_key is not None:
        found = np.searchsorted(used_passages, negative_key).astype(np.int32)
        negative_key = np.where(negative_key < 0, negative_key, found)

    def some(ragged: Ragged | None, which: np.ndarray) -> Ragged | None:
        return None if ragged is None else ragged.take(which)

    start = examples.string_answer_start
    return Examples(
        rows=examples.rows.take(rows.tolist()),
        queries=tuple(examples.queries[i] for i in used_queries),
        passages=tuple(examples.passages[i] for i in used_passages),
        query_key=query_key.astype(np.int32),
        passage_key=np.searchsorted(used_passages, examples.passage_key[rows]).astype(np.int32),
        retriever_queries=some(examples.retriever_queries, used_queries),
        retriever_passages=some(examples.retriever_passages, used_passages),
        prefixes=some(examples.prefixes, used_passages),
        prompt_queries=some(examples.prompt_queries, used_queries),
        answers=some(examples.answers, rows),
        strings=some(examples.strings, rows),
        string_answer_start=None if start is None else start[rows],
        negative_key=negative_key,
    )
