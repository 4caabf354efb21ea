"""What smaller embeddings cost: int8 and signs beside float32, ours and faiss', on real passages and on random vectors.

    pip install faiss-cpu
    python -m benchmarks.small_index --model=quickstart/models/minilm --rows=ROWS.csv
    python -m benchmarks.small_index --passages=1000000

Recall is the share of float32's k nearest that are found. Random vectors are the hardest case: none is much nearer than
another, and no two entries say the same. Seconds are of one search by all queries, the second time.
"""

import argparse
import csv
import json
import pathlib
import tempfile
import time

import numpy as np

from benchmarks.search import normalised
from rag_jax import config, data, pair
from rag_jax.inference import disk_index, search

K = 10
WIDENED = (10, 40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/minilm_smollm2.py")
    parser.add_argument("--model", type=pathlib.Path, help="with --rows: their passages by this retriever")
    parser.add_argument("--rows", type=pathlib.Path, help="a CSV file")
    parser.add_argument("--columns", nargs=2, default=["Question", "Abstract"], help="of questions and of passages")
    parser.add_argument("--passages", type=int, default=1_000_000, help="of random ones")
    parser.add_argument("--queries", type=int, default=100, help="of random ones")
    parser.add_argument("--width", type=int, default=384, help="of random ones")
    args = parser.parse_args()
    if args.rows is None:
        rng = np.random.default_rng(0)
        queries, corpus = (normalised(rng, number, args.width) for number in (args.queries, args.passages))
        print(f"{args.queries:,} queries, {args.passages:,} random vectors of width {args.width}, k = {K}")
    else:
        queries, corpus = embedded(args)
        size = f"{args.model.name} of width {corpus.shape[1]}, k = {K}"
        print(f"{len(queries):,} questions, {len(corpus):,} passages, {size}")
    exact = search.top_k(queries, corpus, K)[1]
    print(f"{'':<34}{'recall@10':>10}{'bytes a passage':>18}{'seconds':>10}")
    for name, size, find in sides(corpus):
        find(queries)
        began = time.perf_counter()
        found = find(queries)
        seconds = time.perf_counter() - began
        recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), exact.tolist(), strict=True)])
        print(f"{name:<34}{recall:>10.4f}{size:>18,.0f}{seconds:>10.3f}", flush=True)


def embedded(args: argparse.Namespace):
    """Questions and distinct passages of the rows, 256 tokens of each."""
    csv.field_size_limit(2**31 - 1)
    with args.rows.open(newline="", encoding="utf-8") as file:
        rows = [tuple(row[column] for column in args.columns) for row in csv.DictReader(file)]
    values = {"generator.path": "None", "objective.name": "none", "retriever.path": str(args.model)}
    values |= {"data.passage_len": "256", "data.query_len": "256"}
    opened = pair.open_pair(config.load(args.config, values))
    params = pair.pretrained_params(opened)
    text, found = opened.retriever_text, []
    assert text is not None
    for column, prefix in zip(zip(*rows, strict=True), (text.query_prefix, text.passage_prefix), strict=True):
        tokens, _ = data.retriever_tokens(text.tokenizer, list(dict.fromkeys(column)), prefix, 256)
        found.append(search.embed(opened.model, params, tokens, batch_size=64, label="texts"))
    return found


def sides(corpus: np.ndarray):
    """(name, bytes of a passage, search) of each."""
    import faiss

    num_passages, width = corpus.shape
    yield "float32, ours", 4 * width, lambda queries: search.top_k(queries, corpus, K)[1]
    flat = faiss.IndexFlatIP(width)
    flat.add(corpus)
    yield "float32, faiss", 4 * width, lambda queries: flat.search(queries, K)[1]
    with tempfile.TemporaryDirectory() as folder:
        index = as_index(pathlib.Path(folder), corpus, "int8")
        yield "int8, ours", width + 4, lambda queries: disk_index.top_k(queries, index, K)[1]
    codes = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    codes.train(corpus)
    codes.add(corpus)
    yield "int8, faiss", width, lambda queries: codes.search(queries, K)[1]
    with tempfile.TemporaryDirectory() as folder:
        index = as_index(pathlib.Path(folder), corpus, "binary")
        disk_index_widened = disk_index.WIDENED
        for times in WIDENED:
            disk_index.WIDENED = times
            name = f"signs, best {times * K} by int8, ours"
            yield name, width / 8, lambda queries: disk_index.top_k(queries, index, K)[1]
        disk_index.WIDENED = disk_index_widened
    bits = faiss.IndexBinaryFlat(width)
    bits.add(disk_index.signs(corpus))
    yield "signs alone, faiss", width / 8, lambda queries: bits.search(disk_index.signs(queries), K)[1]


def as_index(folder: pathlib.Path, emb: np.ndarray, dtype: str) -> disk_index.Index:
    """An index of given embeddings."""
    for shard, start in enumerate(range(0, len(emb), disk_index.SHARD_ROWS)):
        part = emb[start : start + disk_index.SHARD_ROWS]
        values, scale = disk_index.compress(part, dtype)
        np.save(folder / f"shard_{shard:05}.npy", values)
        np.save(folder / f"scale_{shard:05}.npy", scale)
        if dtype == "binary":
            np.save(folder / f"bits_{shard:05}.npy", disk_index.signs(part))
    facts = {"dtype": dtype, "number of passages": len(emb), "rows of a shard": disk_index.SHARD_ROWS}
    (folder / "index.json").write_text(json.dumps(facts))
    return disk_index.opened(folder)


if __name__ == "__main__":
    main()
