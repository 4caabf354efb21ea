"""Evaluate: retrieval over all passages, answers with what is retrieved, of a run or of models as they come.

    python -m rag_jax.evaluate --workdir=DIR [--step=N|best|latest]
    python -m rag_jax.evaluate --config=FILE.py

**R** queries, **M** passages of the corpus, **K** candidates (retrieved passages that the generator reads).
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import pathlib
import re
import string
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from rag_jax import checkpoint, cli, config, data, generate, losses, rag, retrieval, sharding
from rag_jax.data import segments
from rag_jax.errors import UserError

# The sample of rows is the same for every run on the same file, whatever the run's own seed.
SAMPLE_SEED = 0

DEFINITIONS = {
    "eval/recall@k": "share of queries whose own passage is among the k of highest cosine, of all passages",
    "eval/mrr@10": "mean of 1 / rank of the own passage, 0 beyond rank 10",
    "eval/ndcg@10": "mean of 1 / log2(1 + rank) of the own passage, 0 beyond rank 10",
    "eval/answer_nll": "nats per answer token, end-of-sequence included: negative log marginal over the K passages of "
    "highest cosine, their weights softmax(cosine / marginal_temperature); without a retriever the own passage alone",
    "eval/em": "share of greedy RAG-Token answers equal to the row's answer after SQuAD normalisation",
    "eval/f1": "mean F1 of the words of greedy answer and row's answer after SQuAD normalisation",
}


@dataclasses.dataclass(frozen=True)
class EvalRows:
    """Tokenised rows and corpus, made once and used at every evaluation. The rows' passages lead the corpus."""

    examples: data.Examples
    passages: tuple[str, ...]  # M distinct texts
    retriever_passages: data.Ragged | None  # one a passage
    prefixes: data.Ragged | None  # one a passage
    sample: np.ndarray  # (R,) rows of the examples that are evaluated
    num_answers: int  # how many of the sample, from its start, are answered for EM and F1
    batch_size: int
    tokenizer: Any  # the generator's

    @property
    def gold(self) -> np.ndarray:
        """Index (R,) of each sampled row's own passage."""
        return self.examples.passage_key[self.sample]

    def counts(self) -> dict[str, int]:
        answers = self.examples.answers
        tokens = {} if answers is None else {"answer_tokens": int(answers.lengths[self.sample].sum())}
        return {
            "rows": len(self.examples),
            "queries": len(self.sample),
            "passages": len(self.passages),
            "answers": self.num_answers,
        } | tokens


def load_rows(
    config: Any, retriever: data.RetrieverText | None, prompt: data.Prompt | None
) -> tuple[EvalRows, data.Report]:
    """The rows of `data.eval`; all its passages, and those of `data.passages` where given."""
    source, columns, section = config.data.eval, config.data.columns.to_dict(), config.eval
    examples, report = data.load_examples(
        source, key="data.eval", columns=columns, bad_rows=config.data.bad_rows, retriever=retriever, prompt=prompt
    )
    # A row that is dropped for its answer still has a passage to be found or confused.
    corpus = dict.fromkeys([*examples.passages, *data.read_passages(source, columns["passage"], "data.eval")])
    if config.data.passages is not None:
        corpus |= dict.fromkeys(data.read_passages(config.data.passages, columns["passage"], "data.passages"))
    passages = tuple(corpus)
    others = passages[len(examples.passages) :]
    retriever_passages = prefixes = None
    if retriever is not None:
        more, _ = segments.retriever_tokens(
            retriever.tokenizer, others, retriever.passage_prefix, retriever.passage_len
        )
        retriever_passages = _joined(examples.retriever_passages, more)
    if prompt is not None:
        (more, _), _ = data.prompt_segments(prompt, others, [])
        prefixes = _joined(examples.prefixes, more)
    order = np.random.default_rng(SAMPLE_SEED).permutation(len(examples))
    sample = order[: section.rows or None]
    rows = EvalRows(
        examples=examples,
        passages=passages,
        retriever_passages=retriever_passages,
        prefixes=prefixes,
        sample=sample,
        num_answers=min(section.answers, len(sample)) if prompt is not None else 0,
        batch_size=min(section.batch_size, len(sample)),
        tokenizer=None if prompt is None else prompt.tokenizer,
    )
    return rows, report


def _joined(first: Any, second: data.Ragged) -> data.Ragged:
    starts = np.concatenate([first.starts, second.starts[1:] + first.starts[-1]])
    return data.Ragged(np.concatenate([first.tokens, second.tokens]), starts)


def evaluate(model: rag.Rag, params: dict, rows: EvalRows) -> dict[str, float]:
    """All metrics, by their names in the record. What `params` lacks is left out.

    Without a retriever the generator reads each row's own passage, and there are no metrics of ranking; without a
    generator (or any answer token) there are no metrics of answers.
    """
    metrics: dict[str, float] = {}
    if "retriever" in params:
        cosine, retrieved = retrieve(model, params, rows)
        metrics |= retrieval.ranking_metrics(retrieval.gold_rank(retrieved, rows.gold))
        K = model.objective.candidates
        cosine, candidates = cosine[:, :K], retrieved[:, :K]
    else:
        candidates = rows.gold[:, None]
        cosine = np.zeros(candidates.shape, np.float32)
    if "generator" in params:
        metrics["eval/answer_nll"] = answer_nll(model, params, rows, candidates, cosine)
        if rows.num_answers:
            metrics |= answer_metrics(rows, greedy_answers(model, params, rows, candidates, cosine))
    return metrics


def retrieve(model: rag.Rag, params: dict, rows: EvalRows) -> tuple[Float[np.ndarray, "R K"], Int[np.ndarray, "R K"]]:
    """Cosines and indices of the passages nearest to each sampled query, as many as ranking or generator need."""
    queries, passages = rows.examples.retriever_queries, rows.retriever_passages
    assert queries is not None and passages is not None
    keys, query = np.unique(rows.examples.query_key[rows.sample], return_inverse=True)
    embed = functools.partial(retrieval.embed, model, params, batch_size=rows.batch_size)
    query_emb = embed(queries.take(keys), label="queries")[query]
    passage_emb = embed(passages, label="passages")
    return retrieval.top_k(query_emb, passage_emb, max(retrieval.DEPTH, model.objective.candidates))


def sharing_batches(candidates: Int[np.ndarray, "R K"], batch_size: int) -> list[Int[np.ndarray, " b"]]:
    """All rows in batches, each row joining the batch that it shares most passages with; the last may be short.

    A batch runs each of its distinct passages once, so the fewer there are the less there is to do.
    """
    readers: dict[int, list[int]] = collections.defaultdict(list)
    for row, passages in enumerate(candidates.tolist()):
        for passage in passages:
            readers[passage].append(row)
    free = np.ones(len(candidates), bool)
    batches = []
    while free.any():
        shared, inside, batch = np.zeros(len(candidates), np.int64), set(), []
        while len(batch) < batch_size and free.any():
            row = int(np.argmax(np.where(free, shared, -1)))
            free[row] = False
            batch.append(row)
            for passage in set(candidates[row].tolist()) - inside:
                inside.add(passage)
                shared[readers[passage]] += 1
        batches.append(np.array(batch))
    return batches


@dataclasses.dataclass(frozen=True)
class Prompts:
    """One batch for the generator, of fixed shapes: the batch's distinct passages, and which of them each row reads."""

    rows: np.ndarray  # (B,) positions in the sample; the last ones may be filling
    real: int  # how many are not
    prefix: tuple[np.ndarray, np.ndarray]  # ids, mask (P, Lp)
    candidates: np.ndarray  # (B, K) into the prefixes


def prompt_batches(rows: EvalRows, candidates: Int[np.ndarray, "R K"], label: str) -> Iterator[Prompts]:
    """The generator's batches over `candidates`, one row for each sampled row from the first on."""
    prefixes = rows.prefixes
    assert prefixes is not None
    (num_rows, K), lengths = candidates.shape, prefixes.lengths
    batch_size = min(rows.batch_size, num_rows)
    longest = segments.padded_length(lengths[candidates], int(lengths.max()))
    # Rows that share nothing meet rows of like length, so that short batches are padded to less.
    order = np.argsort(-lengths[candidates].max(axis=1), kind="stable")
    for batch in tqdm(
        sharing_batches(candidates[order], batch_size), desc=label, leave=False, mininterval=1.0, disable=None
    ):
        filled = order[np.concatenate([batch, np.repeat(batch[:1], batch_size - len(batch))])]
        distinct, local = np.unique(candidates[filled], return_inverse=True)
        num_prefixes = retrieval.size_for(len(distinct), batch_size * K, steps=2)
        which = np.concatenate([distinct, np.repeat(distinct[:1], num_prefixes - len(distinct))])
        prefix = segments.pad(prefixes, which, retrieval.size_for(int(lengths[distinct].max()), longest, steps=2))
        yield Prompts(filled, len(batch), prefix, local.reshape(batch_size, K).astype(np.int32))


@functools.partial(jax.jit, static_argnums=0)
def _batch_nll(
    model: rag.Rag, params: dict, prompts: Any, suffix: Any, answer: Any, cosine: Float[Array, "B K"]
) -> Float[Array, ""]:
    (prefix, candidates), (answer_start, answer_mask) = prompts, answer
    generator = model.model("generator", params)
    hidden = generator.prefix_suffix(prefix, suffix, candidates)
    token_log_probs = rag.answer_log_probs(generator, hidden, suffix[0], answer_start, answer_mask.shape[1])
    doc_log_probs = losses.doc_log_probs(cosine / model.objective.marginal_temperature)
    return losses.marginal_nll(model.objective.name, doc_log_probs, token_log_probs, answer_mask)


def answer_nll(
    model: rag.Rag,
    params: dict,
    rows: EvalRows,
    candidates: Int[np.ndarray, "R K"],
    cosine: Float[np.ndarray, "R K"],
) -> float:
    """Negative log marginal of the sampled rows' answers given their candidates, nats per answer token.

    The marginal is RAG-Sequence for the objective "sequence" and RAG-Token for every other.
    """
    examples = rows.examples
    queries, answers = examples.prompt_queries, examples.answers
    assert queries is not None and answers is not None
    answer_lengths = answers.lengths[rows.sample]
    suffix_lengths = queries.lengths[examples.query_key[rows.sample]] + answer_lengths
    suffix_len, num_tokens = (segments.round_up(int(a.max())) for a in (suffix_lengths, answer_lengths))
    parts = []
    for batch in prompt_batches(rows, candidates, "answer likelihood"):
        row = rows.sample[batch.rows]
        query = examples.query_key[row]
        suffix = segments.join_padded((queries, answers), (query, row), suffix_len)
        answer_mask = np.arange(num_tokens) < answers.lengths[row][:, None]
        answer_mask[batch.real :] = False
        answer = (queries.lengths[query].astype(np.int32), answer_mask)
        parts.append(_batch_nll(model, params, (batch.prefix, batch.candidates), suffix, answer, cosine[batch.rows]))
    return float(np.sum(np.asarray(parts, np.float64))) / int(answer_lengths.sum())


def greedy_answers(
    model: rag.Rag,
    params: dict,
    rows: EvalRows,
    candidates: Int[np.ndarray, "R K"],
    cosine: Float[np.ndarray, "R K"],
) -> list[str]:
    """Greedy RAG-Token answers to the first `rows.num_answers` sampled rows, at most as long as answers in training."""
    examples, num_answers = rows.examples, rows.num_answers
    queries = examples.prompt_queries
    assert queries is not None
    shape = data.longest(examples)
    query_len = segments.padded_length(queries.lengths, shape.suffix)
    texts = [""] * num_answers
    for batch in prompt_batches(rows, candidates[:num_answers], "answers"):
        query = segments.pad(queries, examples.query_key[rows.sample[batch.rows]], query_len)
        doc_log_probs = losses.doc_log_probs(
            jax.numpy.asarray(cosine[batch.rows]) / model.objective.marginal_temperature
        )
        ids = generate.answer_ids(
            model,
            params,
            batch.prefix,
            query,
            batch.candidates,
            doc_log_probs,
            num_tokens=shape.answer,
            eos_id=segments.eos_id(rows.tokenizer),
        )
        for row, answer in zip(batch.rows[: batch.real], sharding.to_host(ids), strict=False):
            texts[row] = generate.text(rows.tokenizer, answer)
    return texts


def answer_metrics(rows: EvalRows, answers: list[str]) -> dict[str, float]:
    gold = [rows.examples.rows.answers[row] for row in rows.sample[: len(answers)]]
    pairs = list(zip(answers, gold, strict=True))
    return {
        "eval/em": float(np.mean([exact_match(a, g) for a, g in pairs])),
        "eval/f1": float(np.mean([f1(a, g) for a, g in pairs])),
    }


def normalise(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al., 2016): lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, gold: str) -> float:
    return float(normalise(answer) == normalise(gold))


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words, counted with repetition; of two empty answers 1."""
    ours, theirs = normalise(answer).split(), normalise(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = (collections.Counter(ours) & collections.Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def record(metrics: dict[str, float], rows: EvalRows, model: rag.Rag, step: int) -> dict[str, Any]:
    """What `eval/step_N.json` and `--json` hold: metrics by name, what they were counted over and what they mean."""
    counts = rows.counts() | {"candidates": min(model.objective.candidates, len(rows.passages))}
    return {"step": step, **metrics, "counts": counts, "definitions": DEFINITIONS}


def write_record(workdir: pathlib.Path, content: dict[str, Any]) -> pathlib.Path:
    """`workdir/eval/step_N.json`, whole or not at all."""
    path = workdir / "eval" / f"step_{content['step']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def table(content: dict[str, Any]) -> str:
    counts = content["counts"]
    over = f"{counts['queries']:,} queries, {counts['passages']:,} passages, K = {counts['candidates']}"
    lines = [f"step {content['step']}: {over}, {counts['answers']:,} answers"]
    return "\n".join(lines + [f"  {name:<18}{value:>10.4f}" for name, value in content.items() if name[:5] == "eval/"])


def chosen_config(args: argparse.Namespace, overrides: dict[str, str]) -> Any:
    if args.workdir is not None and args.config is None:
        return config.load_workdir(args.workdir, overrides)
    if args.config is None or args.workdir is not None:
        raise UserError("give either --workdir=DIR (a run) or --config=FILE.py (the untrained models)")
    if args.step is not None:
        raise UserError(f"--step={args.step}: goes with --workdir; the models of --config are untrained")
    return config.load(args.config, overrides)


def main() -> None:
    flags = cli.parser("evaluate", __doc__)
    flags.add_argument("--workdir", type=pathlib.Path, metavar="DIR", help="a run, with the config saved in it")
    flags.add_argument("--step", metavar="N|best|latest", help="which of its checkpoints; the latest if not given")
    flags.add_argument("--config", metavar="FILE.py", help="the models that a config names, untrained")
    flags.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args, overrides = cli.parse(flags)
    loaded = chosen_config(args, overrides)
    config.require(loaded, "data.eval")

    from rag_jax import run

    run.keep_compiled()
    opened = run.open_run(loaded, args.workdir)
    rows, report = load_rows(loaded, opened.retriever_text, opened.prompt)
    if not args.json:
        print(f"{loaded.data.eval}: {report}", flush=True)
    if args.workdir is None:
        step, params = 0, run.pretrained_params(opened)
    else:
        with checkpoint.Checkpoints(args.workdir) as checkpoints:
            step = checkpoints.find(args.step)
            params = checkpoints.restore({"params": run.abstract_params(opened)}, step)["params"]
    content = record(evaluate(opened.model, params, rows), rows, opened.model, step)
    if args.workdir is not None:
        write_record(args.workdir, content)
    print(json.dumps(content, ensure_ascii=False) if args.json else table(content))


if __name__ == "__main__":
    cli.run(main)
