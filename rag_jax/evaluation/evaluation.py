"""Evaluation: retrieval over all passages, answers with what is retrieved, and the record of it.

**Q** queries, **M** passages of the corpus, **K** candidates (retrieved passages that the generator reads).
"""

import collections
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from rag_jax import data, files, losses, rag
from rag_jax.data import segments
from rag_jax.distributed import sharding
from rag_jax.evaluation import metrics
from rag_jax.inference import decoding, disk_index, evidence, likelihood, programs, search
from rag_jax.progress import Counter

# The sample of rows is the same for every run on the same file, whatever the run's own seed.
SAMPLE_SEED = 0

DEFINITIONS = {
    "relevant": "to a query are the passages of all rows with its text; retrieved are those of highest cosine, of all "
    "passages; means are over rows",
    **metrics.definitions(),
    "eval/..._dimW": "the same by the first W channels of embeddings alone",
    "intervals": "95 %, percentile bootstrap over rows, 1,000 resamples",
}
# What is measured at each of `retriever.matryoshka_dims` too.
AT_WIDTHS = ("recall@1", "recall@10", "mrr@10", "ndcg@10")
# Of the retrieved passages in the file of rows, and characters of each.
SHOWN, EXCERPT = 10, 160
# Rows whose query and passage are shown on a plane.
ON_PLANE = 400


@dataclasses.dataclass(frozen=True)
class EvalRows:
    """Tokenised rows and corpus, made once and used at every evaluation. The rows' passages lead the corpus."""

    examples: data.Examples
    empty_prefix: data.Ragged | None  # of the prompt without a passage: one
    sample: np.ndarray  # (Q,) rows of the examples that are evaluated
    num_scored: int  # how many of the sample, from its start, have the likelihood of their answers measured
    num_answers: int  # how many are answered for EM and F1
    answer_len: int  # tokens of such an answer at most, end-of-sequence included: as many as training reads
    batch_size: int
    tokenizer: Any  # the generator's
    metric: str  # what the best step is chosen by

    @property
    def gold(self) -> np.ndarray:
        """Index (Q,) of each sampled row's own passage, -1 where it is not known."""
        return self.examples.passage_key[self.sample]

    @property
    def passages(self) -> tuple[str, ...]:
        """M distinct texts."""
        return self.examples.passages

    def counts(self) -> dict[str, int]:
        answers = self.examples.answers
        scored = self.sample[: self.num_scored]
        tokens = {} if answers is None else {"answer_tokens": int(answers.lengths[scored].sum())}
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
    source, columns, section = config.data.eval, data.columns_of(config.data, "data.eval"), config.eval
    if columns["answer"] is None:  # nothing that a generator could be measured by
        prompt = None
    corpus = () if config.data.passages is None else (("data.passages", config.data.passages),)
    examples, report = data.load_examples(
        source,
        key="data.eval",
        columns=columns,
        bad_rows=config.data.bad_rows,
        retriever=retriever,
        prompt=prompt,
        # A row that is dropped for its answer still has a passage to be found or confused.
        gaps=data.Gaps(
            passage=retriever is not None and bool(corpus),
            corpus=corpus,
            columns=data.columns_of(config.data, "data.passages"),
            always=True,
        ),
        layout="columns" if config.data.format == "columns" else "auto",  # a layout's name is that of data.train
    )
    empty_prefix = None
    if prompt is not None:
        (empty_prefix, _), _ = data.prompt_segments(prompt, [""], [])
    order = np.random.default_rng(SAMPLE_SEED).permutation(len(examples))
    sample = order[: section.rows or None]
    rows = EvalRows(
        examples=examples,
        empty_prefix=empty_prefix,
        sample=sample,
        num_scored=min(section.likelihoods or len(sample), len(sample)),
        num_answers=min(section.answers, len(sample)) if prompt is not None else 0,
        answer_len=prompt.answer_len if prompt is not None else 0,
        batch_size=min(section.batch_size, len(sample)),
        tokenizer=None if prompt is None else prompt.tokenizer,
        metric=section.metric,
    )
    return rows, report


@dataclasses.dataclass(frozen=True)
class Result:
    """All metrics, by their names in the record, their intervals, and what became of each sampled row."""

    metrics: dict[str, float]
    intervals: dict[str, list[float]]
    by_row: list[dict[str, Any]]


def evaluate(
    model: rag.Rag, params: dict, rows: EvalRows, index_folder: pathlib.Path | None = None, rerank: int = 0
) -> Result:
    """Retrieve, score the answers, answer. What `params` lacks is left out.

    The passages' embeddings are in memory, or on disk in `index_folder`, where those that are there already are used.
    Without a retriever the generator reads each row's own passage, and there are no metrics of ranking; without a
    generator (or any answer token) there are no metrics of answers. `rerank`: so many of the passages that were
    retrieved are put in the order of log p(question | passage) first.
    """
    columns: dict[str, metrics.Column] = {}
    cosine = retrieved = hits = answers = shares = plane = None
    if "retriever" in params:
        query_emb, corpus = embedded(model, params, rows, index_folder)
        cosine, retrieved = search.top_k(query_emb, corpus, most(model, rerank))
        if rerank:
            cosine, retrieved = reranked(model, params, rows, cosine, retrieved, rerank)
        examples = rows.examples
        hits, num_relevant = metrics.relevant_hits(retrieved, examples.right_key[examples.query_key[rows.sample]])
        if num_relevant.any():
            is_known = (num_relevant > 0).astype(np.float64)
            columns |= {name: (values, is_known) for name, values in metrics.ranking(hits, num_relevant).items()}
            for width in model.matryoshka_dims:
                columns |= at_width(model, rows, query_emb, corpus, width, is_known)
        columns |= found_in(rows, retrieved)
        plane = projected(query_emb, corpus, rows.gold)
    if "generator" in params:
        K = model.objective.candidates
        candidates = rows.gold[:, None] if retrieved is None else retrieved[:, :K]
        weights = np.zeros(candidates.shape, np.float32) if cosine is None else cosine[:, :K]
        n = rows.num_scored
        scored = dataclasses.replace(rows, sample=rows.sample[:n])
        retrieves = retrieved is not None
        nlls, shares = answer_nll(model, params, scored, candidates[:n], weights[:n], retrieves=retrieves)
        columns |= nlls
        if rows.num_answers:
            answers = greedy_answers(model, params, rows, candidates, weights)
            columns |= answer_metrics(rows, answers)
    values, intervals = metrics.summarise({f"eval/{name}": column for name, column in columns.items()})
    return Result(values, intervals, by_row(rows, columns, cosine, retrieved, hits, answers, shares, plane))


def most(model: rag.Rag, at_least: int = 0) -> int:
    """So many passages of a query as metrics or the generator need."""
    return max(metrics.DEPTH, model.objective.candidates, at_least)


def embedded(
    model: rag.Rag, params: dict, rows: EvalRows, index_folder: pathlib.Path | None = None
) -> tuple[Float[np.ndarray, "Q E"], Any]:
    """The sampled queries' embeddings, and the corpus' in memory or on disk."""
    queries, passages = rows.examples.retriever_queries, rows.examples.retriever_passages
    assert queries is not None and passages is not None
    keys, query = np.unique(rows.examples.query_key[rows.sample], return_inverse=True)
    embed = functools.partial(search.embed, model, params, batch_size=rows.batch_size)
    query_emb = embed(queries.take(keys), label="queries")[query]
    if index_folder is None:
        return query_emb, embed(passages, label="passages")
    return query_emb, disk_index.build(index_folder, model, params, passages, batch_size=rows.batch_size)


def projected(
    query_emb: Float[np.ndarray, "Q E"], corpus: Any, gold: Int[np.ndarray, " Q"]
) -> Float[np.ndarray, "n 4"] | None:
    """Queries and the passages of their rows on the plane on which they spread most: x and y of both.

    Of the first rows only. Each evaluation has a plane of its own, turned as it comes.
    """
    if not (gold >= 0).any():
        return None
    used, place = np.unique(np.maximum(gold[:ON_PLANE], 0), return_inverse=True)
    passages = corpus.rows(used) if isinstance(corpus, disk_index.Index) else corpus[used]
    both = np.stack([query_emb[:ON_PLANE], passages[place]], axis=1)  # (n, 2, E)
    known = both[gold[:ON_PLANE] >= 0].reshape(-1, both.shape[2]).astype(np.float64)
    centre = known.mean(axis=0)
    _, axes = np.linalg.eigh((known - centre).T @ (known - centre))
    return ((both - centre) @ axes[:, :-3:-1]).reshape(len(both), 4).astype(np.float32)


def at_width(
    model: rag.Rag,
    rows: EvalRows,
    query_emb: Float[np.ndarray, "Q E"],
    corpus: Any,
    width: int,
    is_known: Float[np.ndarray, " Q"],
) -> dict[str, metrics.Column]:
    """What retrieval by the first `width` channels gives."""
    unit, examples = model.similarity == "cosine", rows.examples
    queries = np.asarray(rag.leading(jnp.asarray(query_emb), width, model.similarity))
    _, retrieved = search.top_k(queries, search.Leading(corpus, width, unit), most(model))
    found = metrics.ranking(*metrics.relevant_hits(retrieved, examples.right_key[examples.query_key[rows.sample]]))
    return {f"{name}_dim{width}": (values, is_known) for name, values in found.items() if name in AT_WIDTHS}


def reranked(
    model: rag.Rag,
    params: dict,
    rows: EvalRows,
    cosine: Float[np.ndarray, "Q K"],
    retrieved: Int[np.ndarray, "Q K"],
    num: int,
) -> tuple[Float[np.ndarray, "Q K"], Int[np.ndarray, "Q K"]]:
    """Both, the first `num` of each query in the order in which the generator finds the question likely behind them."""
    prefixes, queries = rows.examples.prefixes, rows.examples.prompt_queries
    assert prefixes is not None and queries is not None
    asked, at_a_time = queries.take(rows.examples.query_key[rows.sample]), rows.batch_size * model.objective.candidates
    order = evidence.by_question(model, params, prefixes, asked, retrieved[:, :num], at_a_time)
    first = (np.take_along_axis(a[:, :num], order, axis=1) for a in (cosine, retrieved))
    cosine, retrieved = (
        np.concatenate([a, b[:, num:]], axis=1) for a, b in zip(first, (cosine, retrieved), strict=True)
    )
    return cosine, retrieved


def found_in(rows: EvalRows, retrieved: Int[np.ndarray, "Q K"]) -> dict[str, metrics.Column]:
    """Whether what was retrieved holds the answer's text, or is of the document it stands in: no label is asked."""
    examples, sample, columns = rows.examples, rows.sample, {}
    top = retrieved[:, : max(metrics.CUTOFFS)]
    documents = examples.document_key[sample]
    if (documents >= 0).any():
        hits, known = examples.is_within(documents[:, None], top), (documents >= 0).astype(np.float64)
        columns |= {name: (values, known) for name, values in metrics.found("document", hits).items()}
    accepted = [[metrics.dpr_tokens(text) for text in accepted_answers(examples.rows, row)] for row in sample]
    if any(any(answers) for answers in accepted):
        tokens = {key: metrics.dpr_tokens(examples.passages[key]) for key in np.unique(top)}
        hits = np.array(
            [
                [any(metrics.holds(tokens[key], answer) for answer in answers) for key in of]
                for of, answers in zip(top, accepted, strict=True)
            ]
        )
        known = np.array([float(any(answers)) for answers in accepted])
        columns |= {name: (values, known) for name, values in metrics.found("answer", hits).items()}
    return columns


def sharing_batches(candidates: Int[np.ndarray, "Q K"], batch_size: int) -> list[Int[np.ndarray, " b"]]:
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
    """A batch of fixed shapes for the generator: B rows, of d devices in turn, and P passages for each device."""

    rows: np.ndarray  # (B,) positions in the sample
    real: np.ndarray  # (B,) bool; the others are filling
    prefix: tuple[np.ndarray, np.ndarray]  # ids, mask (d P, Lp)
    candidates: np.ndarray  # (B, K) into the device's prefixes


def prompt_batches(rows: EvalRows, candidates: Int[np.ndarray, "Q K"], num_devices: int) -> Iterator[Prompts]:
    """The generator's batches over `candidates`, one row for each sampled row from the first on."""
    prefixes = rows.examples.prefixes
    assert prefixes is not None
    (num_rows, K), lengths = candidates.shape, prefixes.lengths
    size = -(-min(rows.batch_size, num_rows) // num_devices)
    longest = segments.padded_length(lengths[candidates], int(lengths.max()))
    # Rows that share nothing meet rows of like length, so that short batches are padded to less.
    order = np.argsort(-lengths[candidates].max(axis=1), kind="stable")
    parts = [order[part] for part in sharing_batches(candidates[order], size)]
    for start in range(0, len(parts), num_devices):
        own = parts[start : start + num_devices]
        filled = np.full((num_devices, size), own[0][0])
        real = np.zeros(filled.shape, bool)
        for device, part in enumerate(own):
            filled[device, : len(part)], real[device, : len(part)] = part, True
        distinct = [np.unique(candidates[part], return_inverse=True) for part in filled]
        most = search.size_for(max(len(passages) for passages, _ in distinct), size * K, steps=2)
        which = np.concatenate([passages[np.arange(most) % len(passages)] for passages, _ in distinct])
        local = np.concatenate([place.reshape(size, K) for _, place in distinct]).astype(np.int32)
        prefix = segments.pad(prefixes, which, search.size_for(int(lengths[which].max()), longest, steps=2))
        yield Prompts(filled.ravel(), real.ravel(), prefix, local)


_log_marginal = jax.jit(losses.log_marginal, static_argnums=0)
_evidence = jax.jit(losses.evidence, static_argnums=0)


def answer_nll(
    model: rag.Rag,
    params: dict,
    rows: EvalRows,
    candidates: Int[np.ndarray, "Q K"],
    cosine: Float[np.ndarray, "Q K"],
    *,
    retrieves: bool,
) -> tuple[dict[str, metrics.Column], Float[np.ndarray, "Q K"]]:
    """NLL of the sampled rows' answers, nats and answer tokens of each: marginal and with single passages.

    Beside them, each candidate's share of the evidence for the row's answer. The marginal is over the candidates.
    Besides them are read no passage and, where the candidates are what a retriever found (`retrieves`), the own one of
    each row whose passage is known.
    """
    examples, sample = rows.examples, rows.sample
    queries, answers = examples.prompt_queries, examples.answers
    assert queries is not None and answers is not None and examples.prefixes is not None
    assert rows.empty_prefix is not None
    prefixes, K = data.joined(examples.prefixes, rows.empty_prefix), candidates.shape[1]
    none, is_known = np.full(len(candidates), len(examples.prefixes)), rows.gold >= 0
    with_gold = retrieves and bool(is_known.any())
    read = np.stack([*candidates.T, none, *([np.where(is_known, rows.gold, none)] if with_gold else [])], axis=1)
    row = np.arange(len(read))[:, None]
    distinct, pair = np.unique(row * len(prefixes) + read, return_inverse=True)
    reader, prefix = np.divmod(distinct, len(prefixes))
    pairs = likelihood.Pairs(prefixes, queries, answers, prefix, examples.query_key[sample[reader]], sample[reader])
    with Counter("likelihood of answers", len(pairs), active=jax.process_index() == 0) as counter:
        by_pair = likelihood.answer_log_probs(model, params, pairs, at_a_time=rows.batch_size * K, counter=counter)
    token_log_probs = by_pair[pair.reshape(read.shape)]
    lengths = answers.lengths[sample]
    mask = np.arange(token_log_probs.shape[2]) < lengths[:, None]
    doc_log_probs = model.objective.doc_log_probs(cosine)
    marginal = -np.asarray(
        _log_marginal(model.objective.formula.likelihood, doc_log_probs, token_log_probs[:, :K], mask), np.float64
    )
    each = -token_log_probs.sum(axis=2, dtype=np.float64)
    nlls = {"answer_nll": marginal, "answer_nll_none": each[:, K], "retrieval_utility": marginal - each[:, K]}
    if retrieves:
        nlls["answer_nll_top1"] = each[:, 0]
    columns = {name: (nll, lengths.astype(np.float64)) for name, nll in nlls.items()}
    if with_gold:
        columns["answer_nll_gold"] = (each[:, K + 1] * is_known, lengths * is_known)
    shares = _evidence(model.objective.formula.likelihood, doc_log_probs, token_log_probs[:, :K], mask)
    return columns, np.asarray(shares)


def greedy_answers(
    model: rag.Rag,
    params: dict,
    rows: EvalRows,
    candidates: Int[np.ndarray, "Q K"],
    cosine: Float[np.ndarray, "Q K"],
) -> list[str]:
    """Greedy RAG-Token answers to the first `rows.num_answers` sampled rows, of `rows.answer_len` tokens at most.

    Not of as many as the longest gold answer has: what is to be found out must not say where to stop.
    """
    examples, num_answers = rows.examples, rows.num_answers
    queries = examples.prompt_queries
    assert queries is not None
    query_len = segments.padded_length(queries.lengths, data.longest(examples).suffix)
    texts, places = [""] * num_answers, programs.placement(params, "generator")
    weights = model.objective.doc_log_probs(cosine)
    eos_id = segments.eos_id(rows.tokenizer)
    with Counter("answers", num_answers, active=jax.process_index() == 0) as counter:
        for batch in prompt_batches(rows, candidates[:num_answers], places.shards):
            query = segments.pad(queries, examples.query_key[rows.sample[batch.rows]], query_len)
            ids = decoding.answer_ids(
                model, params, batch.prefix, query, batch.candidates, np.asarray(weights)[batch.rows],
                num_tokens=rows.answer_len, eos_id=eos_id,
            )  # fmt: skip
            for row, answer in zip(batch.rows[batch.real], sharding.to_host(ids)[batch.real], strict=True):
                texts[row] = decoding.text(rows.tokenizer, answer)
            counter.update(int(batch.real.sum()))
    return texts


def accepted_answers(rows: data.Rows, row: int | np.integer) -> list[str]:
    """The right answers of a row, the one that is trained on first."""
    return rows.accepted[row] if rows.accepted and rows.accepted[row] else [rows.answers[row]]


def answer_metrics(rows: EvalRows, generated: list[str]) -> dict[str, metrics.Column]:
    gold = [accepted_answers(rows.examples.rows, row) for row in rows.sample[: len(generated)]]
    ones = np.ones(len(generated))
    return {name: (values, ones) for name, values in metrics.answers(generated, gold).items()}


def by_row(
    rows: EvalRows,
    columns: dict[str, metrics.Column],
    cosine: np.ndarray | None,
    retrieved: np.ndarray | None,
    hits: np.ndarray | None,
    answers: list[str] | None,
    shares: np.ndarray | None = None,
    plane: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """One flat record a sampled row, to read and to sort: its texts, its metrics, what was retrieved and answered."""
    texts, found = rows.examples.rows, []
    for i, row in enumerate(rows.sample):
        own = {
            name: values[i] / divisors[i]
            for name, (values, divisors) in columns.items()
            if i < len(values) and divisors[i]
        }
        line = {"row": int(row), "query": texts.queries[row]}
        if rows.examples.prefixes is not None:
            line["answer"] = texts.answers[row]
            if len(also := accepted_answers(texts, row)[1:]):
                line["also_accepted"] = also
        if answers is not None and i < len(answers):
            line["generated"] = answers[i]
        line |= {name: round(float(value), 6) for name, value in own.items()}
        if (gold := rows.examples.passage_key[row]) >= 0:
            line["gold"] = rows.passages[gold][:EXCERPT]
        if plane is not None and i < len(plane) and gold >= 0:
            line["plane"] = [round(float(value), 4) for value in plane[i]]
        if cosine is not None and retrieved is not None and hits is not None:
            line["retrieved"] = [
                {"score": round(float(c), 6), "relevant": bool(hit), "passage": rows.passages[p][:EXCERPT]}
                for c, hit, p in zip(cosine[i, :SHOWN], hits[i, :SHOWN], retrieved[i, :SHOWN], strict=True)
            ]
            for entry, share in zip(
                line["retrieved"], () if shares is None or i >= len(shares) else shares[i], strict=False
            ):
                if np.isfinite(share):  # not of an answer without tokens
                    entry["evidence"] = round(float(share), 4)
        found.append(line)
    return found


def record(result: Result, rows: EvalRows, model: rag.Rag, step: int, rerank: int = 0) -> dict[str, Any]:
    """What `eval/step_N.json` and `--json` hold: metrics by name, what they were counted over and what they mean."""
    counts = rows.counts() | {"candidates": min(model.objective.candidates, len(rows.passages))}
    if rerank:
        counts["reranked"] = min(rerank, len(rows.passages))
    best_by = {} if rows.metric == "auto" else {"best_by": f"eval/{rows.metric}"}
    return {
        "step": step, **result.metrics, **best_by, "intervals": result.intervals, "counts": counts,
        "definitions": DEFINITIONS,
    }  # fmt: skip


def write_record(workdir: pathlib.Path, content: dict[str, Any], by_row: list[dict[str, Any]]) -> pathlib.Path:
    """`workdir/eval/step_N.json` and, before it, `step_N.rows.jsonl`, each whole or not at all."""
    path = workdir / "eval" / f"step_{content['step']}.json"
    lines = (json.dumps(line, ensure_ascii=False) for line in by_row)
    # Texts may hold halves of surrogate pairs.
    files.write_whole(path.with_suffix(".rows.jsonl"), "".join(f"{line}\n" for line in lines), errors="replace")
    files.write_json(path, content)
    return path
