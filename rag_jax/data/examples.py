"""Rows to tokenised examples: read, tokenise each distinct text once, keep on disk, drop what cannot be used."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from rag_jax import files
from rag_jax.data import rows as row_files
from rag_jax.data import segments
from rag_jax.data.rows import Rows
from rag_jax.data.segments import Prompt, Ragged, RetrieverText, WholeString
from rag_jax.errors import UserError

# Rows that lack something may be trained on otherwise: what to do where most of them do.
REMEDIES = {
    "an empty answer": "rows without answers train with objective.evidence=question (pdist, replug, emdr2), or the "
    "retriever alone with objective.name=none",
    "an empty passage": "rows without passages train with data.passages=FILE, mining.every_steps above 0 and a joint "
    "objective of several candidates",
    "a document that holds no passage": "data.passages must name their documents in the same words",
}


@dataclasses.dataclass(frozen=True)
class Gaps:
    """What rows may leave open, and the corpus in which their passages are sought then."""

    passage: bool = False
    answer: bool = False
    corpus: tuple[tuple[str, str], ...] = ()  # (config key, source): read where a row names no passage
    columns: Mapping[str, Any] | None = None  # of the corpus, where they are others than those of the rows
    always: bool = False  # read it even where every row names one; the passages of dropped rows are of it too


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenised rows and corpus. Each distinct text is there once; the fields of an unused model are None.

    Keys are int32, -1 where there is none. Passages are those that rows name, then those that are given as negatives
    alone, then the corpus' others.
    """

    rows: Rows  # the texts
    queries: tuple[str, ...]  # distinct
    passages: tuple[str, ...]  # distinct
    documents: tuple[str, ...]  # distinct names
    query_key: np.ndarray  # (rows,) into queries
    own_key: np.ndarray  # (rows, R) into passages: those known to answer the query of the row, the row's own first
    document_key: np.ndarray  # (rows,) into documents
    document_passages: Ragged  # one a document: into passages
    corpus_key: np.ndarray  # (c,) into passages: the corpus'
    negative_key: np.ndarray | None = None  # (rows, J) into passages, where negatives are given
    retriever_queries: Ragged | None = None  # one a distinct query
    retriever_passages: Ragged | None = None  # one a distinct passage
    prefixes: Ragged | None = None  # generator's passage segment, bos first: one a distinct passage
    prompt_queries: Ragged | None = None  # generator's query segment: one a distinct query
    answers: Ragged | None = None  # generator's answer segment, end-of-sequence last: one a row, empty where unknown
    strings: Ragged | None = None  # objective "dalm": one a row
    string_answer_start: np.ndarray | None = None  # (rows,) int32

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def passage_key(self) -> np.ndarray:
        """(rows,) the first passage that is known to answer the row's query."""
        return self.own_key[:, 0]

    @functools.cached_property
    def right_key(self) -> np.ndarray:
        """(queries, R): the passages that are known to answer each query."""
        right: list[dict[int, None]] = [{} for _ in self.queries]
        for query, passages in zip(self.query_key.tolist(), self.own_key.tolist(), strict=True):
            right[query].update((passage, None) for passage in passages if passage >= 0)
        return padded_keys(right)

    @functools.cached_property
    def document_of(self) -> np.ndarray:
        """(passages,) int32: the document of each passage; -1 where it is of none or of several."""
        found = np.full(len(self.passages), -1, np.int32)
        passages, counts = np.unique(self.document_passages.tokens, return_counts=True)
        document = np.repeat(np.arange(len(self.documents), dtype=np.int32), self.document_passages.lengths)
        found[self.document_passages.tokens] = document
        found[passages[counts > 1]] = -1
        return found

    def without_prompts(self) -> "Examples":
        """Without what a generator reads."""
        return dataclasses.replace(self, prefixes=None, prompt_queries=None, answers=None)

    def is_within(self, documents: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """Whether the passages stand in the documents (keys, broadcast); nothing stands in -1, and -1 nowhere."""
        base = len(self.passages) + 1
        there = np.isin(documents.astype(np.int64) * base + passages, self._document_pairs)
        return there & (documents >= 0) & (passages >= 0)

    @functools.cached_property
    def _document_pairs(self) -> np.ndarray:
        document = np.repeat(np.arange(len(self.documents)), self.document_passages.lengths)
        return document * (len(self.passages) + 1) + self.document_passages.tokens


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
    kinds: dict[str, int]  # "a passage" and the like -> rows
    dropped: dict[str, int]  # "an empty query" and the like -> rows
    queries: int  # distinct
    passages: int  # distinct
    cut: dict[str, int]  # which text -> rows in which it lost its end
    from_cache: bool
    negatives: str = ""  # what became of those that are given
    corpus: int = 0  # distinct passages, besides the rows' own
    notes: tuple[str, ...] = ()  # how rows and corpus were read, where that is not plain

    def __str__(self) -> str:
        def counts(numbers: Mapping[str, int], word: str) -> str:
            return ", ".join(f"{number:,} {word}{name}" for name, number in numbers.items() if number)

        kinds = f" ({counts(self.kinds, 'with ')})" if self.kinds["a passage"] < self.rows else ""
        parts = [f"{self.rows:,} rows{kinds}, {self.queries:,} distinct queries, {self.passages:,} distinct passages"]
        if self.corpus:
            parts[0] += f", {self.corpus:,} of them of the corpus alone"
        if self.dropped:
            parts.append(f"dropped of {self.rows_read:,}: {counts(self.dropped, 'with ')}")
        if any(self.cut.values()):
            parts.append(f"too long and cut: {counts(self.cut, '')}")
        if self.negatives:
            parts.append(self.negatives)
        return "; ".join([*parts, *self.notes])


def load_examples(
    source: str,
    *,
    key: str,
    columns: Mapping[str, Any],
    bad_rows: str,
    retriever: RetrieverText | None,
    prompt: Prompt | None,
    whole_string: WholeString | None = None,
    min_rows: int = 1,
    negatives: int = 0,
    gaps: Gaps = Gaps(),
    layout: str = "auto",
) -> tuple[Examples, Report]:
    """Tokenised rows of `source` for the models that are used, and what became of the rows.

    `key` is the config key of `source`, `columns` the column of "query", "passage", "document" and "answer" (which is
    not asked for when only the retriever is used), and of "negative" where so many `negatives` of each row's given ones
    are wanted. A row that lacks what `gaps` does not allow, whose document holds no passage, a query without tokens
    (from its last one the answer is predicted), or an answer longer than `prompt.answer_len` tokens is dropped or
    refused (`bad_rows`); too long a query or passage is cut. Raises UserError for an unreadable source, for fewer
    usable rows than `min_rows` (a batch to train on), and where a retriever has no two passages to tell apart.
    """
    where = f"{key}={source!r}"
    with_answers = prompt is not None or whole_string is not None
    read = row_files.read_rows(
        source,
        key,
        columns,
        with_answers=with_answers,
        with_negatives=negatives > 0,
        passages_may_miss=gaps.passage and bool(gaps.corpus),
        layout=layout,
    )
    notes = [*read.notes]
    needed = {"passage": not gaps.passage, "answer": with_answers and not gaps.answer}
    kept, dropped = row_files.empty_fields(read, [part for part, is_needed in needed.items() if is_needed])
    rows = read.take(kept) if dropped else read
    rows, labelled = choose_negatives(rows, negatives)
    wants_corpus = gaps.always or not all(rows.passages)
    corpus = _read_corpus(gaps, columns, read if gaps.always else rows, notes) if wants_corpus else []
    untokenised = _distinct_texts(rows, corpus, negatives)
    _refuse_no_passage(where, untokenised)
    arrays, from_cache = files.cached(
        _content_key(untokenised, retriever, prompt, whole_string),
        lambda: _tokenise(untokenised, retriever, prompt, whole_string),
    )
    examples, rows_kept = _those_that_fit(_with_tokens(untokenised, arrays), prompt, dropped)
    _refuse(where, bad_rows, dropped, len(read), len(examples), min_rows)
    if retriever is not None and min_rows > 1:
        _check_passages(where, examples)
    return examples, Report(
        rows_read=len(read),
        rows=len(examples),
        kinds=_kinds(examples),
        dropped=dict(dropped),
        queries=len(examples.queries),
        passages=len(examples.passages),
        cut=_cut_counts(untokenised, rows_kept, arrays),
        from_cache=from_cache,
        negatives=_negatives_line(examples.negative_key, labelled),
        corpus=len(examples.passages) - len(_named(examples)),
        notes=tuple(notes),
    )


def _read_corpus(gaps: Gaps, columns: Mapping[str, Any], read: Rows, notes: list[str]) -> list[tuple[str, str]]:
    """(passage, document) of the corpus, after those of the rows that were read; how it was read is noted."""
    documents = read.documents or [""] * len(read)
    own = [(text, name) for texts, name in zip(read.passages, documents, strict=True) for text in texts]
    for key, source in gaps.corpus:
        pairs, how = row_files.read_corpus(source, key, gaps.columns or columns)
        own += pairs
        notes += [f"{key}: {note}" for note in how]
    return own


def _kinds(examples: Examples) -> dict[str, int]:
    """Rows by what is known of where their answer stands."""
    known, in_document = examples.passage_key >= 0, examples.document_key >= 0
    return {
        "a passage": int(known.sum()),
        "a document alone": int((in_document & ~known).sum()),
        "neither passage nor document": int((~in_document & ~known).sum()),
    }


def _named(examples: Examples) -> np.ndarray:
    """Keys of the passages that rows name, as right or as wrong ones."""
    keys = [examples.own_key, examples.negative_key]
    named = np.unique(np.concatenate([part.ravel() for part in keys if part is not None]))
    return named[named >= 0]


def _unfit(examples: Examples, prompt: Prompt | None) -> dict[str, np.ndarray]:
    """Which rows (rows,) bool cannot be learnt from, by what the report says of them."""
    in_document, lengths = examples.document_key >= 0, np.append(examples.document_passages.lengths, 0)
    found = {
        "a document that holds no passage": (
            in_document & (examples.passage_key < 0) & (lengths[examples.document_key] == 0)
        )
    }
    queries, answers = examples.prompt_queries, examples.answers
    if prompt is None or queries is None or answers is None:
        return found
    return found | {
        "a query that has no tokens for the generator": queries.lengths[examples.query_key] == 0,
        f"an answer longer than data.answer_len={prompt.answer_len} tokens": answers.lengths > prompt.answer_len,
    }


def _those_that_fit(examples: Examples, prompt: Prompt | None, dropped: dict[str, int]) -> tuple[Examples, np.ndarray]:
    """The rows that can be trained on, and which they are. Others are counted in `dropped`, by their first reason."""
    fits = np.ones(len(examples), bool)
    for reason, unfit in _unfit(examples, prompt).items():
        if number := int((unfit & fits).sum()):
            dropped[reason] = number
        fits &= ~unfit
    kept = np.flatnonzero(fits)
    return (examples if fits.all() else take(examples, kept)), kept


def _refuse_no_passage(where: str, examples: Examples) -> None:
    if len(examples) and not examples.passages:
        raise UserError(
            f"{where} names no passage in any row: name the file of passages in which they are sought, data.passages, "
            "or the column that holds them, data.columns.passage"
        )


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
        most = max(dropped, key=lambda reason: dropped[reason], default="")
        remedy = f"; {REMEDIES[most]}" if most in REMEDIES else ""
        raise UserError(f"{where} has {rows}{lost}, {fix}{remedy}")


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
    for query, passages in zip(rows.queries, rows.passages, strict=True):
        right.setdefault(query, set()).update(passages)
    given = [list(dict.fromkeys(texts)) for texts in rows.negatives]
    wrong = [[t for t in texts if t not in right[q]] for q, texts in zip(rows.queries, given, strict=True)]
    chosen = dataclasses.replace(rows, negatives=[texts[:num] for texts in wrong])
    return chosen, sum(map(len, given)) - sum(map(len, wrong))


def padded_keys(rows: Sequence[Collection[int]], least: int = 1) -> np.ndarray:
    """(rows, m) int32 of keys, -1: no more; m as many as the longest row has, and `least`."""
    sizes = np.array([len(row) for row in rows], np.int64)
    keys = np.full((len(rows), max(least, int(sizes.max(initial=0)))), -1, np.int32)
    keys[np.arange(keys.shape[1]) < sizes[:, None]] = list(itertools.chain.from_iterable(rows))
    return keys


def _distinct_texts(rows: Rows, corpus: Sequence[tuple[str, str]], num_negatives: int) -> Examples:
    """The rows and the corpus of (passage, document), nothing of them tokenised yet."""
    queries, query_key = distinct(rows.queries)
    index: dict[str, int] = {}
    own = [[index.setdefault(text, len(index)) for text in dict.fromkeys(texts)] for texts in rows.passages]
    negatives = [[index.setdefault(text, len(index)) for text in texts] for texts in rows.negatives or ()]
    corpus_keys = [index.setdefault(passage, len(index)) for passage, _ in corpus]

    names = rows.documents or [""] * len(rows)
    documents = {
        name: i for i, name in enumerate(dict.fromkeys(n for n in (*names, *(d for _, d in corpus)) if n.strip()))
    }
    document_key = np.array([documents.get(name, -1) for name in names], np.int32)
    within: list[dict[int, None]] = [{} for _ in documents]
    for document, passages in zip(document_key.tolist(), own, strict=True):
        if document >= 0:
            within[document].update(dict.fromkeys(passages))
    for passage, (_, name) in zip(corpus_keys, corpus, strict=True):
        if name in documents:
            within[documents[name]][passage] = None

    of_query: list[dict[int, None]] = [{} for _ in queries]
    for query, passages in zip(query_key.tolist(), own, strict=True):
        of_query[query].update(dict.fromkeys(passages))
    for row, (query, document) in enumerate(zip(query_key.tolist(), document_key.tolist(), strict=True)):
        if not own[row]:  # what other rows know of its query, or the only passage there is to its document
            of_document = within[document] if document >= 0 else {}
            own[row] = list(of_query[query]) or (list(of_document) if len(of_document) == 1 else [])
    return Examples(
        rows=rows,
        queries=queries,
        passages=tuple(index),
        documents=tuple(documents),
        query_key=query_key,
        own_key=padded_keys(own),
        document_key=document_key,
        document_passages=Ragged.of(list(passages) for passages in within),
        corpus_key=np.array(list(dict.fromkeys(corpus_keys)), np.int32),
        negative_key=None if rows.negatives is None else padded_keys(negatives, num_negatives),
    )


def _negatives_line(negative_key: np.ndarray | None, labelled: int) -> str:
    if negative_key is None:
        return ""
    short, num = int((negative_key < 0).any(axis=1).sum()), negative_key.shape[1]
    line = f"given negatives: {num} a row, {short:,} row{'s bring' if short != 1 else ' brings'} fewer"
    return line + (f", {labelled:,} left out as passages of their own query" if labelled else "")


def _content_key(examples: Examples, *settings: RetrieverText | Prompt | WholeString | None) -> str:
    plain: list[Any] = []
    for record in settings:
        fields = {} if record is None else {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        if fields:
            fields["tokenizer"] = files.tokenizer_key(fields["tokenizer"])
        plain.append(fields)
    rows = examples.rows  # whole strings are of rows
    return files.content_key(plain, rows.queries, rows.passages, rows.answers, examples.queries, examples.passages)


def _tokenise(
    examples: Examples, retriever: RetrieverText | None, prompt: Prompt | None, whole_string: WholeString | None
) -> files.Arrays:
    """Every array that depends on a tokenizer, by name; `.cut` tells which texts lost their end."""
    arrays: files.Arrays = {}
    queries, passages, rows = examples.queries, examples.passages, examples.rows

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
        texts = zip(rows.queries, (own for own, *_ in rows.passages), rows.answers, strict=True)
        strings, arrays["string_answer_start"], cut = segments.string_segments(whole_string, texts)
        put("strings", strings, cut)
    return arrays


def _cut_of(examples: Examples, rows: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    """(what the report calls it, array, places (n, m) in it of the n that are counted) of all that can be cut."""
    query, own = examples.query_key[rows, None], examples.own_key[rows]
    alone = np.setdiff1d(examples.corpus_key, _named(examples))[:, None]
    found = [
        ("queries (retriever)", "retriever_queries.cut", query),
        ("passages (retriever)", "retriever_passages.cut", own),
        ("queries (generator)", "prompt_queries.cut", query),
        ("passages (generator)", "prefixes.cut", own),
        ("strings", "strings.cut", rows[:, None]),
        ("passages of the corpus (retriever)", "retriever_passages.cut", alone),
        ("passages of the corpus (generator)", "prefixes.cut", alone),
    ]
    if examples.negative_key is not None:
        found.append(("negatives (retriever)", "retriever_passages.cut", examples.negative_key[rows]))
        found.append(("negatives (generator)", "prefixes.cut", examples.negative_key[rows]))
    return found


def _cut_counts(examples: Examples, rows: np.ndarray, arrays: files.Arrays) -> dict[str, int]:
    """How many texts of these rows were cut, by segment."""
    of_rows = _cut_of(examples, rows)
    return {name: _num_cut(arrays[array], index) for name, array, index in of_rows if array in arrays}


def _num_cut(cut: np.ndarray, index: np.ndarray) -> int:
    # -1, which is none, finds the False behind the last text.
    return int(np.any(np.append(cut, False)[index], axis=1).sum())


def _with_tokens(examples: Examples, arrays: files.Arrays) -> Examples:
    tokens = {}
    for name in ("retriever_queries", "retriever_passages", "prefixes", "prompt_queries", "answers", "strings"):
        if f"{name}.tokens" in arrays:
            starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(arrays[f"{name}.lengths"])])
            tokens[name] = Ragged(arrays[f"{name}.tokens"], starts)
    return dataclasses.replace(examples, **tokens, string_answer_start=arrays.get("string_answer_start"))


def take(examples: Examples, rows: np.ndarray) -> Examples:
    """Some of the rows, with the distinct texts that they use and the whole corpus, keys counted anew."""
    used_queries, query_key = np.unique(examples.query_key[rows], return_inverse=True)
    negative_key = None if examples.negative_key is None else examples.negative_key[rows]
    read = [examples.own_key[rows], negative_key, examples.document_passages.tokens, examples.corpus_key]
    used = np.unique(np.concatenate([keys.ravel() for keys in read if keys is not None]))
    used = used[used >= 0]

    def anew(keys: np.ndarray) -> np.ndarray:
        return np.where(keys < 0, keys, np.searchsorted(used, keys)).astype(np.int32)

    def some(ragged: Ragged | None, which: np.ndarray) -> Ragged | None:
        return None if ragged is None else ragged.take(which)

    start = examples.string_answer_start
    return Examples(
        rows=examples.rows.take(rows.tolist()),
        queries=tuple(examples.queries[i] for i in used_queries),
        passages=tuple(examples.passages[i] for i in used),
        documents=examples.documents,
        query_key=query_key.astype(np.int32),
        own_key=anew(examples.own_key[rows]),
        document_key=examples.document_key[rows],
        document_passages=Ragged(anew(examples.document_passages.tokens), examples.document_passages.starts),
        corpus_key=anew(examples.corpus_key),
        negative_key=None if negative_key is None else anew(negative_key),
        retriever_queries=some(examples.retriever_queries, used_queries),
        retriever_passages=some(examples.retriever_passages, used),
        prefixes=some(examples.prefixes, used),
        prompt_queries=some(examples.prompt_queries, used_queries),
        answers=some(examples.answers, rows),
        strings=some(examples.strings, rows),
        string_answer_start=None if start is None else start[rows],
    )
