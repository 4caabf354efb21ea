"""A retriever here and in sentence-transformers: the same embeddings, and the same retrieval by them?

    python -m benchmarks.encoders --model=quickstart/models/minilm --rows=EVAL.csv

The rows' questions ask for their passages, of all distinct ones of the file. Both sides embed what the other embeds and
take turns; sentence-transformers' own evaluator measures its side.
"""

import argparse
import csv
import pathlib
import time

import numpy as np

from rag_jax import config, data, pair
from rag_jax.evaluation import metrics
from rag_jax.inference import search

VALUES = {"generator.path": "None", "objective.name": "none"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/minilm_smollm2.py")
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--rows", type=pathlib.Path, required=True, help="a CSV file")
    parser.add_argument("--columns", nargs=2, default=["Question", "Abstract"], help="of questions and of passages")
    parser.add_argument("--most", type=int, default=0, help="rows; 0: all")
    parser.add_argument("--tokens", type=int, default=256, help="that are read of a text")
    args = parser.parse_args()
    csv.field_size_limit(2**31 - 1)
    with args.rows.open(newline="", encoding="utf-8") as file:
        rows = [tuple(row[column] for column in args.columns) for row in csv.DictReader(file)]
    rows = rows[: args.most or None]
    questions, passages = (list(dict.fromkeys(column)) for column in zip(*rows, strict=True))
    right: dict[str, set[int]] = {}
    for question, passage in rows:
        right.setdefault(question, set()).add(passages.index(passage))
    seconds, ours = timed(lambda: embedded(args, questions, passages))
    print(f"ours                   {seconds:6.1f} s, compiling included")
    seconds, (theirs, measured) = timed(lambda: of_sentence_transformers(args, questions, passages, right))
    print(f"sentence-transformers  {seconds:6.1f} s, its evaluator included")
    apart = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    print(f"{len(questions):,} questions, {len(passages):,} passages; largest difference of a channel {apart:.1e}")
    _, retrieved = search.top_k(*ours, metrics.DEPTH)
    keys = np.full((len(questions), max(map(len, right.values()))), -1)
    for i, question in enumerate(questions):
        keys[i, : len(right[question])] = sorted(right[question])
    found = metrics.ranking(*metrics.relevant_hits(retrieved, keys))
    print(f"{'':<12}{'ours':>10}{'theirs':>10}")
    for name, their_name in (("recall@1", "recall@1"), ("recall@10", "recall@10"), ("mrr@10", "mrr@10")):
        value = next(value for key, value in measured.items() if key.endswith(their_name))
        print(f"{name:<12}{found[name].mean():>10.5f}{value:>10.5f}")


def timed(fn):
    start = time.perf_counter()
    result = fn()
    return time.perf_counter() - start, result


def embedded(args: argparse.Namespace, questions: list[str], passages: list[str]) -> tuple[np.ndarray, np.ndarray]:
    opened = pair.open_pair(config.load(args.config, VALUES | {"retriever.path": str(args.model)}))
    params, text = pair.pretrained_params(opened), opened.retriever_text
    assert text is not None
    parts = []
    for texts, prefix in ((questions, text.query_prefix), (passages, text.passage_prefix)):
        tokens, _ = data.retriever_tokens(text.tokenizer, texts, prefix, args.tokens)
        parts.append(search.embed(opened.model, params, tokens, batch_size=16, label="texts"))
    return parts[0], parts[1]


def of_sentence_transformers(
    args: argparse.Namespace, questions: list[str], passages: list[str], right: dict[str, set[int]]
) -> tuple[tuple[np.ndarray, np.ndarray], dict[str, float]]:
    import sentence_transformers
    from sentence_transformers.evaluation import InformationRetrievalEvaluator

    model = sentence_transformers.SentenceTransformer(str(args.model), device="cpu")
    model.max_seq_length = args.tokens
    evaluator = InformationRetrievalEvaluator(
        {str(i): question for i, question in enumerate(questions)},
        {str(i): passage for i, passage in enumerate(passages)},
        {str(i): {str(key) for key in right[question]} for i, question in enumerate(questions)},
        precision_recall_at_k=[1, 10],
        mrr_at_k=[10],
        batch_size=16,
        main_score_function=model.similarity_fn_name,
    )
    own = model.encode(questions, batch_size=16), model.encode(passages, batch_size=16)
    return own, {key: value for key, value in evaluator(model).items() if str(model.similarity_fn_name) in key}


if __name__ == "__main__":
    main()
