"""What a frozen generator says of rows behind passages, computed once: it is kept on disk, by content.

**n** pairs of a row and a passage. Of each pair the sums of log p over the tokens of the row's answer and of its
question, but the question's first one, which nothing but the passage predicts.
"""

import dataclasses
import hashlib
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int, UInt

from rag_jax import data, files, pair, rag
from rag_jax.distributed import fingerprint
from rag_jax.inference import likelihood
from rag_jax.progress import Counter

# Columns of the sums.
PARTS = ("answer", "question")
# Pairs that are computed before they are written down.
BLOCK = 1024
# Of a pair's name.
NAME_BYTES = 16


def sums(
    model: rag.Rag,
    params: dict,
    examples: data.Examples,
    rows: Int[np.ndarray, " n"],
    passages: Int[np.ndarray, " n"],
    folder: pathlib.Path,
    batch_size: int,
) -> tuple[Float[np.ndarray, "n 2"], int]:
    """The sums of each pair, NaN for the part that the objective does not read, and how many pairs were computed.

    Every process must call. Those that the folder keeps are read, the others are computed and added. See `folder_of`.
    """
    parts = [part for part in PARTS if model.objective.evidence in (part, "both")]
    is_read = np.array([part in parts for part in PARTS])
    kept = Kept(folder)
    names = pair_names(examples, rows, passages)
    # Process 0 says what is there: a folder may be another one on every host.
    found = np.array(multihost_utils.broadcast_one_to_all(kept.sums(names)))
    missing = np.flatnonzero(np.isnan(found[:, is_read]).any(axis=1))
    missing = missing[np.argsort(passages[missing], kind="stable")]  # a passage is read once for all its rows
    with Counter("pairs of evidence", len(missing), active=jax.process_index() == 0) as counter:
        for start in range(0, len(missing), BLOCK):
            block = missing[start : start + BLOCK]
            found[block] = computed(model, params, examples, rows[block], passages[block], parts, batch_size, counter)
            if jax.process_index() == 0:
                kept.add(names[block], found[block])
    return np.where(is_read, found, np.nan), len(missing)


def computed(
    model: rag.Rag,
    params: dict,
    examples: data.Examples,
    rows: Int[np.ndarray, " n"],
    passages: Int[np.ndarray, " n"],
    parts: Sequence[str],
    batch_size: int,
    counter: Counter,
) -> Float[np.ndarray, "n 2"]:
    """The sums of these parts of each pair, NaN of the others."""
    prefixes, queries, answers = examples.prefixes, examples.prompt_queries, examples.answers
    assert prefixes is not None and queries is not None and answers is not None
    distinct, of_row = np.unique(rows, return_inverse=True)
    texts = queries.take(examples.query_key[distinct]), answers.take(distinct)
    return part_sums(model, params, (prefixes, *texts), of_row, passages, parts, batch_size, counter)


def part_sums(
    model: rag.Rag,
    params: dict,
    texts: tuple[data.Ragged, data.Ragged, data.Ragged],
    rows: Int[np.ndarray, " n"],
    passages: Int[np.ndarray, " n"],
    parts: Sequence[str],
    batch_size: int,
    counter: Counter,
) -> Float[np.ndarray, "n 2"]:
    """As `computed`, of `texts`: segments of the passages, and of the rows' questions and answers, one a row."""
    prefixes, questions, answers = texts
    first = 1 if "question" in parts else None  # of the question's tokens, that is summed
    asked, told = ([ragged[row] for row in range(len(ragged))] for ragged in (questions, answers))
    rest = [tokens[len(tokens) if first is None else first :] for tokens in asked]
    told = [tokens if "answer" in parts else tokens[:0] for tokens in told]
    heads, tails = (
        data.Ragged.of(tokens[:first] for tokens in asked),
        data.Ragged.of(map(np.concatenate, zip(rest, told, strict=True))),
    )
    pairs = likelihood.Pairs(prefixes, heads, tails, passages, rows, rows)
    log_probs = np.zeros((len(rows), 0), np.float32)
    if tails.lengths.any():
        log_probs = likelihood.answer_log_probs(model, params, pairs, at_a_time=batch_size, counter=counter)
    num_asked = np.array([len(tokens) for tokens in rest])[rows]
    is_asked = np.arange(log_probs.shape[1]) < num_asked[:, None]
    found = np.full((len(rows), len(PARTS)), np.nan, np.float32)
    for part, mask in (("answer", ~is_asked), ("question", is_asked)):
        if part in parts:
            found[:, PARTS.index(part)] = (log_probs * mask).sum(axis=1, dtype=np.float64)
    return found


def by_question(
    model: rag.Rag,
    params: dict,
    prefixes: data.Ragged,
    questions: data.Ragged,
    retrieved: Int[np.ndarray, "Q N"],
    batch_size: int,
) -> Int[np.ndarray, "Q N"]:
    """The order of each question's passages (of `prefixes`) by falling log p(question | passage); of equals, as it was.

    As the question generator of UPR (Sachan et al., 2022) re-ranks them, without its instruction.
    """
    num, N = retrieved.shape
    nothing = data.Ragged.of([()] * num)
    texts, rows = (prefixes, questions, nothing), np.repeat(np.arange(num), N)
    with Counter("re-ranking", len(rows), active=jax.process_index() == 0) as counter:
        sums = part_sums(model, params, texts, rows, retrieved.ravel(), ("question",), batch_size, counter)
    return np.argsort(-sums[:, PARTS.index("question")].reshape(num, N), axis=1, kind="stable")


def part_lengths(examples: data.Examples, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n 2"]:
    """Tokens of each row's answer and question that are summed."""
    queries, answers = examples.prompt_queries, examples.answers
    assert queries is not None and answers is not None
    return np.stack([answers.lengths[rows], queries.lengths[examples.query_key[rows]] - 1], axis=1)


@dataclasses.dataclass
class Kept:
    """Sums on disk, a file for each time that some were added; what is damaged is told and left alone."""

    folder: pathlib.Path

    def __post_init__(self) -> None:
        self.by_name: dict[bytes, np.ndarray] = {}
        for path in sorted(self.folder.glob("*.npz")):
            try:
                arrays = files.read(path)
                self._hold(arrays["name"], arrays["sums"])
            except Exception as error:  # of many kinds: archives, compression and arrays each have their own
                logging.warning("kept evidence in %s is damaged (%s) and made again", path, error)

    def _hold(self, names: UInt[np.ndarray, "n b"], sums: Float[np.ndarray, "n 2"]) -> None:
        for name, of_pair in zip(names, sums, strict=True):
            before = self.by_name.get(name.tobytes())  # perhaps of the other part
            self.by_name[name.tobytes()] = of_pair if before is None else np.fmax(of_pair, before)

    def sums(self, names: UInt[np.ndarray, "n b"]) -> Float[np.ndarray, "n 2"]:
        """NaN where there are none."""
        nothing = np.full(len(PARTS), np.nan, np.float32)
        found = [self.by_name.get(name.tobytes(), nothing) for name in names]
        return np.array(found, np.float32).reshape(len(names), len(PARTS))

    def add(self, names: UInt[np.ndarray, "n b"], sums: Float[np.ndarray, "n 2"]) -> None:
        self._hold(names, sums)
        digest = hashlib.blake2b(names.tobytes(), digest_size=8).hexdigest()
        try:
            files.write(self.folder / f"{digest}.npz", {"name": names, "sums": sums})
        except OSError as error:
            logging.warning("evidence is not kept: %s", error)


def pair_names(
    examples: data.Examples, rows: Int[np.ndarray, " n"], passages: Int[np.ndarray, " n"]
) -> UInt[np.ndarray, "n b"]:
    """Of each pair's texts."""

    def digest(*parts: bytes) -> bytes:
        total = hashlib.blake2b(digest_size=NAME_BYTES)
        for part in parts:
            total.update(len(part).to_bytes(8, "little") + part)
        return total.digest()

    def text(string: str) -> bytes:
        return string.encode("utf-8", "surrogatepass")

    texts = examples.rows
    of_row = {row: digest(text(texts.queries[row]), text(texts.answers[row])) for row in set(rows.tolist())}
    of_passage = {key: digest(text(examples.passages[key])) for key in set(passages.tolist())}
    names = (digest(of_row[row], of_passage[key]) for row, key in zip(rows.tolist(), passages.tolist(), strict=True))
    return np.frombuffer(b"".join(names), np.uint8).reshape(len(rows), NAME_BYTES)


def folder_of(opened: pair.Pair, params: dict) -> pathlib.Path:
    """Where what this very generator says is kept: by its weights and everything else that changes what it says."""
    assert opened.prompt is not None
    prompt = _said(opened.prompt) | {"tokenizer": files.tokenizer_key(opened.prompt.tokenizer)}
    model = dict(_said(opened.sources["generator"].model_config), computing=None)
    precision = opened.config.dtype, opened.config.matmul_precision
    weights = fingerprint.of_params(params["generator"])
    return files.folder() / "evidence" / files.content_key(prompt, model, precision, weights)


def _said(record: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults: one that a later version adds changes no key."""
    found = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    defaults = {field.name: field.default for field in dataclasses.fields(record)}
    return {name: _plain(value) for name, value in found.items() if value != defaults[name]}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
