"""Schedules against PyTorch's, updates against AdamW written out, rules by path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from rag_jax.errors import UserError
from rag_jax.training import optim

ALL = ((".*", 1.0),)


def section(**changes):
    values = {
        "learning_rate": 0.1,
        "schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "clip_norm": None,
        "rate_rules": ALL,
        "decay_rules": ALL,
    }
    return ConfigDict(values | changes)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(
    "schedule", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
)
def test_schedules_are_those_of_transformers_with_the_warmup_one_step_ahead(schedule, warmup):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    total, peak = 30, 2e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = transformers.get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    theirs = []
    for _ in range(total + 1):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    if schedule != "constant":
        theirs[:warmup] = theirs[1 : warmup + 1]
    rate = optim.learning_rate(section(learning_rate=peak, schedule=schedule, warmup_steps=warmup), total)
    ours = [float(rate(step)) for step in range(total + 1)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-9)
    assert all(ours[step] > 0 for step in range(total))


def test_a_warmup_longer_than_the_run_still_moves_at_every_step():
    rate = optim.learning_rate(section(schedule="linear", warmup_steps=100), 18)
    np.testing.assert_allclose([float(rate(0)), float(rate(17))], [0.001, 0.018], rtol=1e-6)


def numpy_adamw(params, grads_by_step, rates, decays, clip):
    """AdamW from its definition, float64, one array a path."""
    moments = {k: (np.zeros_like(p), np.zeros_like(p)) for k, p in params.items()}
    for t, grads in enumerate(grads_by_step, 1):
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, g in grads.items():
            g = g * min(1.0, clip / norm)
            m, v = moments[k]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            moments[k] = m, v
            direction = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            params[k] = params[k] - rates[k] * (direction + decays[k] * params[k])
    return params


def test_updates_are_adamw_with_each_model_clipped_by_itself_and_multipliers_by_path():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "bias": (4,), "slow": (2,)}
    # The second model's gradients are far longer, and a part of the first one's are short enough to be left alone.
    sizes = {"retriever": (0.01, 1, 10, 10), "generator": (100, 1000, 100, 1000)}
    params = {role: {k: rng.normal(size=s) for k, s in shapes.items()} for role in sizes}
    grads_by_step = {
        role: [{k: size * rng.normal(size=s) for k, s in shapes.items()} for size in of_steps]
        for role, of_steps in sizes.items()
    }
    expected = {
        role: numpy_adamw(
            dict(params[role]),
            grads_by_step[role],
            rates={"kernel": 0.1, "bias": 0.1, "slow": 0.025},
            decays={"kernel": 0.3, "bias": 0.0, "slow": 0.15},
            clip=1.5,
        )
        for role in sizes
    }
    config = section(
        weight_decay=0.3,
        clip_norm=1.5,
        rate_rules=(("slow", 0.25), (".*", 1.0)),
        decay_rules=(("bias$", 0.0), ("slow", 0.5), (".*", 1.0)),
    )
    tree = jax.tree.map(jnp.float32, params)
    optimizer = optim.make_optimizer(config, 4, tree)
    state = optimizer.init(tree)
    for step in range(4):
        grads = {role: jax.tree.map(jnp.float32, of_steps[step]) for role, of_steps in grads_by_step.items()}
        updates, state = optimizer.update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
    for role, of_model in expected.items():
        for name, value in of_model.items():
            np.testing.assert_allclose(tree[role][name], value, rtol=2e-5, atol=5e-6, err_msg=f"{role}/{name}")


def test_updates_are_counted_by_the_one_schedule():
    params = {"retriever": {"kernel": jnp.ones(3)}}
    optimizer = optim.make_optimizer(section(weight_decay=0.1, clip_norm=1.0), 9, params)
    state = optimizer.init(params)
    for _ in range(2):
        _, state = optimizer.update(params, state, params)
    assert int(optim.updates_done(state)) == 2
    second = optax.chain(optimizer, optax.scale_by_schedule(lambda count: 1.0))
    with pytest.raises(ValueError, match="the optimizer has 2 schedules"):
        optim.updates_done(second.init(params))
    with pytest.raises(ValueError, match="the optimizer has 0 schedules"):
        optim.updates_done(optax.adam(0.1).init(params))  # keeps a count, but the rate is no function of it


def params_of_two():
    layers = {"attention": {"kernel": jnp.ones((2, 3))}, "norm": {"scale": jnp.ones(3)}}
    return {"retriever": layers, "generator": {**layers, "head": {"kernel": jnp.ones((3, 5))}}}


def test_the_first_rule_found_in_the_path_holds():
    rules = (("generator/.*scale", 0.5), ("generator/", 0.25), ("kernel$", 2.0), (".*", 1.0))
    tree = optim.multipliers(params_of_two(), rules)
    assert tree["generator"]["norm"]["scale"] == 0.5
    assert tree["generator"]["head"]["kernel"] == tree["generator"]["attention"]["kernel"] == 0.25
    assert tree["retriever"]["attention"]["kernel"] == 2.0
    assert tree["retriever"]["norm"]["scale"] == 1.0


def test_rules_must_cover_every_parameter():
    config = section(rate_rules=(("retriever/", 1.0), ("head", 1.0)))
    with pytest.raises(
        UserError,
        match=r"optimizer\.rate_rules: no rule covers generator/attention/kernel, generator/norm/scale; end with",
    ):
        optim.make_optimizer(config, 1, params_of_two())
    with pytest.raises(UserError, match=r"optimizer\.decay_rules: no rule covers"):
        optim.make_optimizer(section(weight_decay=0.1, decay_rules=(("head", 1.0),)), 1, params_of_two())


def test_frozen_leaves_are_left_out_and_joined_again():
    params = params_of_two()
    trainable, frozen = optim.split_frozen(params, (("retriever/", 0.0), (".*", 1.0)))
    assert jax.tree.leaves(trainable["retriever"]) == [] and jax.tree.leaves(frozen["generator"]) == []
    joined = optim.join(trainable, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a is b, joined, params)))
    optimizer = optim.make_optimizer(section(weight_decay=0.1, clip_norm=1.0), 3, trainable)
    state = optimizer.init(trainable)
    arrays = [a for a in jax.tree.leaves(state) if a.ndim]
    assert len(arrays) == 2 * len(jax.tree.leaves(trainable)), "moments for the trainable parameters only"
    updates, _ = jax.jit(optimizer.update)(trainable, state, trainable)
    assert jax.tree.structure(updates) == jax.tree.structure(trainable)
    joined = optim.join(optax.apply_updates(trainable, updates), frozen)
    assert joined["retriever"]["norm"]["scale"] is params["retriever"]["norm"]["scale"]
    assert float(jnp.max(joined["generator"]["head"]["kernel"])) < 1.0


def test_freezing_everything_is_refused():
    with pytest.raises(UserError, match="every parameter is frozen"):
        optim.split_frozen(params_of_two(), ((".*", 0.0),))
