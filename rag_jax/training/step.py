"""The state of training and the one jitted step."""

import ctypes
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rag_jax import data, rag
from rag_jax.distributed import sharding
from rag_jax.training import optim, signals

# Arrays in the structure of parameters, or their shapes or shardings: transformations take and give them alike.
Tree = Any
Metrics = dict[str, jax.Array]
Gradients = Callable[[Tree, Tree, data.Batch, jax.Array], tuple[Tree, Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds. Random keys and the order of rows are functions of (seed, step)."""

    step: Tree  # int32, shape (): updates done, skipped ones too
    params: Tree  # float32, the trainable leaves; None in place of a frozen one
    frozen: Tree  # the others; None in place of a trainable one
    opt_state: Tree


# (state, batch, what each device is asked, see `signals.Requests`) -> (the next state, metrics)
Step = Callable[[TrainState, data.Batch, jax.Array | None], tuple[TrainState, Metrics]]


def init_state(params: Tree, frozen: Tree, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Step 0 around parameters that lie on the mesh; the optimizer's moments are born beside them."""
    init = functools.partial(_init, optimizer)
    shardings = state_shardings(jax.eval_shape(init, params, frozen), mesh)
    return jax.jit(init, out_shardings=shardings, donate_argnums=(0, 1))(params, frozen)


def abstract_state(params: Tree, frozen: Tree, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The shapes and places of `init_state`'s result for abstract parameters; no array is made."""
    state = jax.eval_shape(functools.partial(_init, optimizer), params, frozen)
    shardings = state_shardings(state, mesh)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)


def _init(optimizer: optax.GradientTransformation, params: Tree, frozen: Tree) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, frozen, optimizer.init(params))


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Shardings of a state: parameters by the rules; the optimizer's leaves like the parameter they are of."""
    whole = NamedSharding(mesh, PartitionSpec())

    def shardings(tree: Tree) -> Tree:
        scalars = jax.tree.map(lambda a: whole if a.ndim == 0 else None, tree)
        arrays = sharding.param_shardings(mesh, jax.tree.map(lambda a: None if a.ndim == 0 else a, tree))
        return jax.tree.map(lambda s, a: a if s is None else s, scalars, arrays, is_leaf=lambda x: x is None)

    return jax.tree.unflatten(
        jax.tree.structure(state),
        jax.tree.leaves((whole, shardings(state.params), shardings(state.frozen), shardings(state.opt_state))),
    )


def make_train_step(
    model: rag.Rag,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[jax.Array], jax.Array],
    shardings: TrainState,
    *,
    dropout_seed: int | None,
    skips_nonfinite: bool = False,
) -> Step:
    """One update of both models, compiled once: total loss, its gradients, optax. The old state's memory is reused.

    Losses are those of the batch before the update. `dropout_seed` None: no dropout at all. `skips_nonfinite`: a
    non-finite loss or gradient norm leaves parameters and optimizer as they are, its count of updates too.
    """

    gradients = make_gradients(model, shardings.params, shardings.frozen, dropout_seed)

    def train_step(state: TrainState, batch: data.Batch, asked: jax.Array | None) -> tuple[TrainState, Metrics]:
        grads, metrics = gradients(state.params, state.frozen, batch, state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates_done = optim.updates_done(state.opt_state) if skips_nonfinite else state.step
        norms = {role: optax.tree.norm(of_model) for role, of_model in grads.items() if jax.tree.leaves(of_model)}
        metrics |= {
            "optim/learning_rate": jnp.asarray(learning_rate(updates_done), jnp.float32),
            "optim/grad_norm": optax.tree.norm(norms),
            **{f"optim/grad_norm_{role}": norm for role, norm in norms.items()},  # each is clipped on its own
        }
        if asked is not None:
            # This exchange must wait for all others, and so for the norm (nothing is above infinity): processes on CPUs
            # begin exchanges that wait for nothing in an order of their own, and then gloo ends the run.
            metrics["asked"] = jnp.max(asked + (metrics["optim/grad_norm"] > jnp.inf).astype(asked.dtype))
        params = optax.apply_updates(state.params, updates)
        if skips_nonfinite:
            finite = jnp.isfinite(metrics["loss/total"]) & jnp.isfinite(metrics["optim/grad_norm"])
            new, old = (params, opt_state), (state.params, state.opt_state)
            params, opt_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        return TrainState(state.step + 1, params, state.frozen, opt_state), metrics

    mesh = shardings.step.mesh
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, sharding.BATCH)
    inputs = (shardings, rows, NamedSharding(mesh, signals.EACH_DEVICE))
    return jax.jit(train_step, in_shardings=inputs, out_shardings=(shardings, whole), donate_argnums=0)


def compile_step(
    step: Step, state: TrainState, batch: data.Batch, asked: jax.Array | None, options: Mapping[str, Any] | None = None
) -> Step:
    """The step as a program for batches of this one's shapes. `options`: of XLA.

    What the compiler took goes back to the system: glibc would keep it for the process, half a gigabyte that the
    program's own memory then stands beside.
    """
    program = step.lower(state, batch, asked).compile(compiler_options=dict(options or {}))
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # of glibc alone
            trim(0)
    return program


def make_gradients(model: rag.Rag, trainable: Tree, frozen: Tree, dropout_seed: int | None) -> Gradients:
    """`gradients(trainable, frozen, batch, step) -> (of the trainable, metrics)`, every device on its own rows.

    Made from the shardings of both. Metrics are sums over all devices, gradients lie like their parameters.
    """
    mesh = jax.tree.leaves(trainable)[0].mesh
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, sharding.BATCH)
    if axes := sharding.batch_axes(mesh):
        gather = functools.partial(sharding.gather_params, optim.join(trainable, frozen))
        model = dataclasses.replace(model, shard=rag.Shard(axes), gather=gather)
    model = dataclasses.replace(model, trains_generator=bool(jax.tree.leaves(trainable.get("generator"))))

    def own(params: Tree, others: Tree, batch: data.Batch, step: jax.Array) -> tuple[Tree, Metrics]:
        key = None if dropout_seed is None else jax.random.fold_in(jax.random.key(dropout_seed), step)

        def share(params: Tree) -> tuple[jax.Array, Metrics]:
            return rag.loss(model, optim.join(params, others), batch, key)

        grads, metrics = jax.grad(share, has_aux=True)(params)
        return sharding.sum_gradients(grads, trainable), jax.tree.map(model.shard.total, metrics)

    def gradients(params: Tree, others: Tree, batch: data.Batch, step: jax.Array) -> tuple[Tree, Metrics]:
        inputs = (trainable, frozen, jax.tree.map(lambda _: rows, batch), whole)
        return sharding.on_each_device(own, mesh, inputs, (trainable, whole))(params, others, batch, step)

    return gradients
