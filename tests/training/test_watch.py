"""Non-finite numbers end a run or are skipped, loss spikes are noted, and a step can be taken apart again."""

import dataclasses
import functools
import json
import math
import statistics
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from command import ROOT, TINY, call, environment, run_here, words
from test_mesh import ALL, mesh_of
from test_rag import make, make_rows

from rag_jax import rag, replay
from rag_jax.distributed import sharding
from rag_jax.errors import UserError
from rag_jax.hf import tiny
from rag_jax.training import optim, watch
from rag_jax.training import step as train_step

NAN = float("nan")


def guard(tmp_path, allowed=0, skipped=0):
    return watch.NonFinite(tmp_path, allowed, skipped, lambda step: np.array([step, 7]), write=True)


def test_good_numbers_pass(tmp_path):
    assert guard(tmp_path).check(3, {"loss/total": 1.0, "optim/grad_norm": 2.0}) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["loss/total", "optim/grad_norm"])
def test_a_number_that_is_none_ends_the_run_with_its_rows_in_a_file(tmp_path, name):
    numbers = {"loss/total": 1.0, "optim/grad_norm": 2.0} | {name: math.inf}
    told = (
        rf"{name} is inf at step 3; that step was not saved. .*step_3.json has its rows, and python -m rag_jax.replay "
    )
    with pytest.raises(UserError, match=told):
        guard(tmp_path).check(3, numbers)
    found = json.loads((tmp_path / "failed" / "step_3.json").read_text())
    assert (found["step"], found["skipped"], found["rows"]) == (3, False, [3, 7])
    assert found["not_finite"] == {name: "inf"} and len(found["finite"]) == 1
    assert found["replay"] == f"python -m rag_jax.replay --workdir={tmp_path} --step=3"


def test_so_many_updates_may_be_skipped_in_a_run_those_before_included(tmp_path):
    watch = guard(tmp_path, allowed=3, skipped=1)
    wrong = {"loss/total": NAN, "optim/grad_norm": NAN}
    assert "its update is skipped (2 of 3)" in watch.check(5, wrong)
    assert watch.check(6, {"loss/total": 1.0, "optim/grad_norm": 1.0}) is None
    assert "(3 of 3)" in watch.check(7, wrong)
    with pytest.raises(UserError, match="at step 8 and 3 updates were skipped already"):
        watch.check(8, wrong)
    files = {path.name: json.loads(path.read_text())["skipped"] for path in (tmp_path / "failed").iterdir()}
    assert files == {"step_5.json": True, "step_7.json": True, "step_8.json": False}


def test_leaps_are_those_above_the_median_of_the_lines_written_lately():
    rng = np.random.default_rng(0)
    written = [*rng.uniform(0.5, 1.5, 100), None]
    leaps = watch.Spikes(3.0, written)
    median = statistics.median(written[-1 - watch.WINDOW : -1])
    assert leaps.ratio(2.9 * median) is None
    assert leaps.ratio(3.1 * median) == pytest.approx(3.1)
    assert leaps.ratio(NAN) is None
    assert watch.Spikes(0.0, written).ratio(1e9) is None
    assert watch.Spikes(3.0, written[: watch.FEWEST - 1]).ratio(1e9) is None


@pytest.mark.slow
def test_a_skipped_update_changes_nothing_but_the_step():
    """A row that touches an embedding of infinity, between two that do not, against optax by hand."""
    model, params = make("gpt2")
    good, bad = (make_rows(32, seed=n) for n in (0, 1))
    used = [set(np.unique(rows.query_ids[rows.query_mask])) for rows in (good, bad)]
    token = min(used[1] - used[0] - set(np.unique(good.pool.passage_ids)))
    word = params["retriever"]["embed"]["word"]
    word["embedding"] = word["embedding"].at[token].set(jnp.inf)
    mesh, optimizer = mesh_of((1, 1, 1)), optax.adam(lambda count: 0.01 / (1 + count))
    trainable, frozen = optim.split_frozen(params, ALL)
    places = jax.tree.map(lambda a: a.sharding, train_step.abstract_state(trainable, frozen, optimizer, mesh))
    step = train_step.make_train_step(
        model, optimizer, lambda n: 0.01 / (1 + n), places, dropout_seed=None, skips_nonfinite=True
    )
    placed = jax.device_put(jax.tree.map(np.array, trainable), sharding.param_shardings(mesh, trainable))
    state, values = step(
        train_step.init_state(placed, frozen, optimizer, mesh), sharding.put_batch(mesh, good, 32), None
    )
    assert np.isfinite(values["loss/total"])
    before = jax.device_get(state)
    state, values = step(state, sharding.put_batch(mesh, bad, 32), None)
    assert not np.isfinite(values["optim/grad_norm"])
    after = jax.device_get(state)
    assert after.step == before.step + 1 == 2
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (before.params, before.opt_state))
    assert int(optim.updates_done(state.opt_state)) == 1
    state, values = step(state, sharding.put_batch(mesh, good, 32), None)
    np.testing.assert_allclose(values["optim/learning_rate"], 0.01 / 2)
    assert int(optim.updates_done(state.opt_state)) == 2
    # The same update as right after the first: the skipped one left no trace.
    again, _ = step(
        jax.device_put(dataclasses.replace(before, step=np.int32(1)), places), sharding.put_batch(mesh, good, 32), None
    )
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), jax.device_get(again.params))


def test_what_rows_bring_to_the_loss_adds_up():
    """With negatives, some of them a row's own passage and some not there."""
    model, params = make("gpt2", name="sequence", candidates=6, negatives=2)
    batch = make_rows(8, negatives=np.random.default_rng(0).integers(-1, 14, (8, 2)))
    terms = jax.jit(functools.partial(replay.row_terms, model))(params, batch, None)
    _, parts = jax.jit(functools.partial(rag.loss, model))(params, batch, None)
    np.testing.assert_allclose(terms["contrastive"].mean(), parts["loss/contrastive"], rtol=1e-5)
    np.testing.assert_allclose(terms["marginal"].sum() / batch.answer_mask.sum(), parts["loss/marginal"], rtol=1e-5)
    for name in ("|query|", "|passages|"):
        np.testing.assert_allclose(terms[name], np.ones(8), rtol=1e-5)


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """A run whose retriever has an embedding near the end of float32, which row 5 alone meets."""
    folder = tmp_path_factory.mktemp("failed")
    (folder / "bert").mkdir()
    tiny.build("bert", folder / "bert")
    weights = safetensors.numpy.load_file(folder / "bert" / "model.safetensors")
    tokenizer = json.loads((folder / "bert" / "tokenizer.json").read_text())
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    weights[name][tokenizer["model"]["vocab"]["~"]] = 3e38
    safetensors.numpy.save_file(weights, folder / "bert" / "model.safetensors", {"format": "pt"})
    rows = [f"{word} {row}?,the {word} of {row},{row} {word}" for row, word in enumerate("abcdefghijkl" * 2)]
    rows[5] = rows[5].replace("?", "~?", 1)
    (folder / "rows.csv").write_text("\n".join(["Question,Abstract,Answer", *rows]) + "\n")
    values = dict(
        total_steps=9, eval__every_steps=0, checkpoint__every_steps=1, data__train=folder / "rows.csv", data__eval=None,
        retriever__path=folder / "bert", optimizer__learning_rate=1e-4,
    )  # fmt: skip
    flags = (f"--config={TINY}", f"--workdir={folder / 'run'}")
    ended = subprocess.run(
        words("main", *flags, **values), cwd=ROOT, env=environment(folder / "cache"), capture_output=True, text=True
    )
    return folder, flags, values, ended


@pytest.mark.slow
def test_a_run_that_fails_says_where_and_the_step_can_be_taken_apart(failed):
    folder, _, _, ended = failed
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    found = json.loads(next((folder / "run" / "failed").glob("step_*.json")).read_text())
    step = found["step"]
    assert f"at step {step}; that step was not saved" in ended.stderr.splitlines()[-1]
    assert 5 in found["rows"] and set(found["not_finite"]) >= {"loss/total", "optim/grad_norm"}
    saved = max((int(path.name) for path in (folder / "run" / "checkpoints").glob("[0-9]*")), default=0)
    assert saved < step
    lines = run_here(folder / "cache", *found["replay"].removeprefix("python -m rag_jax.").split()).splitlines()
    rows = [line for line in lines if line.split()[0].isdecimal()]
    assert [int(line.split()[0]) for line in rows] == found["rows"]
    (wrong,) = (line for line in rows if line.split()[1] == "nan")  # its query's embedding
    assert wrong.split()[0] == "5" and "NOT FINITE" in wrong and "~?" in wrong
    assert any(line.startswith("gradient retriever/") for line in lines)
    assert not any(line.startswith("parameter ") for line in lines)


@pytest.mark.slow
def test_skipped_updates_are_counted_over_stops(failed):
    """Row 5 is met once in each epoch of three steps: the third time is one too many, whatever was stopped between."""
    folder, flags, values, _ = failed
    told = []
    for name, stops in (("whole", [9]), ("stopped", [4, 9])):
        workdir = folder / name
        for total_steps in stops:
            more = values | {"guard__skip_nonfinite": 2, "total_steps": total_steps, "optimizer__schedule": "constant"}
            code, _, complaint = call(folder / "cache", "main", flags[0], f"--workdir={workdir}", **more)
            assert code == (2 if total_steps == 9 else 0), complaint
        told.append(complaint.splitlines()[-1].replace(str(workdir), "DIR"))
        assert "and 2 updates were skipped already" in told[-1]
        skipped = [json.loads(path.read_text())["skipped"] for path in sorted((workdir / "failed").iterdir())]
        assert skipped == [True, True, False]
    assert told[0] == told[1]
