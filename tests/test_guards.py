"""Numbers that are none end a run or are skipped, losses that leap are noted, and a step can be taken apart again."""

import dataclasses
import json
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_mesh import ALL, mesh_of
from test_rag import make, make_rows

from rag_jax import guards, optim, sharding, train_step
from rag_jax.errors import UserError

NAN = float("nan")


def guard(tmp_path, allowed=0, skipped=0):
    return guards.NonFinite(tmp_path, allowed, skipped, lambda step: np.array([step, 7]), write=True)


def test_good_numbers_pass(tmp_path):
    assert guard(tmp_path).check(3, {"loss/total": 1.0, "optim/grad_norm": 2.0}) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["loss/total", "optim/grad_norm"])
def test_a_number_that_is_none_ends_the_run_with_its_rows_in_a_file(tmp_path, name):
    numbers = {"loss/total": 1.0, "optim/grad_norm": 2.0} | {name: math.inf}
    told = (
        rf"{name} is inf at step 3; nothing of it was saved. .*step_3.json has its rows, and python -m rag_jax.replay "
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
    leaps = guards.Leaps(3.0, written)
    median = statistics.median(written[-1 - guards.WINDOW : -1])
    assert leaps.ratio(2.9 * median) is None
    assert leaps.ratio(3.1 * median) == pytest.approx(3.1)
    assert leaps.ratio(NAN) is None
    assert guards.Leaps(0.0, written).ratio(1e9) is None
    assert guards.Leaps(3.0, written[: guards.FEWEST - 1]).ratio(1e9) is None


def test_a_skipped_update_changes_nothing_but_the_step():
    """A row that touches an embedding of infinity, between two that do not, against optax by hand."""
    model, params = make("gpt2")
    good, bad = (make_rows(32, seed=n) for n in (0, 1))
    used = [set(np.unique(rows.query_ids[rows.query_mask])) for rows in (good, bad)]
    token = min(used[1] - used[0] - set(np.unique(good.passage_ids)))
    embedding = params["retriever"]["embeddings"]["token"]["embedding"]
    params["retriever"]["embeddings"]["token"]["embedding"] = embedding.at[token].set(jnp.inf)
    mesh, optimizer = mesh_of((1, 1, 1)), optax.adam(lambda count: 0.01 / (1 + count))
    trainable, frozen = optim.split_frozen(params, ALL)
    places = jax.tree.map(lambda a: a.sharding, train_step.abstract_state(trainable, frozen, optimizer, mesh))
    step = train_step.make_train_step(
        model, optimizer, lambda n: 0.01 / (1 + n), places, dropout_seed=None, skips_nonfinite=True
    )
    placed = jax.device_put(jax.tree.map(np.array, trainable), sharding.param_shardings(mesh, trainable))
    state, values = step(train_step.init_state(placed, frozen, optimizer, mesh), sharding.put_batch(mesh, good, 32))
    assert np.isfinite(values["loss/total"])
    before = jax.device_get(state)
    state, values = step(state, sharding.put_batch(mesh, bad, 32))
    assert not np.isfinite(values["optim/grad_norm"])
    after = jax.device_get(state)
    assert after.step == before.step + 1 == 2
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (before.params, before.opt_state))
    assert int(optim.updates_done(state.opt_state)) == 1
    state, values = step(state, sharding.put_batch(mesh, good, 32))
    np.testing.assert_allclose(values["optim/learning_rate"], 0.01 / 2)
    assert int(optim.updates_done(state.opt_state)) == 2
    # The same update as right after the first: the skipped one left no trace.
    again, _ = step(
        jax.device_put(dataclasses.replace(before, step=np.int32(1)), places), sharding.put_batch(mesh, good, 32)
    )
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), jax.device_get(again.params))
