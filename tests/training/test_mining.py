"""Mining in the loop: what it finds and leaves in the workdir, going on from it to the same bits, and harder steps.

The runs train on rows of all kinds, a third of them with a passage, a third with a document of two passages, a third
with neither, by evidence that is kept.
"""

import csv
import json
import subprocess
import time

import numpy as np
import pytest
from command import ROOT, TINY, call, environment, run, run_here, words
from test_loop import records, state_of
from test_processes import run_together

from rag_jax import config, data
from rag_jax.errors import UserError
from rag_jax.training import hard_groups, mining

STEPS = 8
ROWS = 30  # mined in the middle of the first epoch and of the second.
VALUES = {
    "total_steps": STEPS, "mining__every_steps": 3, "eval__every_steps": 0, "checkpoint__every_steps": 2,
    "checkpoint__keep": 9, "objective__name": "pdist", "objective__marginal_weight": 0.0, "objective__negatives": 2,
    "objective__candidates": 3, "objective__candidates_from": "row", "mining__explore": 1,
    "optimizer__rate_rules": (("generator/", 0.0), (".*", 1.0)), "data__columns__document": "Doc",
    "dropout": 0.0,  # whose noise is as large as what is compared
}  # fmt: skip
COLUMNS = {"query": "Question", "passage": "Abstract", "answer": "Answer", "document": "Doc"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """VALUES, and files of the project's rows, of which two in three do not name their passage, and of all passages."""
    folder = tmp_path_factory.mktemp("kinds")
    with open(ROOT / "tests/data/rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    passages = list(dict.fromkeys(row["Abstract"] for row in rows))
    document = {passage: f"d{i // 2}" for i, passage in enumerate(passages)}
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS.values())
        for i, row in enumerate(rows):
            passage, doc = row["Abstract"] if i % 3 == 0 else "", document[row["Abstract"]] if i % 3 == 1 else ""
            writer.writerow((row["Question"], passage, row["Answer"][:20], doc))
    with (folder / "corpus.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("Abstract", "Doc"), *document.items()])
    return VALUES | {"data__train": folder / "rows.csv", "data__passages": folder / "corpus.csv"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache, values):
    """A run of all steps without a stop."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    printed = run(cache, "main", f"--config={TINY}", f"--workdir={workdir}", **values)
    return workdir, printed


def plans(workdir, steps=(0, 3, 6)):
    found = [mining.load(workdir, step) for step in steps]
    assert all(found)
    return found


@pytest.mark.slow
def test_the_plans_and_their_metrics(whole, values):
    workdir, printed = whole
    gaps = data.Gaps(passage=True, corpus=(("data.passages", str(values["data__passages"])),))
    rows, _ = data.load_examples(
        str(values["data__train"]), key="data.train", bad_rows="drop", retriever=None, prompt=None, columns=COLUMNS,
        gaps=gaps,
    )  # fmt: skip
    assert sorted(path.name for path in (workdir / "mining").iterdir()) == [f"step_{m}.npz" for m in (0, 3, 6)]
    met = np.zeros(ROWS, int)
    for plan in plans(workdir):
        assert plan.rows.shape == (3, 8)
        np.testing.assert_array_equal(plan.met, met)
        met += np.bincount(plan.rows.ravel(), minlength=ROWS)
        assert met.max() - met.min() <= 1
        assert plan.brought.shape == (3, 8, 3)
        for group, brought in zip(plan.rows.reshape(-1, 4), plan.brought.reshape(-1, 4, 3), strict=True):
            named = rows.passage_key[group] >= 0
            there = brought[named][brought[named] >= 0]
            assert len(set(there)) == len(there) and not set(there) & set(rows.passage_key[group])
            assert (brought[named, 2] == -1).all(), "two negatives"
            for row, own in zip(group[~named], brought[~named].tolist(), strict=True):
                document = rows.document_key[row]
                if document >= 0:  # its two passages and no third one
                    assert sorted(own) == [-1, *sorted(rows.document_passages[document])]
                else:
                    assert len(set(own)) == 3 and min(own) >= 0
        known = data.Known(plan.evidence_code, plan.evidence, len(rows.passages))
        for row, brought in zip(plan.rows.ravel(), plan.brought.reshape(-1, 3), strict=True):
            keys = np.array([*rows.own_key[row], *brought])
            np.testing.assert_array_equal(np.isnan(known.values(row[None], keys)), keys < 0)
    assert met.sum() == 9 * 8
    lines = records(workdir, "mining/")
    assert [line["step"] for line in lines] == [0, 3, 6]
    for line in lines:
        assert line["mining/similarity"] > line["mining/random_similarity"]
        assert 0 <= line["mining/masked_identity"] < 1 and 0 <= line["mining/masked_margin"] < 1
        assert 0 < line["mining/random_not_first"] <= 1
        assert line["mining/negatives_similarity"] > line["mining/random_similarity"]
        assert 0 <= line["mining/negatives_missing"] < 0.5
        assert line["mining/candidates_without_slot"] == 0  # four rows of three candidates, twelve slots
    first = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and first["time/mining_share"] == 1  # nothing trained yet
    assert (
        "mining     groups of near passages, and candidates of rows that name no passage, anew every 3 steps; "
        in printed
    )
    assert "of training)" in printed
    assert "negatives  2 more that each query brings, of those mined for it" in printed
    assert "30 rows (10 with a passage, 10 with a document alone, 10 with neither passage nor document)" in printed
    pairs = [line["mining/evidence_pairs"] for line in lines]
    computed = [line["mining/evidence_computed"] for line in lines]
    assert pairs[0] == computed[0] > 0 and computed[2] < pairs[2]  # what was computed before is not again


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(whole, cache, values, tmp_path):
    workdir = tmp_path / "run"
    # As if on another machine: nothing is kept but what the run itself leaves.
    elsewhere = tmp_path / "cache"
    command = words("main", f"--config={TINY}", f"--workdir={workdir}", **values)
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(elsewhere), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (workdir / "checkpoints" / "4").exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    run(elsewhere, "main", f"--config={TINY}", f"--workdir={workdir}", **values)
    assert records(workdir) == records(whole[0])
    assert records(workdir, "mining/") == records(whole[0], "mining/")
    for ours, theirs in zip(plans(workdir), plans(whole[0]), strict=True):
        for name, array in vars(ours).items():
            np.testing.assert_array_equal(array, getattr(theirs, name), err_msg=name)
    ours, theirs = state_of(workdir, STEPS, cache), state_of(whole[0], STEPS, cache)
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def test_what_is_due_now_is_mined_and_what_is_lost_is_named(whole, tmp_path):
    workdir, _ = whole
    first, second, _ = plans(workdir)
    since, plan, met = mining.resume(workdir, 4, 3)
    assert (since, met) == (3, None)
    np.testing.assert_array_equal(plan.rows, second.rows)
    ((step, later), (_, last)) = mining.kept(workdir, 4, 3)
    assert step == 4 and len(last.rows) == 3
    np.testing.assert_array_equal(later.rows, second.rows[1:])
    np.testing.assert_array_equal(later.brought, second.brought[1:])
    mining.save(tmp_path, 0, first)
    since, plan, met = mining.resume(tmp_path, 3, 3)  # killed between checkpoint and mining
    assert (since, plan) == (3, None)
    np.testing.assert_array_equal(met, second.met)
    with pytest.raises(UserError, match=r"step_3.npz is missing.*move the checkpoints after step 0 away"):
        mining.resume(tmp_path, 4, 3)
    path = mining.path_of(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"step_0.npz cannot be read"):
        mining.resume(tmp_path, 1, 3)


def test_what_has_a_slot_fills_the_same_slots():
    rng = np.random.default_rng(0)
    right, brought = rng.integers(-1, 30, (50, 4, 2)), rng.integers(-1, 30, (50, 4, 5))
    left = mining.with_slot(brought, right, 3)
    assert 0.1 < (left[brought >= 0] < 0).mean() < 0.9
    assert (left[left >= 0] == brought[left >= 0]).all()
    for *group, own in zip(right.tolist(), brought.tolist(), left, strict=True):
        keys = data.fill_slots(*group, 3)
        assert set(own.ravel()) - {-1} == set(np.ravel(group[1])) & set(keys.ravel()) - {-1}
        np.testing.assert_array_equal(data.fill_slots(group[0], own.tolist(), 3), keys)


@pytest.mark.slow
def test_of_what_has_no_slot_no_evidence_is_read(cache, values, tmp_path):
    few = values | {"objective__candidates": 8, "objective__negatives": 1, "total_steps": 1}
    code, _, told = call(cache, "main", f"--config={TINY}", f"--workdir={tmp_path}", **few)
    assert code == 0, told
    (line,), (plan,) = records(tmp_path, "mining/"), plans(tmp_path, (0,))
    assert line["mining/candidates_without_slot"] > 0.2
    assert "of the candidates find no slot in their group and are left out: raise objective.negatives=1" in told
    groups, brought = plan.rows.reshape(-1, 4), plan.brought.reshape(-1, 4, 8)
    assert all(len(set(own.ravel()) - {-1}) <= 8 for own in brought)
    own = {(row, key) for row, keys in zip(groups.ravel(), brought.reshape(-1, 8), strict=True) for key in keys}
    rights = {row for row in groups.ravel() if row % 3 == 0}  # one passage each
    assert line["mining/evidence_pairs"] == len({pair for pair in own if pair[1] >= 0}) + len(rights)


@pytest.mark.slow
def test_a_generator_learns_from_what_a_frozen_retriever_finds(cache, values, tmp_path):
    """The second run of docs/objectives.md: rows without labels, and the generator alone is trained."""
    of_docs = {
        "objective__name": "token", "objective__contrastive_weight": 0.0, "objective__marginal_weight": 1.0,
        "objective__candidates": 2, "objective__negatives": 1, "mining__margin": None, "mining__explore": 0,
        "optimizer__rate_rules": (("retriever/", 0.0), (".*", 1.0)), "total_steps": 2, "checkpoint__every_steps": 1,
    }  # fmt: skip
    printed = run_here(cache, "main", f"--config={TINY}", f"--workdir={tmp_path}", **values | of_docs)
    trained = [line.split("parameters, ")[1].split(" trained")[0] for line in printed.splitlines()[1:3]]
    assert trained == ["0%", "100%"]
    lines = records(tmp_path)
    assert all(0 < line["loss/marginal"] == line["loss/total"] for line in lines) and len(lines) == 2
    (plan,) = plans(tmp_path, (0,))
    assert plan.evidence is None and plan.brought.shape == (3, 8, 2)
    before, after = (state_of(tmp_path, step, cache) for step in (1, 2))
    params = {path for path in after if "params" in path}
    moved = {path for path in params if (before[path] != after[path]).any()}
    assert moved and all(path.startswith("params/generator/") for path in params)  # what is frozen is not kept


@pytest.mark.parametrize("margin", [None, 0.1, -0.2])
def test_negatives_are_the_nearest_that_may_be(margin):
    """Against loops over a full sort; queries of several rows, passages of several rows, a group with a row twice."""
    rng = np.random.default_rng(0)
    query_key, passage_key = rng.integers(0, 30, 40), np.concatenate([np.arange(25), rng.integers(0, 25, 15)])
    query_emb, passage_emb = (rng.normal(size=(n, 6)).astype(np.float32) for n in (30, 25))
    query_emb, passage_emb = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (query_emb, passage_emb))
    sides = (query_emb[query_key], passage_emb[passage_key], query_key, passage_key)
    near = hard_groups.Near(*sides, np.zeros((40, 0), np.int64), margin)
    chosen = rng.integers(0, 40, (20, 3))
    right = [sorted(set(passage_key[query_key == query].tolist())) for query in range(30)]
    right_key = np.array([row + [-1] * (max(map(len, right)) - len(row)) for row in right])
    found, scores = mining.negatives(near, passage_emb, right_key, chosen, 2)
    assert found.shape == scores.shape == (20, 3, 2) and found.dtype == np.int32
    cosine, missing = query_emb @ passage_emb.T, 0
    for group, brought, of in zip(chosen, found, scores, strict=True):
        held = {passage_key[i] for i in range(40) if query_key[i] in query_key[group]}
        for row, got, score in zip(group, brought, of, strict=True):
            own = cosine[query_key[row]]
            limit = np.inf if margin is None else own[passage_key[row]] + margin
            expected = [p for p in np.argsort(-own, kind="stable") if p not in held and own[p] <= limit][:2]
            held |= set(expected)
            missing += 2 - len(expected)
            assert got.tolist() == expected + [-1] * (2 - len(expected))
            np.testing.assert_allclose(score[: len(expected)], own[expected], atol=1e-6)
    assert (missing > 0) == (margin is not None)


@pytest.mark.slow
def test_a_run_with_given_negatives(cache, tmp_path):
    rows = [line.split("|") for line in ("q {0}|p {0}|a {0}", "r {0}|p {0}|b", "s {0}|o {0}|c")]
    lines = [
        dict(zip(("Question", "Abstract", "Answer"), (text.format(n) for text in row), strict=True))
        | {"Wrong": [f"no {n}", f"p {n}", "nowhere"][: n % 4]}
        for n in range(6)
        for row in rows
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    values = dict(
        data__train=tmp_path / "rows.jsonl", data__eval=None, data__columns__negative="Wrong", objective__negatives=2,
        objective__candidates=9, total_steps=2, checkpoint__every_steps=0, eval__every_steps=0, objective__name="pdist",
        objective__marginal_weight=0.0, objective__candidates_from="row", objective__label_noise=0.1,
        optimizer__rate_rules=(("generator/", 0.0), (".*", 1.0)),
    )  # fmt: skip
    printed = run_here(cache, "main", f"--config={TINY}", f"--workdir={tmp_path / 'run'}", **values)
    # "p n" is a passage of query "q n" and of "r n", and none of "s n".
    assert "given negatives: 2 a row, 14 rows bring fewer, 4 left out as passages of their own query" in printed
    assert "negatives  2 more that each query brings, of those given in column 'Wrong'" in printed
    losses = [line["loss/total"] for line in records(tmp_path / "run")]
    assert len(losses) == 2 and np.isfinite(losses).all()
    # All that may be read is known beforehand: behind each row's passage, what it brings, and none.
    assert "; it corrects labels by a margin of 0.1" in printed
    code = np.load(tmp_path / "run" / "mining" / "evidence.npz")["code"]
    given = 36 - 14 - sum(n % 4 == 0 for n in range(6) for _ in rows)
    assert len(code) == 2 * 18 + given, (len(code), given)


@pytest.mark.slow
def test_mined_batches_are_harder(cache, tmp_path):
    """The same models, hardly moved, on all rows: the in-batch loss of near passages lies above that of random ones."""
    still = {
        "optimizer__learning_rate": 1e-12, "total_steps": 7, "group_size": 4, "batch_size": 4, "eval__every_steps": 0,
        "checkpoint__every_steps": 0, "objective__name": "none", "generator__path": None, "mining__margin": None,
        "dropout": 0.0,
    }  # fmt: skip
    losses = {}
    for every in (0, 7):
        workdir = tmp_path / str(every)
        run_here(cache, "main", f"--config={TINY}", f"--workdir={workdir}", **still, mining__every_steps=every)
        losses[every] = np.mean([line["loss/contrastive"] for line in records(workdir)])
    assert losses[7] > 1.05 * losses[0]
    (line,) = records(tmp_path / "7", "mining/")
    assert line["mining/not_first"] >= line["mining/random_not_first"]


@pytest.mark.slow
def test_processes_train_on_one_plan(whole, cache, values, tmp_path):
    workdir = tmp_path / "run"
    ended = run_together(2, 1, cache, f"--config={TINY}", f"--workdir={workdir}", **values)
    assert [code for code, _, _ in ended] == [0, 0], ended
    for name in ("rows", "brought"):
        np.testing.assert_array_equal(*(getattr(plans(place)[0], name) for place in (workdir, whole[0])))
    ours, theirs = records(workdir), records(whole[0])
    np.testing.assert_allclose(
        [line["loss/total"] for line in ours[:3]], [line["loss/total"] for line in theirs[:3]], rtol=1e-4
    )
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))


def test_mining_needs_a_retriever_and_groups():
    with pytest.raises(UserError, match=r"mining.every_steps=5, group_size=1.*mining fills groups"):
        config.load(TINY, {"mining.every_steps": 5, "group_size": 1, "objective.candidates": 1})
