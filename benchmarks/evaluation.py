"""Evaluation of held-out rows, ours beside a straightforward PyTorch script: retrieval and answer NLL over K passages.

    python -m benchmarks.evaluation --rows=HELD_OUT.csv --models=quickstart/models [--queries=160] [--theirs=160]

The other side embeds all passages and queries with `transformers` in batches of similar length, takes the K nearest of
each query, and runs one full sequence for each pair of query and passage, --theirs-batch queries at a time. Ours does
more: it also reads each row's own passage and no passage. Both must find the same metrics. As the other side takes an
hour for all queries, --theirs lets it read answers of some: that part of its time counts as often as there are more.
"""

import argparse
import pathlib
import time

import numpy as np
import torch
import transformers

from rag_jax import cli, config, pair
from rag_jax.evaluation import evaluation

ROOT = pathlib.Path(__file__).parent.parent
NLL = "eval/answer_nll"


def main() -> None:
    cli.quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", required=True, help="a CSV with Question, Abstract, Answer")
    parser.add_argument("--models", type=pathlib.Path, required=True, help="a folder with minilm and smollm2-135m")
    parser.add_argument("--queries", type=int, default=0, help="how many are evaluated; 0: all")
    parser.add_argument("--theirs", type=int, default=160, help="of how many PyTorch reads the answers; 0: of all")
    parser.add_argument("--theirs-batch", type=int, default=1, help="queries whose sequences PyTorch runs at a time")
    parser.add_argument("--candidates", type=int, default=4)
    args = parser.parse_args()
    values = {
        "data.train": None,
        "data.eval": args.rows,
        "data.passages": None,
        "data.query_len": 64,
        "data.passage_len": 256,
        "data.prompt_passage_len": 256,
        "data.prompt_query_len": 64,
        "data.answer_len": 64,
        "eval.rows": args.queries,
        "eval.answers": 0,
        "eval.batch_size": 16,
        "group_size": 8,
        "batch_size": 8,
        "objective.candidates": args.candidates,
        "retriever.path": str(args.models / "minilm"),
        "generator.path": str(args.models / "smollm2-135m"),
    }
    opened = pair.open_pair(config.load(ROOT / "configs" / "quickstart.py", values))
    rows, _ = evaluation.load_rows(opened.config, opened.retriever_text, opened.prompt)
    params = pair.pretrained_params(opened)
    found, seconds = {}, {}
    shared = min(args.theirs or len(rows.sample), len(rows.sample))
    began = time.perf_counter()
    result = evaluation.evaluate(opened.model, params, rows)
    seconds["ours, compiling included"] = time.perf_counter() - began
    # Of the answers that both read.
    tokens = rows.examples.answers.lengths[rows.sample[:shared]]
    nll = np.array([line["answer_nll"] for line in result.by_row[:shared]])
    found["ours, compiling included"] = result.metrics | {NLL: nll @ tokens / tokens.sum()}
    began = time.perf_counter()
    found["PyTorch"], reading = by_torch(opened, rows, shared, args.theirs_batch)
    seconds["PyTorch"] = time.perf_counter() - began + reading * (len(rows.sample) / shared - 1)
    metrics = ("eval/recall@1", "eval/recall@10", "eval/mrr@10", NLL)
    print(
        f"{len(rows.sample):,} queries, {len(rows.passages):,} passages, K = {args.candidates}; PyTorch read {shared:,}"
    )
    print(f"{'':<26}{'seconds':>10}{'times as fast':>15}" + "".join(f"{m.removeprefix('eval/'):>13}" for m in metrics))
    for name in found:
        values = "".join(f"{found[name][metric]:>13.5f}" for metric in metrics)
        print(f"{name:<26}{seconds[name]:>10.1f}{seconds['PyTorch'] / seconds[name]:>15.2f}{values}")


@torch.inference_mode()
def by_torch(opened, rows, num_read, num_together) -> tuple[dict[str, float], float]:
    """The metrics, answers' of the first `num_read` queries, and the seconds that these took."""
    folders = {role: source.folder for role, source in opened.sources.items()}
    encoder = transformers.AutoModel.from_pretrained(folders["retriever"], dtype=torch.float32).eval()
    generator = transformers.AutoModelForCausalLM.from_pretrained(folders["generator"], dtype=torch.float32).eval()
    examples, objective, batch_size = rows.examples, opened.config.objective, rows.batch_size

    def embed(texts) -> torch.Tensor:
        order = np.argsort(-texts.lengths, kind="stable")
        found = []
        for start in range(0, len(order), batch_size):
            ids, mask = padded([texts[i] for i in order[start : start + batch_size]])
            hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            found.append(torch.nn.functional.normalize(mean, dim=-1))
        return torch.cat(found)[np.argsort(order)]

    keys = examples.query_key[rows.sample]
    cosine = embed(examples.retriever_queries.take(keys)) @ embed(rows.retriever_passages).T
    score, retrieved = cosine.topk(10, dim=1)
    hit = retrieved.numpy() == rows.gold[:, None]
    metrics = {"eval/recall@1": hit[:, 0].mean(), "eval/recall@10": hit.any(axis=1).mean()}
    metrics["eval/mrr@10"] = np.where(hit.any(axis=1), 1 / (1 + hit.argmax(axis=1)), 0.0).mean()
    K, nll, tokens = objective.candidates, 0.0, 0
    began = time.perf_counter()
    for start in range(0, num_read, num_together):
        batch = range(start, min(start + num_together, num_read))
        answers = [examples.answers[rows.sample[i]] for i in batch]
        heads = [[*rows.prefixes[p], *examples.prompt_queries[keys[i]]] for i in batch for p in retrieved[i, :K]]
        strings = [[*head, *answers[n // K]] for n, head in enumerate(heads)]
        ids, mask = padded(strings)
        log_probs = torch.log_softmax(generator(input_ids=ids, attention_mask=mask).logits, dim=-1)
        prior = torch.log_softmax(score[start : start + len(batch), :K] / objective.marginal_temperature, dim=1)
        for n, answer in enumerate(answers):
            of_each = [
                log_probs[s, len(heads[s]) - 1 : len(strings[s]) - 1].gather(1, torch.tensor(answer)[:, None].long())
                for s in range(n * K, (n + 1) * K)
            ]
            nll -= float(torch.logsumexp(prior[n][:, None] + torch.stack(of_each)[:, :, 0], dim=0).sum())
            tokens += len(answer)
    return metrics | {NLL: nll / tokens}, time.perf_counter() - began


def padded(rows) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(np.asarray(row)).long() for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


if __name__ == "__main__":
    main()
