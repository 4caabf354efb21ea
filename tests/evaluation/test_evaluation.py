"""Evaluation against one string at a time: no shared prefix, no cache, no batch, sums by hand."""

import csv
import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_helpers import BOS, EOS, byte_tokenizer, word_tokenizer
from flax import nnx
from ml_collections import ConfigDict

from rag_jax import data, evaluate, models, progress, rag
from rag_jax.distributed import sharding
from rag_jax.evaluation import evaluation, metrics
from rag_jax.inference import search

WORDS = "who ate the red fish bird cat dog ran sang under a blue tree moon old king".split()
ROWS = [
    ("who ate the fish", "the cat ate the red fish", "the cat"),
    ("who sang", "a blue bird sang under the moon", "a bird"),
    ("who ran", "the old dog ran", "dog"),
    ("who ate", "the cat ate the red fish", "cat"),
    ("the old king", "the king sang", "sang"),
    ("the moon", "a blue bird sang under the moon", "blue"),
    ("the tree", "the old tree", "old"),
]
EXTRA = ["the red moon", "the cat ate the red fish", "a king ran under the tree"]
MARGINAL_TEMPERATURE = 0.3
BERT = models.BertConfig(len(WORDS) + 3, 2, 2, 16, 32, 64, 2, 1e-12, "gelu", 0.0, 0.0)
GPT2 = models.Gpt2Config(258, 2, 2, 16, 32, 96, 1e-5, "gelu_tanh", 0.0, 0.0, 0.0)


def write_csv(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    write_csv(folder / "rows.csv", ("Q", "P", "A"), ROWS)
    write_csv(folder / "extra.csv", ("P",), [(p,) for p in EXTRA])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAG_JAX_CACHE", str(folder / "cache"))
        yield folder


def config(folder, *, passages=True, num_rows=0, answers=0):
    return ConfigDict(
        {
            "data": {
                "eval": str(folder / "rows.csv"),
                "passages": str(folder / "extra.csv") if passages else None,
                "columns": {"query": "Q", "passage": "P", "answer": "A"},
                "eval_columns": {},
                "passages_columns": {},
                "format": "auto",
                "bad_rows": "drop",
            },
            "eval": {"rows": num_rows, "likelihoods": 0, "answers": answers, "batch_size": 3, "metric": "auto"},
        }
    )


RETRIEVER = data.RetrieverText(word_tokenizer(WORDS), "who ", "a ", 8, 10)
PROMPT = data.Prompt(byte_tokenizer(), "P:{passage}", " Q:{query} A:", "{answer}", 24, 30, 10)


@functools.cache
def weights():
    modules = {"retriever": models.Bert(BERT, rngs=nnx.Rngs(0)), "generator": models.Gpt2(GPT2, rngs=nnx.Rngs(1))}
    split = {role: nnx.split(module) for role, module in modules.items()}
    params = {role: nnx.to_pure_dict(state) for role, (_, state) in split.items()}
    params = jax.tree.map(lambda a: a * 3 if a.ndim > 1 else a, params)  # livelier than at random
    return params, split["retriever"][0], split["generator"][0]


def build(objective="token", candidates=3):
    params, *graphs = weights()
    section = rag.Objective(objective, candidates, 0.05, MARGINAL_TEMPERATURE, 1.0, 1.0)
    model = rag.Rag(section, *graphs, "mean", 1)
    return model, params


@functools.cache
def reference_encoder():
    params, graphdef, _ = weights()
    return jax.jit(nnx.merge(graphdef, params["retriever"]).__call__)


def reference_cosines(queries, passages):
    """Every text alone through the encoder."""
    forward = reference_encoder()

    def embed(text):
        ids = RETRIEVER.tokenizer(text)["input_ids"]
        padded = jnp.asarray([ids + [0] * (12 - len(ids))])
        hidden = np.asarray(forward(padded, jnp.arange(12)[None] < len(ids)), np.float64)[0, : len(ids)].mean(axis=0)
        return hidden / np.linalg.norm(hidden)

    return np.array([embed("who " + q) for q in queries]) @ np.array([embed("a " + p) for p in passages]).T


def reference_strings(query, passage, answer):
    """Prompt and answer ids, written from what the byte tokenizer is: one token a byte, the passage cut at 23."""
    passage = ("P:" + passage)[:23]
    return [BOS, *passage.encode(), *f" Q:{query} A:".encode()], [*answer.encode(), EOS]


@functools.cache
def reference_forward():
    params, _, graphdef = weights()
    generator = nnx.merge(graphdef, params["generator"])

    @jax.jit
    def log_probs(ids):
        return jax.nn.log_softmax(generator.logits(generator(ids[None], jnp.ones((1, 96), bool))[0]))

    return lambda ids: np.asarray(log_probs(jnp.asarray(ids + [0] * (96 - len(ids)))), np.float64)


def reference_nll(objective, forward, rows, cosine, passages, K):
    total, count = 0.0, 0
    for (query, _, answer), scores in zip(rows, cosine, strict=True):
        top = np.argsort(-scores, kind="stable")[:K]
        weights = np.exp(scores[top] / MARGINAL_TEMPERATURE)
        weights /= weights.sum()
        tokens = []
        for passage in top:
            prompt, answer_ids = reference_strings(query, passages[passage], answer)
            log_probs = forward(prompt + answer_ids)
            tokens.append([log_probs[len(prompt) + t - 1, token] for t, token in enumerate(answer_ids)])
        probs = np.exp(np.array(tokens))  # (K, T)
        total -= np.log(weights @ probs).sum() if objective != "sequence" else np.log(weights @ probs.prod(axis=1))
        count += probs.shape[1]
    return total / count


@pytest.mark.parametrize("objective", ["token", "sequence", "dalm"])
def test_metrics_are_those_of_one_string_at_a_time(folder, objective):
    model, params = build(objective)
    rows, report = evaluation.load_rows(config(folder, num_rows=5), RETRIEVER, PROMPT)
    assert (report.rows, len(rows.passages), len(rows.sample)) == (7, 7, 5)
    found = evaluation.evaluate(model, params, rows).metrics

    passages = list(dict.fromkeys([p for _, p, _ in ROWS] + EXTRA))
    sampled = [ROWS[i] for i in rows.sample]
    cosine = reference_cosines([q for q, _, _ in sampled], passages)
    rank = [1 + int((row > row[passages.index(p)]).sum()) for row, (_, p, _) in zip(cosine, sampled, strict=True)]
    assert len(set(rank)) > 2
    for k in (1, 5, 10):
        assert found[f"eval/recall@{k}"] == pytest.approx(np.mean([r <= k for r in rank]))
    assert found["eval/mrr@10"] == pytest.approx(np.mean([1 / r for r in rank]))
    assert found["eval/ndcg@10"] == pytest.approx(np.mean([1 / np.log2(1 + r) for r in rank]))
    expected = reference_nll(objective, reference_forward(), sampled, cosine, passages, 3)
    assert found["eval/answer_nll"] == pytest.approx(expected, rel=1e-5)
    assert "eval/em" not in found
    # One passage: the nearest, the own one, and an empty one.
    own = np.array([np.array(passages) == p for _, p, _ in sampled])
    for name, scores, texts in (
        ("top1", cosine, passages), ("gold", own * 1.0, passages), ("none", np.zeros((5, 1)), [""]),
    ):  # fmt: skip
        expected = reference_nll(objective, reference_forward(), sampled, scores, texts, 1)
        assert found[f"eval/answer_nll_{name}"] == pytest.approx(expected, rel=1e-5), name
    utility = found["eval/answer_nll"] - found["eval/answer_nll_none"]
    assert found["eval/retrieval_utility"] == pytest.approx(utility, abs=1e-9)


def test_all_passages_of_a_query_are_relevant_and_rows_tell_their_own(folder, tmp_path):
    """Two rows ask the same: either passage is right, wherever they stand in the file."""
    model, params = build()
    changed = config(folder, answers=3)
    more = [*ROWS, ("who sang", "the king sang", "king")]
    changed.data.eval = write_csv(tmp_path / "rows.csv", ("Q", "P", "A"), more)
    rows, _ = evaluation.load_rows(changed, RETRIEVER, PROMPT)
    result = evaluation.evaluate(model, params, rows)
    assert [line["row"] for line in result.by_row] == rows.sample.tolist()
    passages = list(dict.fromkeys([p for _, p, _ in more] + EXTRA))
    cosine = reference_cosines(["who sang"], passages)[0]
    best = min(1 + int((cosine > cosine[passages.index(p)]).sum()) for p in (ROWS[1][1], "the king sang"))
    both = [line for line in result.by_row if line["query"] == "who sang"]
    assert [line["answer"] for line in both] in (["a bird", "king"], ["king", "a bird"])
    for line in both:
        assert line["mrr@10"] == pytest.approx(1 / best, abs=1e-6)
        assert (line["recall@10"], line["precision@10"]) == (1, pytest.approx(2 / len(passages), abs=1e-6))
        assert sorted(hit["passage"] for hit in line["retrieved"] if hit["relevant"]) == sorted(
            [ROWS[1][1], "the king sang"]
        )
        assert [hit["score"] for hit in line["retrieved"]] == pytest.approx(sorted(cosine, reverse=True), abs=1e-5)
        shares = [hit["evidence"] for hit in line["retrieved"] if "evidence" in hit]
        assert len(shares) == 3 and sum(shares) == pytest.approx(1, abs=1e-3) and "plane" in line
    tokens = np.array([len(line["answer"]) + 1 for line in result.by_row])
    by_hand = np.array([line["answer_nll"] for line in result.by_row]) @ tokens / tokens.sum()
    assert result.metrics["eval/answer_nll"] == pytest.approx(by_hand, abs=1e-5)
    assert ["generated" in line for line in result.by_row] == [True] * 3 + [False] * 5
    assert set(result.intervals) == set(result.metrics)
    assert all(low <= result.metrics[name] + 1e-12 and result.metrics[name] <= high + 1e-12
               for name, (low, high) in result.intervals.items())  # fmt: skip


def test_the_likelihood_of_some_rows_is_that_of_those_rows(folder):
    """Retrieval is measured on all rows, whatever the generator reads."""
    model, params = build()
    changed = config(folder, answers=0)
    every, _ = evaluation.load_rows(changed, RETRIEVER, PROMPT)
    changed.eval.likelihoods = 2
    some, _ = evaluation.load_rows(changed, RETRIEVER, PROMPT)
    whole, part = (evaluation.evaluate(model, params, rows) for rows in (every, some))
    assert [("answer_nll" in line, "recall@1" in line) for line in part.by_row] == [(True, True)] * 2 + [
        (False, True)
    ] * (len(every.sample) - 2)
    assert part.metrics["eval/mrr@10"] == whole.metrics["eval/mrr@10"]
    passages = list(dict.fromkeys([p for _, p, _ in ROWS] + EXTRA))
    read = [ROWS[i] for i in every.sample[:2]]
    cosine = reference_cosines([q for q, _, _ in read], passages)
    expected = reference_nll("token", reference_forward(), read, cosine, passages, 3)
    assert part.metrics["eval/answer_nll"] == pytest.approx(expected, rel=1e-5)
    tokens = [len(answer) + 1 for _, _, answer in read]
    by_hand = np.average([line["answer_nll"] for line in part.by_row[:2]], weights=tokens)
    assert part.metrics["eval/answer_nll"] == pytest.approx(by_hand, abs=1e-5)
    assert some.counts()["answer_tokens"] == sum(tokens)


def test_k_beyond_the_corpus_reads_all_of_it(folder):
    model, params = build(candidates=50)
    rows, _ = evaluation.load_rows(config(folder, passages=False), RETRIEVER, PROMPT)
    passages = list(dict.fromkeys(p for _, p, _ in ROWS))
    sampled = [ROWS[i] for i in rows.sample]
    cosine = reference_cosines([q for q, _, _ in sampled], passages)
    expected = reference_nll("token", reference_forward(), sampled, cosine, passages, 5)
    result = evaluation.evaluate(model, params, rows)
    assert result.metrics["eval/answer_nll"] == pytest.approx(expected, rel=1e-5)
    assert evaluation.record(result, rows, model, 0)["counts"]["candidates"] == 5


def test_greedy_answers_mix_the_retrieved_passages(folder):
    model, params = build()
    rows, _ = evaluation.load_rows(config(folder, answers=4), RETRIEVER, PROMPT)
    cosine, retrieved = search.top_k(*evaluation.embedded(model, params, rows), evaluation.most(model))
    texts = evaluation.greedy_answers(model, params, rows, retrieved[:, :3], cosine[:, :3])
    assert len(texts) == 4
    forward = reference_forward()
    for row, text, top, scores in zip(rows.sample, texts, retrieved[:, :3], cosine[:, :3], strict=False):
        weights = np.exp(scores / MARGINAL_TEMPERATURE)
        answer = []
        for _ in range(PROMPT.answer_len):  # the longest answer in the file has fewer
            prompts = [reference_strings(ROWS[row][0], rows.passages[p], "")[0] for p in top]
            mixed = sum(
                w * np.exp(forward(p + answer)[len(p) + len(answer) - 1]) for w, p in zip(weights, prompts, strict=True)
            )
            if mixed.argmax() == EOS:
                break
            answer.append(int(mixed.argmax()))
        assert text == PROMPT.tokenizer.decode(answer, skip_special_tokens=True).strip()
    measured = evaluation.evaluate(model, params, rows).metrics
    gold = [ROWS[i][2] for i in rows.sample[:4]]
    assert measured["eval/f1"] == pytest.approx(np.mean([metrics.f1(t, g) for t, g in zip(texts, gold, strict=True)]))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_retrieval_by_leading_channels_is_that_of_embeddings_cut_there(folder, tmp_path, similarity):
    model, params = build()
    model, params = dataclasses.replace(model, similarity=similarity), {"retriever": params["retriever"]}
    rows, _ = evaluation.load_rows(config(folder), RETRIEVER, None)
    widths = dataclasses.replace(model, matryoshka_dims=(6, 2))
    index = tmp_path / "index"
    for measured in (evaluation.evaluate(widths, params, rows), evaluation.evaluate(widths, params, rows, index)):
        for width in (6, 2):
            cut = evaluation.evaluate(dataclasses.replace(model, truncate_dim=width), params, rows).metrics
            for name in evaluation.AT_WIDTHS:
                assert measured.metrics[f"eval/{name}_dim{width}"] == pytest.approx(cut[f"eval/{name}"])
        assert measured.metrics["eval/mrr@10"] == evaluation.evaluate(model, params, rows).metrics["eval/mrr@10"]
    assert measured.metrics["eval/mrr@10_dim2"] != measured.metrics["eval/mrr@10"]


def test_without_a_retriever_the_own_passage_is_read(folder):
    model, params = build()
    rows, _ = evaluation.load_rows(config(folder, answers=2), None, PROMPT)
    result = evaluation.evaluate(dataclasses.replace(model, retriever=None), {"generator": params["generator"]}, rows)
    found = result.metrics
    assert set(found) == {f"eval/{n}" for n in ("answer_nll", "answer_nll_none", "retrieval_utility", "em", "f1")}
    passages = [p for _, p, _ in ROWS]
    expected = reference_nll("token", reference_forward(), ROWS, np.eye(7), passages, 1)
    assert found["eval/answer_nll"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_devices_share_rows_passages_and_answers(folder, shape):
    """Devices that finish their answers early wait for the others: all gather parameters at every token."""
    model, params = build()
    rows, _ = evaluation.load_rows(config(folder, answers=7), RETRIEVER, PROMPT)
    expected = evaluation.evaluate(model, params, rows)
    mesh = sharding.make_mesh(*shape)
    placed = jax.device_put(params, sharding.param_shardings(mesh, params))
    found = evaluation.evaluate(model, placed, rows)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)
    generated = [line["generated"] for line in expected.by_row]
    assert [line["generated"] for line in found.by_row] == generated and len(set(map(len, generated))) > 1


def test_an_index_on_disk_changes_nothing_and_is_used_again(folder, tmp_path, monkeypatch):
    model, params = build()
    rows, _ = evaluation.load_rows(config(folder), RETRIEVER, None)
    params = {"retriever": params["retriever"]}
    expected = evaluation.evaluate(model, params, rows)
    assert evaluation.evaluate(model, params, rows, tmp_path / "index") == expected
    embed, made = evaluation.search.embed, []

    def counted(*inputs, label, **options):
        made.append(label)
        return embed(*inputs, label=label, **options)

    monkeypatch.setattr(evaluation.search, "embed", counted)
    assert evaluation.evaluate(model, params, rows, tmp_path / "index") == expected
    assert made == ["queries"]


def test_without_a_generator_there_are_no_answers(folder):
    model, params = build()
    rows, _ = evaluation.load_rows(config(folder, answers=2), RETRIEVER, None)
    result = evaluation.evaluate(dataclasses.replace(model, generator=None), {"retriever": params["retriever"]}, rows)
    assert set(result.metrics) == {f"eval/{name}" for name, m in metrics.METRICS.items() if m.ranking}
    assert "answer" not in result.by_row[0] and len(result.by_row[0]["retrieved"]) == 7


def test_a_log_is_told_how_far_an_evaluation_is(folder, monkeypatch, capsys):
    model, params = build()
    rows, _ = evaluation.load_rows(config(folder, answers=6), RETRIEVER, PROMPT)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0)
    evaluation.evaluate(model, params, dataclasses.replace(rows, batch_size=1), rerank=4)
    said = [line.split(": ")[0] for line in capsys.readouterr().err.splitlines()]
    assert list(dict.fromkeys(said)) == ["queries", "passages", "re-ranking", "likelihood of answers", "answers"]


def test_reranking_changes_the_order_of_the_first_ones_alone(folder):
    model, params = build()
    rows, _ = evaluation.load_rows(config(folder, answers=0), RETRIEVER, PROMPT)
    plain, again = (evaluation.evaluate(model, params, rows, rerank=rerank) for rerank in (0, 4))
    moved = 0
    for before, after in zip(plain.by_row, again.by_row, strict=True):
        shown = [[found["passage"] for found in line["retrieved"]] for line in (before, after)]
        assert sorted(shown[0][:4]) == sorted(shown[1][:4]) and shown[0][4:] == shown[1][4:]
        by_passage = ({found["passage"]: found["score"] for found in line["retrieved"]} for line in (before, after))
        assert next(by_passage) == next(by_passage)
        moved += shown[0] != shown[1]
    assert moved and evaluation.record(again, rows, model, 0, 4)["counts"]["reranked"] == 4
    assert "reranked" not in evaluation.record(plain, rows, model, 0)["counts"]


def test_rows_without_labels_are_evaluated_by_what_is_found(folder, tmp_path):
    """Ranking counts the labelled rows alone; answers and documents are looked for in the text and by name."""
    model, params = build()
    rows = [(q, p if i % 2 else "", a, f"d{i // 3}") for i, (q, p, a) in enumerate(ROWS)]
    changed = config(folder, answers=0)
    changed.data.eval = write_csv(tmp_path / "rows.csv", ("Q", "P", "A", "D"), rows)
    corpus = [(p, f"d{i // 3}") for i, (_, p, _) in enumerate(ROWS)]
    changed.data.passages = write_csv(tmp_path / "corpus.csv", ("P", "D"), corpus)
    changed.data.columns.document = "D"
    evaluated, _ = evaluation.load_rows(changed, RETRIEVER, PROMPT)
    result = evaluation.evaluate(model, params, evaluated)
    labelled = [line for line in result.by_row if "recall@1" in line]
    assert {line["row"] for line in labelled} == {1, 3, 5, 6}, "of the last one's document there is one passage"
    np.testing.assert_allclose(result.metrics["eval/recall@1"], np.mean([line["recall@1"] for line in labelled]))
    documents = {}
    for passage, name in corpus:
        documents.setdefault(name, set()).add(passage)
    for line in result.by_row:
        top = [found["passage"] for found in line["retrieved"]]
        _, _, answer, document = rows[line["row"]]
        words = [passage.lower().split() for passage in top]
        asked = answer.lower().split()
        for k in (1, 5, 10):
            assert line[f"document_hit@{k}"] == any(p in documents[document] for p in top[:k])
            held = any(asked == w[i : i + len(asked)] for w in words[:k] for i in range(len(w)))
            assert line[f"answer_hit@{k}"] == held, (answer, top[:k])
    assert 0 < result.metrics["eval/document_hit@1"] < 1
    assert np.isfinite(list(result.intervals.values())).all(), "also where a draw holds no labelled row"


def test_a_dropped_row_leaves_its_passage_in_the_corpus(folder, tmp_path):
    long = ("who", "the moon sang", "an answer of more than ten bytes")
    changed = config(folder, passages=False)
    changed.data.eval = write_csv(tmp_path / "rows.csv", ("Q", "P", "A"), [*ROWS, long])
    rows, report = evaluation.load_rows(changed, RETRIEVER, PROMPT)
    assert (report.rows, len(rows.sample), len(rows.passages), rows.passages[-1]) == (7, 7, 6, "the moon sang")
    assert len(rows.examples.prefixes) == len(rows.examples.retriever_passages) == 6


def test_the_sample_is_fixed_and_a_smaller_one_is_its_start(folder):
    samples = [evaluation.load_rows(config(folder, num_rows=n), RETRIEVER, None)[0].sample.tolist() for n in (0, 3, 3)]
    assert sorted(samples[0]) == list(range(7))
    assert samples[1] == samples[2] == samples[0][:3]


def test_batches_share_passages():
    rng = np.random.default_rng(0)
    candidates = rng.permutation(np.repeat(np.arange(12) * 4, 5))[:, None] + np.arange(4)  # 12 topics of 5 rows
    batches = evaluation.sharing_batches(candidates, 10)
    assert sorted(itertools.chain(*map(list, batches))) == list(range(60))
    assert [len(batch) for batch in batches] == [10] * 6
    assert sum(len(np.unique(candidates[batch])) for batch in batches) == 48  # each passage once, the least possible


def test_the_record_is_flat_and_says_what_it_means(folder, tmp_path):
    rows, _ = evaluation.load_rows(config(folder, num_rows=4), RETRIEVER, PROMPT)
    lines = [{"row": 3, "query": "who\nsang é", "mrr@10": 0.5}, {"row": 0, "query": "?", "mrr@10": 0.0}]
    result = evaluation.Result({"eval/mrr@10": 0.25}, {"eval/mrr@10": [0.1, 0.4]}, lines)
    content = evaluation.record(result, rows, build()[0], 12)
    path = evaluation.write_record(tmp_path / "run", content, lines)
    evaluation.write_record(tmp_path / "run", content, lines)  # again: replaced
    assert sorted(p.name for p in path.parent.iterdir()) == ["step_12.json", "step_12.rows.jsonl"]
    read = json.loads(path.read_text())
    assert (read["step"], read["eval/mrr@10"], read["intervals"]) == (12, 0.25, {"eval/mrr@10": [0.1, 0.4]})
    tokens = sum(len(ROWS[i][2]) + 1 for i in rows.sample)
    assert read["counts"] == {
        "rows": 7, "queries": 4, "passages": 7, "answers": 0, "answer_tokens": tokens, "candidates": 3
    }  # fmt: skip
    assert "nats per answer token" in read["definitions"]["eval/answer_nll"] and "best_by" not in read
    by_row = path.with_suffix(".rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in by_row] == lines
    shown = evaluate.table(content)
    assert "eval/mrr@10" in shown and "0.2500   0.1000 to 0.4000" in shown
    other = evaluation.record(result, dataclasses.replace(rows, metric="map@100"), build()[0], 12)
    assert other["best_by"] == "eval/map@100"


def test_the_plane_is_that_of_the_two_largest_singular_values():
    rng = np.random.default_rng(4)
    queries, corpus = rng.normal(size=(9, 6)).astype(np.float32), rng.normal(size=(5, 6)).astype(np.float32)
    gold = np.array([0, 1, -1, 2, 3, 4, 0, -1, 2])
    plane = evaluation.projected(queries, corpus, gold)
    assert plane is not None and plane.shape == (9, 4)
    known = gold >= 0
    both = np.stack([queries, corpus[gold]], axis=1)[known].reshape(-1, 6).astype(np.float64)
    values = np.linalg.svd(both - both.mean(axis=0), compute_uv=False)
    spread = np.linalg.svd(plane[known].reshape(-1, 2).astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(spread, values[:2], rtol=1e-5)
    assert evaluation.projected(queries, corpus, np.full(9, -1)) is None
