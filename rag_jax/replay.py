"""Replay: take one step of a run again, from its checkpoints, and show what each of its rows gives.

    python -m rag_jax.replay --workdir=DIR --step=N

The newest checkpoint before step N is restored, the steps between are taken again (to the same bits), and step N is
taken apart: its losses, the gradients and parameters that are not finite, and a line a row. Nothing is written.
"""

import functools
import pathlib
from typing import Any

from rag_jax import cli, config
from rag_jax.errors import UserError

# Of the embeddings of a row's texts.
NORMS = ("|query|", "|passages|")


def main() -> None:
    flags = cli.parser("replay", __doc__)
    flags.add_argument("--workdir", required=True, type=cli.path, metavar="DIR", help="a run")
    flags.add_argument("--step", required=True, type=int, metavar="N", help="the step; those of failed/step_N.json")
    args, overrides = cli.parse(flags)
    loaded = config.load_workdir(args.workdir, overrides | {"eval.every_steps": 0})
    if not 1 <= args.step <= loaded.total_steps:
        raise UserError(f"--step={args.step}: the run has steps 1 to {loaded.total_steps}")
    replay(loaded, args.workdir, args.step)


def replay(loaded: Any, workdir: pathlib.Path, step: int) -> None:
    """Print all about a step; see above."""
    from rag_jax import pair
    from rag_jax.distributed import compile_cache, sharding
    from rag_jax.progress import Progress
    from rag_jax.training import announce, feed, optim, setup
    from rag_jax.workdir import provenance
    from rag_jax.workdir.checkpoint import Checkpoints

    compile_cache.keep_compiled()
    mesh = sharding.make_mesh(**loaded.mesh.to_dict())
    with Checkpoints(workdir) as checkpoints:
        start, damaged = checkpoints.newest_good(before=step)
        training = setup.build(loaded, workdir, mesh, start or 0)
        setup.say(training, announce.summary(training, start or 0))
        provenance.check(workdir, loaded, provenance.of_run(loaded, training.examples))
        for bad, problem in damaged.items():
            print(f"checkpoint {bad} is damaged ({problem})")
        if start:
            state = setup.restore(training, checkpoints, start)
        else:
            state = setup.pretrained(training, pair.pretrained_params(training.opened, mesh))
    programs = feed.Programs(training, Progress(step, start or 0))
    print(f"replay     steps {(start or 0) + 1} to {step}", flush=True)
    spans = feed.spans_of_before(training, start or 0)
    for number, (batch, facts) in enumerate(feed.batches(training, spans), (start or 0) + 1):
        if number == step:
            break
        state, _ = programs.for_batch(state, batch, None, facts.lengths)(state, batch, None)
    params, dropout_seed = (
        optim.join(state.params, state.frozen),
        loaded.seed if setup.has_dropout(training.opened) else None,
    )
    for line in taken_apart(training, state, batch, dropout_seed):
        print(line)
    for line in row_lines(training, params, feed.batch_of(training, step), dropout_seed, step - 1):
        print(line)


def taken_apart(training: Any, state: Any, batch: Any, dropout_seed: int | None) -> list[str]:
    """The step's metrics, and how much of each parameter and of its gradient is not finite."""
    import jax
    import jax.numpy as jnp

    from rag_jax.training import step as train_step
    from rag_jax.workdir import checkpoint

    places = jax.tree.map(lambda a: a.sharding, state)
    gradients = train_step.make_gradients(training.opened.model, places.params, places.frozen, dropout_seed)

    @jax.jit
    def not_finite(tree: Any) -> Any:
        return jax.tree.map(lambda a: jnp.sum(~jnp.isfinite(a)), tree)

    grads, values = jax.jit(gradients)(state.params, state.frozen, batch, state.step)
    lines = [f"{name:<18}{float(value):.6g}" for name, value in sorted(values.items())]
    for what, tree in (("gradient", grads), ("parameter", state.params), ("parameter", state.frozen)):
        for path, count in checkpoint.flatten(not_finite(tree)).items():
            if count:
                lines.append(f"{what} {path}: {int(count):,} numbers are not finite")
    return lines


def row_lines(training: Any, params: Any, batch: Any, dropout_seed: int | None, step: int) -> list[str]:
    """A line a row: its number, its loss terms, those that are not finite marked, and its query."""
    import jax
    import numpy as np

    key = None if dropout_seed is None else jax.random.fold_in(jax.random.key(dropout_seed), step)
    terms = jax.jit(functools.partial(row_terms, training.opened.model))(params, batch, key)
    first = [name for name in NORMS if name in terms]  # the terms of the loss behind them
    terms = {name: np.asarray(terms[name]) for name in [*first, *(name for name in terms if name not in NORMS)]}
    lines = ["row      " + "  ".join(f"{name:>16}" for name in terms)]
    for place, row in enumerate(batch.row):
        shown = "  ".join(f"{values[place]:>16.6g}" for values in terms.values())
        wrong = [name for name, values in terms.items() if not np.isfinite(values[place])]
        query = training.examples.rows.queries[row]
        lines.append(f"{row:<9}{shown}  {'NOT FINITE ' if wrong else ''}{query[:60]!r}")
    return lines


def row_terms(model: Any, params: Any, batch: Any, key: Any) -> dict[str, Any]:
    """What each row brings to the loss, (B,) each, the batch on one device.

    |query| and |passages| (of the slots beside it, their mean) are norms of embeddings, 1 where all is well; the others
    are the terms of the loss in nats. One row that is not finite makes the contrastive term of all others so, and the
    marginal of its group.
    """
    import jax.numpy as jnp

    from rag_jax import rag

    norms, embs, keys = {}, None, rag.row_keys(model, batch, key)
    if model.objective.uses_retriever:
        embs = rag.embed(model, params, batch, keys)
        for name, emb in zip(NORMS, embs, strict=True):
            norms[name] = jnp.linalg.norm(emb, axis=-1).reshape(len(emb), -1).mean(axis=1)
    return norms | {name: term.nats_B for name, term in rag.terms(model, params, batch, embs, keys).items()}


if __name__ == "__main__":
    cli.run(main)
