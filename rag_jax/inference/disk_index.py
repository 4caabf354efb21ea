"""A corpus' embeddings on disk: made once, shard by shard, searched block by block; memory holds one of them.

    FOLDER/index.json                what was embedded by what, and in which form
    FOLDER/passages.parquet          the texts, and where they come from, of an index that can be asked from
    FOLDER/shard_00000.npy ...       embeddings (SHARD_ROWS, E) in float32, bfloat16 or int8, the last one shorter
    FOLDER/scale_00000.npy ...       of int8: what a row's scores are to be multiplied with
    FOLDER/bits_00000.npy ...        binary only: the embeddings' signs (SHARD_ROWS, E / 8), beside them in int8

**M** passages, **E** embedding width.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Array, Float, Int, Shaped, UInt8, UInt64

from rag_jax import files, rag, untrusted
from rag_jax.data import segments
from rag_jax.distributed import processes
from rag_jax.errors import UserError
from rag_jax.inference import search

# Number types and how files hold them: numpy's format does not know bfloat16.
STORED = {"float32": "float32", "bfloat16": "uint16", "int8": "int8", "binary": "int8"}
SCALED = ("int8", "binary")
PASSAGES = "passages.parquet"
SHARD_ROWS = 2**16
# Of what is searched by signs: so many times the passages asked for are ordered anew, and at least so many.
WIDENED, LEAST = 10, 100


@dataclasses.dataclass(frozen=True)
class Index:
    """An index whose shards are all there. `block` is what `search.top_k` asks for."""

    folder: pathlib.Path
    dtype: str
    num_passages: int
    shard_rows: int

    def __len__(self) -> int:
        return self.num_passages

    @functools.cached_property
    def passages(self) -> tuple[str, ...]:
        return tuple(self._texts.column("passage").to_pylist())

    @functools.cached_property
    def sources(self) -> dict[str, str]:
        """Where passages come from, of those of which it is known."""
        if "source" not in self._texts.column_names:
            return {}
        found = zip(self.passages, self._texts.column("source").to_pylist(), strict=True)
        return {text: source for text, source in found if source is not None}

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """Of what it was made, as `index.json` says."""
        return untrusted.read_json(self.folder / "index.json", str(self.folder / "index.json"))

    @functools.cached_property
    def _texts(self) -> pa.Table:
        try:
            return pq.read_table(self.folder / PASSAGES)
        except FileNotFoundError:
            raise UserError(f"{self.folder} holds no {PASSAGES}; make the index with rag_jax.index") from None
        except pa.ArrowInvalid as error:
            raise UserError(
                f"{self.folder / PASSAGES} is damaged ({untrusted.one_line(error)}); delete it and make it anew"
            ) from None

    def block(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Embeddings of passages start .. stop - 1 (stop - start, E), and the factors of their scores if not 1."""
        parts = []
        for shard in range(start // self.shard_rows, -(-stop // self.shard_rows)):
            first = shard * self.shard_rows
            parts.append(self._read(shard, slice(max(start - first, 0), stop - first)))
        values, scales = zip(*parts, strict=True)
        return np.concatenate(values), np.concatenate(scales) if self.dtype in SCALED else None

    def rows(self, passages: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n E"]:
        """Embeddings of some passages, in ascending order; no others are read."""
        parts = []
        for shard in np.unique(passages // self.shard_rows).tolist():
            own = passages[passages // self.shard_rows == shard] - shard * self.shard_rows
            values, scale = self._read(shard, own)
            parts.append(values.astype(np.float32) * (1.0 if scale is None else scale[:, None]))
        return np.concatenate(parts)

    @functools.cached_property
    def words(self) -> UInt64[np.ndarray, "W M"]:
        return as_words(self.bits)

    @property
    def bits(self) -> UInt8[np.ndarray, "M E8"]:
        """All signs, a bit for each number."""
        shards = range(-(-len(self) // self.shard_rows))
        return np.concatenate([np.load(_path(self.folder, "bits", shard)) for shard in shards])

    def _read(self, shard: int, rows: Any) -> tuple[np.ndarray, np.ndarray | None]:
        values = np.asarray(np.load(_path(self.folder, "shard", shard), mmap_mode="r")[rows])
        values = values.view(ml_dtypes.bfloat16) if self.dtype == "bfloat16" else values
        return values, np.load(_path(self.folder, "scale", shard))[rows] if self.dtype in SCALED else None


def build(
    folder: str | os.PathLike, model: rag.Rag, params: dict, tokens: segments.Ragged, *, batch_size: int,
    dtype: str = "float32", shard_rows: int = SHARD_ROWS,
) -> Index:  # fmt: skip
    """The index of these tokenised passages by this retriever, from the shards that are there on; all processes call.

    A shard appears complete or not at all, so a stopped build continues. UserError for an index of another retriever,
    other passages or another form: it stays as it is.
    """
    if not len(tokens):
        raise UserError(f"an index in {os.fspath(folder)}: there are no passages to put into it")
    path = pathlib.Path(folder)
    index = Index(path, dtype, len(tokens), shard_rows)
    facts = {
        "retriever": retriever_key(model, params),
        "passages": passages_key(tokens),
        "dtype": dtype,
        "number of passages": len(tokens),
        "rows of a shard": shard_rows,
    }
    with processes.all_or_none():
        if jax.process_index() == 0:
            _check_or_begin(path, facts)
    shards = range(-(-len(tokens) // shard_rows))
    rows_of = {shard: np.arange(len(tokens))[shard * shard_rows :][:shard_rows] for shard in shards}
    # Before any is made: then all processes see the same ones.
    width = _width(model, params)
    missing = [shard for shard in shards if not _is_complete(path, shard, dtype, (len(rows_of[shard]), width))]
    for shard in missing:
        label = f"passages, part {shard + 1} of {len(shards)}" if len(shards) > 1 else "passages"
        emb = search.embed(model, params, tokens.take(rows_of[shard]), batch_size=batch_size, label=label)
        if jax.process_index() == 0:
            stored, scale = compress(emb, dtype)
            if scale is not None:
                _save(_path(path, "scale", shard), scale)
            if dtype == "binary":
                _save(_path(path, "bits", shard), signs(emb))
            _save(_path(path, "shard", shard), stored.view(STORED[dtype]))
    with processes.all_or_none():  # the last shard is there for all
        return index


def opened(folder: pathlib.Path) -> Index:
    """An index that is complete; UserError for a folder that holds none, or one whose making was stopped."""
    index = Index(folder, "float32", 0, SHARD_ROWS)
    facts = index.facts if (folder / "index.json").is_file() else {}
    try:
        dtype, number, shard_rows = facts["dtype"], int(facts["number of passages"]), int(facts["rows of a shard"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder}: holds no index; make one with rag_jax.index --out={folder}") from None
    index = Index(folder, dtype, number, shard_rows)
    width = None
    for shard in range(-(-number // shard_rows)):
        rows = min(shard_rows, number - shard * shard_rows)
        try:
            width = width or np.load(_path(folder, "shard", shard), mmap_mode="r").shape[1]
        except (OSError, ValueError, IndexError):
            width = None
        if dtype not in STORED or not width or not _is_complete(folder, shard, dtype, (rows, width)):
            raise UserError(
                f"{folder}: is not complete or damaged (part {shard + 1}); make it again, with the same command"
            )
    return index


def write_passages(folder: pathlib.Path, passages: Sequence[str], sources: Mapping[str, str]) -> None:
    """The texts beside their embeddings, in their order."""
    columns = {"passage": pa.array(passages, pa.large_string())}
    if sources:
        columns["source"] = pa.array([sources.get(text) for text in passages], pa.large_string())
    with files.file_at_once(folder / PASSAGES, sync=True) as file:
        pq.write_table(pa.table(columns), file)


def compress(emb: Float[np.ndarray, "n E"], dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows in a smaller number type, and for int8 the factor (n,) of each: its largest entry becomes 127."""
    if dtype not in SCALED:
        return emb.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype), None
    scale = np.maximum(np.abs(emb).max(axis=1), np.finfo(np.float32).tiny) / 127
    return np.rint(emb / scale[:, None]).astype(np.int8), scale.astype(np.float32)


def signs(emb: Float[np.ndarray, "n E"]) -> UInt8[np.ndarray, "n E8"]:
    """A bit for each entry, set where it is above 0; the first one is the highest of its byte, as `faiss` has them."""
    return np.packbits(emb > 0, axis=1)


def as_words(bits: UInt8[np.ndarray, "n E8"]) -> UInt64[np.ndarray, "W n"]:
    """The same bits, eight bytes at a time, filled up with zeros; those that are compared together lie together."""
    words = np.ascontiguousarray(np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8)))).view(np.uint64)
    return np.ascontiguousarray(words.T)


def top_k(
    query_emb: Float[np.ndarray, "Q E"], corpus: Any, k: int
) -> tuple[Float[np.ndarray, "Q K"], Int[np.ndarray, "Q K"]]:
    """`search.top_k`; of an index by signs the nearest of those that differ in the fewest bits, which is not exact."""
    if not isinstance(corpus, Index) or corpus.dtype != "binary":
        return search.top_k(query_emb, corpus, k)
    k = min(k, len(corpus))
    candidates = fewest_bits(as_words(signs(query_emb)), corpus.words, min(max(WIDENED * k, LEAST), len(corpus)))
    used, place = np.unique(candidates, return_inverse=True)
    scores = np.einsum("QE,QcE->Qc", query_emb, corpus.rows(used)[place.reshape(candidates.shape)])
    order = np.lexsort((candidates, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(candidates, order, axis=1).astype(np.int32)


def fewest_bits(
    queries: UInt64[np.ndarray, "W Q"], corpus: UInt64[np.ndarray, "W M"], k: int
) -> Int[np.ndarray, "Q K"]:
    """The k rows of the corpus that differ from each query in the fewest bits, in their order; of equals the first."""
    found = []
    for query in queries.T:
        distance = np.zeros(corpus.shape[1], np.uint16)
        for word, others in zip(query, corpus, strict=True):
            distance += np.bitwise_count(word ^ others)
        nearer = np.cumsum(np.bincount(distance))  # how many differ in so many bits at most
        last = np.searchsorted(nearer, k)
        chosen, equal = np.flatnonzero(distance < last), np.flatnonzero(distance == last)
        found.append(np.sort(np.concatenate([chosen, equal[: k - len(chosen)]])))
    return np.stack(found)


def passages_key(tokens: segments.Ragged) -> str:
    """Of what the retriever reads: texts, prefix, tokenizer and cut."""
    digest = hashlib.blake2b(digest_size=8)
    for array in (tokens.tokens, tokens.starts):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def retriever_key(model: rag.Rag, params: dict) -> str:
    """Of all the retriever's parameters, to the bit and wherever they lie, and of how it pools and computes."""
    parts: dict[str, Any] = model.embedding | {"dtype": str(np.dtype(model.dtype))}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params["retriever"]):
        name = jax.tree_util.keystr(path)
        parts[name] = [list(leaf.shape), *map(int, jax.device_get(_sums(leaf)))]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()


@jax.jit
def _sums(leaf: Shaped[Array, "..."]) -> Shaped[Array, " 2"]:
    """Two sums modulo 2^32 of all entries' bits, each place with a factor of its own; exact on any mesh."""
    is_whole = jnp.issubdtype(leaf.dtype, jnp.integer)  # codes, of a base in fewer bits
    bits = leaf.astype(jnp.uint32) if is_whole else jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    factors = (place * np.uint32(2654435761) + 1, (place ^ place >> 15) * np.uint32(2246822519) + 3)
    return jnp.stack([jnp.sum(bits * (factor | 1), dtype=jnp.uint32) for factor in factors])


def _check_or_begin(folder: pathlib.Path, facts: dict[str, Any]) -> None:
    path = folder / "index.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} holds something that is not an index; give another folder") from None
        files.write_json(path, facts)
        return
    except ValueError:
        before = {}
    differs = [name for name in facts if before.get(name) != facts[name]]
    if differs:
        shown = "; ".join(f"its {name} is {before.get(name)}, not {facts[name]}" for name in differs)
        raise UserError(f"{folder} holds another index: {shown}; give another folder, or move that one away")


def _path(folder: pathlib.Path, kind: str, shard: int) -> pathlib.Path:
    return folder / f"{kind}_{shard:05}.npy"


def _width(model: rag.Rag, params: dict) -> int:
    """E, from shapes alone."""

    def embed(params: dict, ids: Int[Array, "B L"]) -> Float[Array, "B E"]:
        return rag.encode(model.model("retriever", params), ids, ids > 0, **model.embedding)

    return jax.eval_shape(embed, params, jax.ShapeDtypeStruct((1, 1), jnp.int32)).shape[1]


def _is_complete(folder: pathlib.Path, shard: int, dtype: str, shape: tuple[int, int]) -> bool:
    """Whether a shard's files are there, with the shapes and number types that they must have."""
    expected: dict[str, tuple[tuple[int, ...], str]] = {"shard": (shape, STORED[dtype])}
    if dtype in SCALED:
        expected["scale"] = (shape[:1], "float32")
    if dtype == "binary":
        expected["bits"] = ((shape[0], -(-shape[1] // 8)), "uint8")
    try:
        there = {kind: np.load(_path(folder, kind, shard), mmap_mode="r") for kind in expected}
    except (OSError, ValueError):
        return False
    return all((file.shape, file.dtype.name) == expected[kind] for kind, file in there.items())


def _save(path: pathlib.Path, array: np.ndarray) -> None:
    with files.file_at_once(path, sync=True) as file:
        np.save(file, array)
