"""A corpus' embeddings on disk: made once, shard by shard, searched block by block; memory holds one of them.

    FOLDER/index.json                what was embedded by what, and in which form
    FOLDER/shard_00000.npy ...       embeddings (SHARD_ROWS, E) in float32, bfloat16 or int8, the last one shorter
    FOLDER/scale_00000.npy ...       int8 only: what a row's scores are to be multiplied with

**M** passages, **E** embedding width.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from rag_jax import files, rag
from rag_jax.data import segments
from rag_jax.distributed import processes
from rag_jax.errors import UserError
from rag_jax.inference import search

# Number types and how files hold them: numpy's format does not know bfloat16.
STORED = {"float32": "float32", "bfloat16": "uint16", "int8": "int8"}
SHARD_ROWS = 2**16


@dataclasses.dataclass(frozen=True)
class Index:
    """An index whose shards are all there. `block` is what `search.top_k` asks for."""

    folder: pathlib.Path
    dtype: str
    num_passages: int
    shard_rows: int

    def __len__(self) -> int:
        return self.num_passages

    def block(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Embeddings of passages start .. stop - 1 (stop - start, E), and the factors of their scores if not 1."""
        values, scales = [], []
        for shard in range(start // self.shard_rows, -(-stop // self.shard_rows)):
            first = shard * self.shard_rows
            inside = slice(max(start - first, 0), stop - first)
            part = np.load(self.folder / f"shard_{shard:05}.npy", mmap_mode="r")[inside]
            values.append(np.asarray(part).view(ml_dtypes.bfloat16) if self.dtype == "bfloat16" else part)
            if self.dtype == "int8":
                scales.append(np.load(self.folder / f"scale_{shard:05}.npy")[inside])
        return np.concatenate(values), np.concatenate(scales) if scales else None


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
            _save(_path(path, "shard", shard), stored.view(STORED[dtype]))
    with processes.all_or_none():  # the last shard is there for all
        return index


def compress(emb: Float[np.ndarray, "n E"], dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows in a smaller number type, and for int8 the factor (n,) of each: its largest entry becomes 127."""
    if dtype != "int8":
        return emb.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype), None
    scale = np.maximum(np.abs(emb).max(axis=1), np.finfo(np.float32).tiny) / 127
    return np.rint(emb / scale[:, None]).astype(np.int8), scale.astype(np.float32)


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
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
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
    if dtype == "int8":
        expected["scale"] = (shape[:1], "float32")
    try:
        there = {kind: np.load(_path(folder, kind, shard), mmap_mode="r") for kind in expected}
    except (OSError, ValueError):
        return False
    return all((file.shape, file.dtype.name) == expected[kind] for kind, file in there.items())


def _save(path: pathlib.Path, array: np.ndarray) -> None:
    with files.file_at_once(path, sync=True) as file:
        np.save(file, array)
