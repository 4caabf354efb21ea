"""Exact search of the nearest passages: ours beside faiss' IndexFlatIP, on the same random embeddings.

    pip install faiss-cpu
    python -m benchmarks.search [--passages=1000000] [--queries=1000] [--width=384] [--k=100]

Each side runs in a process of its own, one after the other, round by round; medians over all rounds.
"""

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measured(args)))
        return
    found: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side, results in found.items():
            command = [sys.executable, "-m", "benchmarks.search", *sys.argv[1:], f"--side={side}"]
            process = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            results.append(json.loads(process.stdout.splitlines()[-1]))
    print(table(args, found))


def measured(args: argparse.Namespace) -> dict:
    """Seconds of the first search and of the second, peak memory of the process, and a digest of what was found."""
    rng = np.random.default_rng(SEED)
    queries, corpus = (normalised(rng, number, args.width) for number in (args.queries, args.passages))
    search, seconds = SIDES[args.side](corpus), []
    del corpus
    for _ in range(2):
        began = time.perf_counter()
        score, index = search(queries, args.k)
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sums = [float(np.sum(score, dtype=np.float64)), int(np.sum(index, dtype=np.int64))]
    return {"first": seconds[0], "second": seconds[1], "peak": peak, "sums": sums}


def normalised(rng: np.random.Generator, number: int, width: int) -> np.ndarray:
    emb = rng.standard_normal((number, width), np.float32)
    for start in range(0, number, 2**16):
        block = emb[start : start + 2**16]
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return emb


def ours(corpus: np.ndarray):
    from rag_jax.inference import search

    return lambda queries, k: search.top_k(queries, corpus, k)


def faiss_flat(corpus: np.ndarray):
    import faiss

    index = faiss.IndexFlatIP(corpus.shape[1])
    index.add(corpus)
    return index.search


SIDES = {"ours": ours, "faiss": faiss_flat}


def table(args: argparse.Namespace, found: dict[str, list[dict]]) -> str:
    lines = [
        f"{args.queries:,} queries, {args.passages:,} passages of width {args.width}, k = {args.k}; medians of "
        f"{args.rounds} rounds",
        f"{'':<36}" + "".join(f"{side:>12}" for side in found) + f"{'ours/faiss':>12}",
    ]
    names = {
        "first": ("seconds of the first search", 1.0),
        "second": ("seconds of the second", 1.0),
        "peak": ("peak memory of the process, GB", 1e-9),
    }
    for key, (name, scale) in names.items():
        values = [statistics.median(result[key] for result in results) * scale for results in found.values()]
        lines.append(f"{name:<36}" + "".join(f"{value:>12.3f}" for value in values) + f"{values[0] / values[1]:>12.2f}")
    (score, index), (their_score, their_index) = (results[0]["sums"] for results in found.values())
    same = "the same" if index == their_index else "others"
    lines.append(f"passages found: {same}; scores differ by {abs(score / their_score - 1):.1e} in sum")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
