"""Index: the passages' embeddings, made once and kept, to ask from or to search elsewhere.

    python -m rag_jax.index --workdir=DIR --out=INDEX [--passages=FILE] [--dtype=float32|bfloat16|int8|binary]
    python -m rag_jax.index --index=INDEX --out=OUT --format=parquet|faiss

INDEX holds the passages and their embeddings in shards, which `rag_jax.ask --index=INDEX` searches; stopped, the
command goes on where it was. The second line copies one for other programs, without any model: OUT/passages.parquet has
the embeddings beside the texts; OUT/index.faiss is what `faiss.read_index` (`read_index_binary` of signs) opens, in the
order of OUT/passages.parquet.
"""

import argparse
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rag_jax import cli, files
from rag_jax.errors import UserError

if TYPE_CHECKING:
    from rag_jax.inference.disk_index import Index

FORMATS = ("parquet", "faiss")
DTYPES = ("float32", "bfloat16", "int8", "binary")
# Passages that are converted at a time.
ROWS = 2**14


def main() -> None:
    flags = cli.parser("index", __doc__)
    cli.add_choice_of_models(flags)
    flags.add_argument("--out", required=True, type=cli.path, metavar="OUT", help="a folder")
    flags.add_argument("--passages", metavar="FILE", help="by the config's column of passages; the run's if not given")
    flags.add_argument("--dtype", choices=DTYPES, help="of the numbers, float32 if not given; binary: signs, and int8")
    flags.add_argument("--index", type=cli.path, metavar="INDEX", help="one that is there, to copy in another form")
    flags.add_argument("--format", choices=FORMATS, help="of the copy")
    args, overrides = cli.parse(flags)
    if (args.index is None) != (args.format is None):
        raise UserError("--index=INDEX and --format=parquet|faiss go together: the copy of an index in another form")
    if args.index is not None:
        copy(args)
        return
    loaded = cli.chosen_config(args, overrides)
    if loaded.retriever.path is None:
        raise UserError("retriever.path=None: there is no retriever to embed passages")
    passages, sources = cli.corpus(args.passages, loaded)
    index = build(args, loaded, passages, sources)
    print(f"{args.out}: {len(index):,} passages, {index.dtype}, {size_of(args.out)}")


def build(args: argparse.Namespace, loaded: Any, passages: Sequence[str], sources: dict[str, str]) -> "Index":
    from rag_jax import pair
    from rag_jax.distributed import compile_cache
    from rag_jax.inference.trained import Trained
    from rag_jax.training import setup

    compile_cache.keep_compiled()
    opened = pair.open_pair(loaded, args.workdir)
    if args.workdir is None:
        trained = Trained(opened, pair.pretrained_params(opened), 0)
    else:
        step, params = setup.saved_params(opened, args.workdir, args.step)
        trained = Trained(opened, params, step)
    return trained.index(passages, args.out, args.dtype or "float32", sources)


def copy(args: argparse.Namespace) -> None:
    """Another form of an index, in a folder that appears when it is complete."""
    from rag_jax.inference import disk_index

    for name in ("workdir", "config", "models", "step", "passages", "dtype"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name}: says what is embedded, and --index={args.index} is there already; leave it out")
    cli.check_out(args.out)
    index = disk_index.opened(args.index)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with files.folder_at_once(args.out.resolve()) as made:
        if args.format == "parquet":
            write_parquet(index, made / disk_index.PASSAGES)
        else:
            write_faiss(index, made / "index.faiss")
            pq.write_table(pq.read_table(args.index / disk_index.PASSAGES), made / disk_index.PASSAGES)
    print(f"{args.out}: {len(index):,} passages, {index.dtype}, {size_of(args.out)}")


def blocks(index: "Index") -> Iterator[tuple[slice, np.ndarray, np.ndarray | None]]:
    for start in range(0, len(index), ROWS):
        stop = min(start + ROWS, len(index))
        yield slice(start, stop), *index.block(start, stop)


def write_parquet(index: "Index", path: pathlib.Path) -> None:
    """Texts and `embedding`; of int8 also `scale`, of binary `bits` besides. bfloat16 is written as float32."""
    from rag_jax.inference import disk_index

    texts = pq.read_table(index.folder / disk_index.PASSAGES)
    writer = None
    for rows, values, scale in blocks(index):
        table = texts.slice(rows.start, rows.stop - rows.start)
        values = values if scale is not None else values.astype(np.float32)
        flat = pa.array(np.ascontiguousarray(values).ravel())
        table = table.append_column("embedding", pa.FixedSizeListArray.from_arrays(flat, values.shape[1]))
        if scale is not None:
            table = table.append_column("scale", pa.array(scale))
        if index.dtype == "binary":
            bits = index.bits[rows]
            kept = pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(bits.shape[1]), len(bits), [None, pa.py_buffer(np.ascontiguousarray(bits))]
            )
            table = table.append_column("bits", kept)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def write_faiss(index: "Index", path: pathlib.Path) -> None:
    """IndexFlatIP of float32 and bfloat16; of int8 codes of eight bits; of binary IndexBinaryFlat of the signs."""
    try:
        import faiss
    except ImportError:
        raise UserError("--format=faiss: takes the package faiss-cpu; pip install 'rag_jax[faiss]'") from None
    width = index.block(0, 1)[0].shape[1]
    if index.dtype == "binary":
        made: Any = faiss.IndexBinaryFlat(-(-width // 8) * 8)
        for rows, _, _ in blocks(index):
            made.add(np.ascontiguousarray(index.bits[rows]))
        faiss.write_index_binary(made, str(path))
        return
    if index.dtype == "int8":
        made = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        made.train(np.concatenate([as_float(values, scale) for _, values, scale in blocks(index)]))
    else:
        made = faiss.IndexFlatIP(width)
    for _, values, scale in blocks(index):
        made.add(as_float(values, scale))
    faiss.write_index(made, str(path))


def as_float(values: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    floats = values.astype(np.float32)
    return floats if scale is None else floats * scale[:, None]


def size_of(folder: pathlib.Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.iterdir()) / 1e6:,.1f} MB"


if __name__ == "__main__":
    cli.run(main)
