"""What one process asks, all do after the same step; a process alone pays nothing for it."""

import signal

import jax
import numpy as np
import optax
import pytest
from test_mesh import ALL, mesh_of
from test_rag import make, make_rows

from rag_jax.distributed import sharding
from rag_jax.training import optim, signals
from rag_jax.training import step as train_step
from rag_jax.training.signals import Request, Requests


def test_a_signal_holds_and_a_save_is_due_once_a_period(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    received = []
    requests = Requests(received, save_every_s=60.0)
    assert requests.own() == Request.NOTHING and Requests([], 0.0).own() == Request.NOTHING
    now[0] = 60.0
    assert requests.own() == Request.SAVE
    requests.hear(requests.own())
    requests.hear(Request.NOTHING)  # a later step, asked nothing
    assert requests.agreed == Request.SAVE and requests.stopped_by == 0
    requests.saved()
    assert requests.agreed == requests.own() == Request.NOTHING
    received.append(signal.SIGINT)
    requests.hear(requests.own())
    requests.saved()
    assert requests.agreed == Request.STOP and requests.stopped_by == signal.SIGINT
    other = Requests([], 0.0)
    other.hear(Request.STOP)
    assert other.stopped_by == signal.SIGTERM  # another process's


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2)])
def test_what_one_device_is_asked_comes_out_of_the_step_on_all(shape, monkeypatch):
    """Also where devices share the rows of a batch (along `model`) and their processes ask for different things."""
    (model, params), mesh, optimizer = make("gpt2"), mesh_of(shape), optax.sgd(1e-2)
    state = train_step.abstract_state(*optim.split_frozen(params, ALL), optimizer, mesh)
    places = jax.tree.map(lambda a: a.sharding, state)
    step = train_step.make_train_step(model, optimizer, lambda step: 1e-2, places, dropout_seed=None)
    batch = sharding.put_batch(mesh, make_rows(32), 32)
    assert Requests([signal.SIGTERM], 0.0).for_step(mesh) is None  # alone
    alone = step.lower(state, batch, None)
    assert "asked" not in alone.out_info[1]
    assert len(jax.tree.leaves(alone.in_avals)) == len(jax.tree.leaves((state, batch)))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    array = Requests([signal.SIGTERM], 0.0).for_step(mesh)
    assert array.shape == (8,) and (np.asarray(array) == Request.STOP).all()
    monkeypatch.undo()
    compiled = step.lower(state, batch, array).compile()
    placed = jax.device_put(jax.tree.map(np.array, params), places.params)
    for device in (0, 1, 7):
        asked = np.where(np.arange(8) == device, Request.STOP, Request.NOTHING).astype(np.int32)
        state = train_step.init_state(jax.tree.map(lambda a: a.copy(), placed), places.frozen, optimizer, mesh)
        _, metrics = compiled(state, batch, jax.device_put(asked, array.sharding))
        assert all(int(part.data) == Request.STOP for part in metrics["asked"].addressable_shards)
