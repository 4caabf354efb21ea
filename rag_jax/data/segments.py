"""Texts to tokens: what the retriever reads, and the generator's segments, the same for training and evaluation.

A tokenizer here is a fast one of `transformers`; every function tokenises all its texts in one batched call.
"""

import copy
import dataclasses
import functools
import json
import string
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers

from rag_jax.errors import UserError

# Characters of a text that are tokenised at first: so many for each token that is kept, and so many besides. A text of
# megabytes takes seconds and gigabytes to tokenise, and all but its beginning is cut anyway.
CHARS_A_TOKEN, MORE_CHARS = 64, 2**16


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of tokens of different lengths, end to end: row i is `tokens[starts[i]:starts[i + 1]]`."""

    tokens: np.ndarray  # (sum of lengths,) int32
    starts: np.ndarray  # (rows + 1,) int64

    @classmethod
    def of(cls, rows: Iterable[Sequence[int] | np.ndarray]) -> "Ragged":
        arrays = [np.asarray(row, np.int32) for row in rows]
        starts = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        return cls(np.concatenate([*arrays, np.zeros(0, np.int32)]), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int | np.integer) -> np.ndarray:
        return self.tokens[self.starts[row] : self.starts[row + 1]]

    @functools.cached_property
    def lengths(self) -> np.ndarray:  # (rows,)
        return np.diff(self.starts)

    def take(self, rows: np.ndarray) -> "Ragged":
        return Ragged.of(self[row] for row in rows)


@dataclasses.dataclass(frozen=True)
class RetrieverText:
    """How the retriever reads: prefix + text, the tokenizer's own special tokens, cut to so many tokens."""

    tokenizer: Any
    query_prefix: str
    passage_prefix: str
    query_len: int
    passage_len: int


@dataclasses.dataclass(frozen=True)
class Prompt:
    """How the generator reads: `[bos][passage][query][answer][eos]`, each segment tokenised apart.

    Any query may meet any passage, so no token may span two segments. The lengths count bos and eos.
    """

    tokenizer: Any
    passage: str  # template with {passage}
    query: str  # template with {query}
    answer: str  # template with {answer}
    passage_len: int
    query_len: int
    answer_len: int


@dataclasses.dataclass(frozen=True)
class WholeString:
    """How the predecessor's generator reads: one string with tags, cut on the right, see `string_segments`."""

    tokenizer: Any
    max_len: int


def retriever_tokens(tokenizer: Any, texts: Sequence[str], prefix: str, max_len: int) -> tuple[Ragged, np.ndarray]:
    """Tokens of prefix + text as the tokenizer makes and cuts them, special tokens included; which were cut (rows,)."""
    # One token more than fits shows which texts are cut.
    texts, ids = _beginnings(tokenizer, texts, max_len, (prefix, ""), truncation=True, max_length=max_len + 1)
    long = Ragged.of(ids)
    cut = long.lengths > max_len
    if not cut.any():
        return long, cut
    again = iter(_encode(tokenizer, [texts[i] for i in np.flatnonzero(cut)], truncation=True, max_length=max_len))
    return Ragged.of(next(again) if cut[i] else long[i] for i in range(len(long))), cut


def prompt_segments(
    prompt: Prompt, passages: Sequence[str], queries: Sequence[str]
) -> tuple[tuple[Ragged, np.ndarray], tuple[Ragged, np.ndarray]]:
    """Tokens of the passage segments (bos first) and of the query segments, each with what was cut (rows,) bool."""
    bos = bos_ids(prompt.tokenizer)
    passage_segments, passage_cut = template_tokens(
        prompt.tokenizer, prompt.passage, passages, prompt.passage_len - len(bos), "prompt_passage_len"
    )
    with_bos = Ragged.of([*bos, *segment] for segment in passage_segments)
    query_segments, query_cut = template_tokens(
        reading_on(prompt.tokenizer), prompt.query, queries, prompt.query_len, "prompt_query_len"
    )
    return (with_bos, passage_cut), (Ragged.of(query_segments), query_cut)


def answer_segments(prompt: Prompt, answers: Sequence[str]) -> Ragged:
    """Tokens of the answer segments, end-of-sequence last, never cut to `answer_len`: one may be longer.

    Of an answer that is not known, a blank one, there are none.
    """
    eos = eos_id(prompt.tokenizer)
    around = split_template(prompt.answer)
    tokenizer = reading_on(prompt.tokenizer)
    _, rows = _beginnings(tokenizer, answers, prompt.answer_len, around, add_special_tokens=False)
    return Ragged.of([*ids, eos] if answer.strip() else [] for answer, ids in zip(answers, rows, strict=True))


def string_segments(whole: WholeString, rows: Iterable[tuple[str, str, str]]) -> tuple[Ragged, np.ndarray, np.ndarray]:
    """The predecessor's strings for (query, passage, answer) texts: tokens, answer_start (rows,), cut (rows,) bool.

    Special tokens are those that the tokenizer adds. `answer_start` counts positions that predict: position l predicts
    token l + 1, so it is the length of the string up to and including `#answer#`, uncut, minus one. Beyond `max_len` it
    means that no answer token is left.
    """
    rows = list(rows)
    heads = [f"#query# #query# {query} #passage# #passage# {passage} #answer#" for query, passage, _ in rows]
    strings = [f"{head} {answer}" for head, (_, _, answer) in zip(heads, rows, strict=True)]
    _, head_ids = _beginnings(whole.tokenizer, heads, whole.max_len, ("", ""))
    answer_start = np.array([len(head) - 1 for head in head_ids], np.int32)
    ragged, cut = retriever_tokens(whole.tokenizer, strings, "", whole.max_len)
    return ragged, answer_start, cut


@functools.lru_cache(maxsize=16)
def reading_on(tokenizer: Any) -> Any:
    """The tokenizer as it reads on within a text, without the blank that some kinds put before the text's beginning.

    SentencePiece's do so, and byte-level ones on demand. With it, segments would not have the tokens of the whole.
    """

    def changed(part: Any) -> Any:
        if isinstance(part, list):
            return [changed(one) for one in part if not (isinstance(one, dict) and one.get("type") == "Prepend")]
        if not isinstance(part, dict):
            return part
        never = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}
        return {name: changed(one) for name, one in part.items()} | never.get(str(part.get("type")), {})

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    (normalizer,), pre_tokenizer = changed([state["normalizer"]]) or [None], changed(state["pre_tokenizer"])
    if (normalizer, pre_tokenizer) == (state["normalizer"], state["pre_tokenizer"]):
        return tokenizer
    state |= {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    other = tokenizers.Tokenizer.from_str(json.dumps(state))
    copied = copy.deepcopy(tokenizer)
    copied.backend_tokenizer.normalizer = other.normalizer
    copied.backend_tokenizer.pre_tokenizer = other.pre_tokenizer
    return copied


def bos_ids(tokenizer: Any) -> list[int]:
    """What opens the passage segment: the beginning-of-sequence token, or nothing where the tokenizer has none."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def eos_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"generator.path={tokenizer.name_or_path!r}: its tokenizer has no eos_token, which ends every answer; "
            "name one in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def template_tokens(
    tokenizer: Any, template: str, fields: Sequence[str], max_len: int, key: str
) -> tuple[list[list[int]], np.ndarray]:
    """Tokens of a template filled with each field, without special tokens, and which (rows,) bool were cut.

    What is too long loses the last tokens of the field; the template's own text on both sides of it stays.
    """
    before, after = split_template(template)
    texts, ids = _beginnings(tokenizer, fields, max_len, (before, after), add_special_tokens=False)
    cut = np.array([len(row) > max_len for row in ids], bool)
    # Offsets cost several times the tokens themselves: only for those that need them.
    for i in np.flatnonzero(cut):
        filled = tokenizer(texts[i], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        begin, end = len(before), len(texts[i]) - len(after)
        # Byte-level tokenizers leave white space out of offsets: a token of it alone is empty, at its end.
        head = sum(begin > 0 and (a < begin or b <= begin) for a, b in filled["offset_mapping"])
        tail = sum(b > end for _, b in filled["offset_mapping"])
        if head + tail >= max_len:
            raise UserError(
                f"data.{key} leaves {max_len} tokens, and the prompt's own text {template!r} takes {head + tail} of "
                f"them: raise data.{key} or shorten the prompt"
            )
        ids[i] = ids[i][: max_len - tail] + ids[i][len(ids[i]) - tail :]
    return ids, cut


def split_template(template: str) -> tuple[str, str]:
    """The literal texts around a template's one {field}; `{{` and `}}` stand for braces."""
    before, after, seen = "", "", 0
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"prompt {template!r}: {error}; write {{{{ and }}}} for braces of its text") from None
    for literal, name, _, _ in parts:
        before, after = (before + literal, after) if not seen else (before, after + literal)
        seen += name is not None
    if seen != 1:
        raise UserError(f"prompt {template!r} must hold its field exactly once")
    return before, after


def _beginnings(
    tokenizer: Any, texts: Sequence[str], max_len: int, around: tuple[str, str], **options: Any
) -> tuple[list[str], list[list[int]]]:
    """Each text with `around` it, and its tokens.

    Of a very long text only those of its beginning, where that alone has more than `max_len`.
    """
    from_left = options.get("truncation") and tokenizer.truncation_side == "left"
    most = sys.maxsize if from_left else MORE_CHARS + CHARS_A_TOKEN * max_len
    before, after = around
    filled = [before + text[:most] + after for text in texts]
    ids = _encode(tokenizer, filled, **options)
    for i in (i for i, text in enumerate(texts) if len(text) > most and len(ids[i]) <= max_len):
        filled[i] = before + texts[i] + after
        (ids[i],) = _encode(tokenizer, [filled[i]], **options)
    return filled, ids


def _encode(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """Token ids of each text, by one call of the fast tokenizer."""
    if not texts:
        return []
    options |= {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(list(texts), padding=False, **options)["input_ids"]


def joined(first: Ragged, second: Ragged) -> Ragged:
    """The rows of both."""
    starts = np.concatenate([first.starts, second.starts[1:] + first.starts[-1]])
    return Ragged(np.concatenate([first.tokens, second.tokens]), starts)


def padded_length(lengths: np.ndarray, max_len: int) -> int:
    """The longest of the lengths rounded up, at most `max_len`."""
    return min(round_up(int(lengths.max(initial=1))), max_len)


def round_up(length: int) -> int:
    """To a multiple of 8: few shapes, few compilations."""
    return -(-length // 8) * 8


def pad(ragged: Ragged, rows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """ids (rows, length) int32 with 0 on the right, and the mask of real tokens (rows, length) bool."""
    return join_padded((ragged,), (rows,), length)


def join_padded(parts: Sequence[Ragged], rows: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Row i holds row `rows[p][i]` of every part p in turn, then 0: ids (rows, length) int32, mask bool."""
    num_rows = len(rows[0])
    ids = np.zeros((num_rows, length), np.int32)
    begin = np.zeros((num_rows, 1), np.int64)
    position = np.arange(length)[None, :]
    for part, part_rows in zip(parts, rows, strict=True):
        size = part.lengths[part_rows][:, None]
        here = (position >= begin) & (position < begin + size)
        source = part.starts[part_rows][:, None] + position - begin
        ids[here] = part.tokens[source[here]]
        begin = begin + size
    if num_rows and begin.max() > length:
        raise ValueError(f"a row of {begin.max()} tokens does not fit a length of {length}")
    return ids, position < begin
