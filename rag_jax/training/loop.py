"""The training loop: step, write down, evaluate, save, until all steps are done or a signal ends it."""

import contextlib
import pathlib
import signal
from collections.abc import Iterator

import jax

from rag_jax import config as configs
from rag_jax import pair
from rag_jax.config import Config
from rag_jax.distributed import compile_cache, processes, sharding
from rag_jax.evaluation import evaluation
from rag_jax.evaluation.metrics import HIGHER_IS_BETTER
from rag_jax.progress import Progress
from rag_jax.training import announce, feed, optim, setup, trackers, watch
from rag_jax.training.record import Facts, Record, due
from rag_jax.training.setup import Training, say
from rag_jax.training.signals import Request, Requests, stop_signals
from rag_jax.training.step import Metrics, TrainState
from rag_jax.training.writer import open_writer
from rag_jax.workdir import checkpoint, lock, provenance
from rag_jax.workdir.checkpoint import Checkpoints, set_aside


def train(config: Config, workdir: pathlib.Path) -> int:
    """Train to `total_steps`, from the newest whole checkpoint; the number of the signal that ended it, or 0.

    UserError for what the config, its files or the machine make impossible, before anything is compiled.
    """
    trackers.check(config.log.trackers)
    compile_cache.keep_compiled()
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    sharding.check_batch(mesh, config.batch_size, config.group_size)
    start_step, damaged = setup.newest_checkpoint(config, workdir)
    with processes.all_or_none():
        training = setup.build(config, workdir, mesh, start_step)
        say(training, announce.summary(training, start_step))
        if start_step:
            was = configs.flat(configs.load_workdir(workdir))["total_steps"]
            if line := announce.rate_change(config.optimizer, start_step, was, config.total_steps):
                say(training, line)
        inputs = provenance.of_run(config, training.examples)
        if start_step:
            provenance.check(workdir, config, inputs)
        params = None if start_step else pair.pretrained_params(training.opened, mesh)
    processes.check_agreement(setup.shared_facts(training, start_step))
    sharding.connect(mesh)
    with contextlib.ExitStack() as stack:
        with processes.all_or_none():
            if training.is_main:
                stack.enter_context(lock.only_writer(workdir))
        with processes.all_or_none():
            setup.check_newest(workdir, max([start_step, *damaged]))
            if training.is_main:
                setup.write_workdir(training, start_step, inputs)
                for line in set_aside(workdir, damaged):
                    say(training, line)
        kept = (config.checkpoint.keep, config.checkpoint.keep_every)
        checkpoints = stack.enter_context(Checkpoints(workdir, *kept, HIGHER_IS_BETTER))
        if start_step >= config.total_steps:
            say(training, f"{workdir} is trained to step {start_step} already; total_steps={config.total_steps}")
            return 0
        if start_step and checkpoint.exhausted(earlier_scores(training, start_step), config.eval.patience):
            say(training, f"{workdir} has ended early at step {start_step}; raise eval.patience to go on")
            return 0
        if start_step:
            state = setup.restore(training, checkpoints, start_step)
        else:
            state = setup.pretrained(training, params)
            setup.keep_fingerprints(training, state)
        with processes.ends_at_once():
            return loop(training, state, checkpoints, start_step)


def loop(training: Training, state: TrainState, checkpoints: Checkpoints, start_step: int) -> int:
    """All steps after `start_step`; the number of the signal that ended them early, or 0."""
    config, total_steps = training.config, training.config.total_steps
    scores, ended = earlier_scores(training, start_step), ""
    with stop_signals() as received, opened_record(training, state, start_step) as record:
        # One process goes by the clock, and the others by what it asks.
        requests = Requests(received, 60 * config.checkpoint.every_minutes if training.is_main else 0.0)
        programs = feed.Programs(training, record.progress)
        pending: tuple[int, Metrics, Facts] | None = None
        if start_step == 0:
            evaluate(training, state, 0, record, scores)
        spans = feed.spans(training, lambda: state, start_step, record)
        for step, (batch, facts) in enumerate(feed.batches(training, spans), start=start_step + 1):
            asked = requests.for_step(training.mesh)
            if pending and facts.lengths not in programs.by_shape:
                write(record, requests, *pending)  # else what it takes while the next is compiled would count as none
                pending = None
            with record.pausing("compile"):
                program = programs.for_batch(state, batch, asked, facts.lengths)
            # Returns as soon as the step is under way, so the devices have work while the step before it, which must
            # be done by then, is written down here and the next batch is brought.
            state, metrics = program(state, batch, asked)
            if pending:
                write(record, requests, *pending)
            pending = step, metrics, facts
            checkpoints.check_saving()
            if jax.process_count() == 1:
                requests.hear(requests.own())
            last = step == total_steps or requests.agreed == Request.STOP
            evaluates = step == total_steps or due(step, config.eval.every_steps)
            saves = last or requests.agreed == Request.SAVE or due(step, config.checkpoint.every_steps)
            if evaluates or saves or due(step, config.mining.every_steps):
                # What follows uses the new parameters: their step must be done, and its numbers must be finite.
                write(record, requests, *pending)
                pending = None
            if evaluates:
                evaluate(training, state, step, record, scores)
                if checkpoint.exhausted(scores, config.eval.patience) and step < total_steps:
                    last, ended = True, f"; ended early: {config.eval.patience} evaluations brought nothing better"
            if saves or last:
                save(training, state, checkpoints, step, record)
                requests.saved()
            if last:
                break
        say(training, record.summary())
        checkpoints.wait()
    if requests.stopped_by and step < total_steps and not ended:
        saved = "saved; the same command goes on from there" if saves_at_all(config) else "not saved"
        say(training, f"stopped by {signal.Signals(requests.stopped_by).name} after step {step}: {saved}")
        return requests.stopped_by
    export = f"python -m rag_jax.export --workdir={training.workdir} --out=DIR"
    say(training, f"trained to step {step}{ended}; next: {export}")
    return 0


@contextlib.contextmanager
def opened_record(training: Training, state: TrainState, start_step: int) -> Iterator[Record]:
    """The record of a run that goes on after `start_step`; on all processes but one it writes nothing."""
    config, is_main = training.config, training.is_main
    models = {role: training.opened.sources[role].model_config for role in setup.used_roles(training.opened)}
    # What was skipped before a stop counts too, and the optimizer knows of it.
    skipped = start_step - int(jax.device_get(optim.updates_done(state.opt_state)))
    nonfinite = watch.NonFinite(
        training.workdir,
        config.guard.skip_nonfinite,
        skipped,
        lambda step: feed.rows_of(training, step),
        write=is_main,
    )
    services, values = config.log.trackers, configs.flat(config)
    with open_writer(training.workdir, start_step, active=is_main, services=services, config=values) as writer:
        progress = Progress(config.total_steps, start_step, active=is_main)
        try:
            yield Record(config, models, writer, progress, nonfinite, setup.generator_learns(config, state.params))
        finally:
            progress.close()


def write(record: Record, requests: Requests, step: int, metrics: Metrics, facts: Facts) -> None:
    """Record a step once it is done, and hear what was asked of all processes before it."""
    requests.hear(int(metrics.pop("asked", Request.NOTHING)))
    record.train(step, metrics, facts)


def evaluate(training: Training, state: TrainState, step: int, record: Record, scores: dict[int, float]) -> None:
    """Metrics on the held-out rows, if there are any, to the record and `eval/step_N.json`, and to `scores`."""
    if training.eval_rows is None:
        return
    with record.pausing("eval"):
        params = optim.join(state.params, state.frozen)
        result = evaluation.evaluate(training.opened.model, params, training.eval_rows)
        content = evaluation.record(result, training.eval_rows, training.opened.model, step)
        if training.is_main:
            evaluation.write_record(training.workdir, content, result.by_row)
        score = checkpoint.score(content, content.get("best_by"), HIGHER_IS_BETTER)
        scores |= {} if score is None else {step: score}
        record.evaluation(step, result.metrics, result.by_row)


def earlier_scores(training: Training, start_step: int) -> dict[int, float]:
    """Scores of the evaluations in this run's loop up to the step it goes on from; not those of the command."""
    every = training.config.eval.every_steps
    known = checkpoint.scores(training.workdir, HIGHER_IS_BETTER) if start_step else {}
    return {step: score for step, score in known.items() if step <= start_step and (step == 0 or due(step, every))}


def saves_at_all(config: Config) -> bool:
    return config.checkpoint.every_steps > 0 or config.checkpoint.every_minutes > 0


def save(training: Training, state: TrainState, checkpoints: Checkpoints, step: int, record: Record) -> None:
    """Start saving, if the run saves at all; training goes on while the files are written."""
    if saves_at_all(training.config):
        with record.pausing("checkpoint"):
            checkpoints.save(step, {"params": state.params, "opt_state": state.opt_state})
