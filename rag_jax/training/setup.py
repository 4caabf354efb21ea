"""How a run starts: anew or from a checkpoint, with everything it needs but the values of its parameters."""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from rag_jax import config as configs
from rag_jax import data, files, hf, pair, rag
from rag_jax.config import Config
from rag_jax.distributed import fingerprint, processes, sharding
from rag_jax.errors import UserError
from rag_jax.evaluation import evaluation
from rag_jax.evaluation.metrics import HIGHER_IS_BETTER
from rag_jax.models import adapters
from rag_jax.objectives import OBJECTIVES, ROLES
from rag_jax.planning import fit
from rag_jax.training import optim, overlap
from rag_jax.training.step import Step, TrainState, Tree, abstract_state, init_state, make_train_step
from rag_jax.workdir import provenance, untrained
from rag_jax.workdir.checkpoint import Checkpoints

# Keys that may differ between a run and its continuation; all others change what the checkpoint means.
MAY_CHANGE = (
    "total_steps", "mesh", "checkpoint", "guard", "log", "eval", "data.eval", "data.passages", "data.eval_columns",
    "data.passages_columns", "retriever.remat",
    "retriever.chunk_size", "generator.remat",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Training:
    """Everything that stays the same from the first step to the last."""

    config: Config
    workdir: pathlib.Path
    opened: pair.Pair
    mesh: Mesh
    examples: data.Examples
    report: data.Report  # of reading data.train
    batching: data.Batching
    keeps_evidence: bool  # the generator says what it says of a pair once
    eval_rows: evaluation.EvalRows | None
    eval_report: data.Report | None
    rules: optim.Rules  # of rate and freezing
    optimizer: optax.GradientTransformation
    state: TrainState  # abstract: shapes and shardings
    step: Step
    is_main: bool  # the one process that prints and writes the record


def newest_checkpoint(config: Config, workdir: pathlib.Path) -> tuple[int, dict[int, str]]:
    """The step to go on from, 0 to begin anew, and what is wrong with newer checkpoints: the same in all processes."""
    with processes.all_or_none():
        goes_on = resumable(config, workdir)
    processes.check_agreement({"--workdir": workdir.absolute(), "a checkpoint in it": goes_on})
    if not goes_on:
        return 0, {}
    with Checkpoints(workdir) as checkpoints:
        step, damaged = checkpoints.newest_good()
    return step or 0, damaged


def check_newest(workdir: pathlib.Path, newest: int) -> None:
    """UserError where `newest` (0: none) is no longer the newest step saved, whole or damaged: another run saved it.

    To be asked once the workdir is ours. That run may have held it since we looked, and trained to its end.
    """
    with Checkpoints(workdir) as checkpoints:
        now = max(checkpoints.steps(), default=0)
    if now != newest:
        raise UserError(
            f"--workdir={workdir}: another run has saved step {now} there while this one started; the same command "
            "goes on from that step, and another --workdir starts over"
        )


def resumable(config: Config, workdir: pathlib.Path) -> bool:
    """Whether the workdir holds checkpoints of this very run; UserError with the difference if they are of another."""
    if not (workdir / "config.json").is_file() or not (workdir / "checkpoints").is_dir():
        return False
    with Checkpoints(workdir) as checkpoints:
        if not checkpoints.steps():
            return False
    before, now = configs.flat(configs.load_workdir(workdir)), configs.flat(config)
    moved = provenance.compared(workdir, config)
    changed = [
        f"{name} was {before[name]!r} and is {now[name]!r}"
        for name in now
        if before[name] != now[name]
        and name not in moved
        and not any(name == key or name.startswith(f"{key}.") for key in MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"--workdir={workdir} holds a run of another config: {'; '.join(changed)}; "
            f"give the same values to go on, or another --workdir; only {', '.join(MAY_CHANGE)} may change"
        )
    return True


def build(config: Config, workdir: pathlib.Path, mesh: Mesh, start_step: int) -> Training:
    """Everything of a run that needs no array: models, rows, optimizer, step."""
    opened = pair.open_pair(config, workdir if start_step else None)
    used = used_roles(opened)
    prompt = opened.prompt if opened.whole_string is None else None
    examples, report = data.load_examples(
        config.data.train,
        key="data.train",
        columns=data.columns_of(config.data, "data.train"),
        bad_rows=config.data.bad_rows,
        retriever=opened.retriever_text if "retriever" in used or config.mining.every_steps else None,
        prompt=prompt if "generator" in used else None,
        whole_string=opened.whole_string if "generator" in used else None,
        min_rows=config.batch_size,
        negatives=config.objective.negatives if config.data.columns.negative else 0,
        gaps=gaps(opened, used),
        layout=config.data.format,
    )
    labelled = bool((examples.passage_key >= 0).all())
    opened = dataclasses.replace(opened, model=dataclasses.replace(opened.model, labelled=labelled))
    eval_rows = eval_report = None
    if config.data.eval is not None and config.eval.every_steps:
        eval_rows, eval_report = evaluation.load_rows(config, opened.retriever_text, opened.prompt)
    rules, optimizer, state, step = make_step(opened, mesh)
    objective = config.objective
    keeps = keeps_evidence(config, opened.model.objective, state.params)
    given = data.given_scores(examples, objective.evidence_temperature) if reads_scores(config) else None
    read = examples.without_prompts() if keeps else examples
    blocks = blocks_of(opened.model, mesh)
    shapes = data.buckets(read, config.batch_size, objective.candidates, objective.negatives, blocks)
    by_row = objective.candidates_from == "row"
    noisy = objective.label_noise is not None
    if noisy and not keeps:
        raise UserError(
            f"objective.label_noise={objective.label_noise}: takes evidence that is kept; freeze the generator "
            "(optimizer.rate_rules=(('generator/', 0.0), ('.*', 1.0))) and set objective.marginal_weight=0, "
            "objective.candidates_from=row and objective.kept_evidence=auto; on CPUs start one process alone"
        )
    batching = data.Batching(shapes, config.group_size, objective.negatives, by_row, given, noisy, blocks)
    return Training(
        config, workdir, opened, mesh, examples, report, batching, keeps, eval_rows, eval_report, rules, optimizer,
        state, step, is_main=jax.process_index() == 0,
    )  # fmt: skip


def blocks_of(model: rag.Rag, mesh: Mesh) -> data.Blocks | None:
    """What of a batch is packed together; None: nothing."""
    if not fit.packs(pair.this_device()) or several_on_cpus():
        return None
    return data.Blocks(model.group_size, sharding.batch_shards(mesh), model.groups_at_a_time, not model.chunk_size)


def gaps(opened: pair.Pair, used: set[str]) -> data.Gaps:
    """What rows of the run may leave open.

    A passage where candidates are mined and told apart by what the generator says of them; an answer where the
    generator says it of the question.
    """
    config, objective = opened.config, opened.model.objective
    tells_apart = {"retriever", "generator"} <= used and objective.candidates > 1 and opened.whole_string is None
    corpus = () if config.data.passages is None else (("data.passages", config.data.passages),)
    return data.Gaps(
        passage=tells_apart and config.mining.every_steps > 0,
        answer=bool(objective.formula.divergence) and objective.evidence != "answer",
        corpus=corpus,
        columns=data.columns_of(config.data, "data.passages"),
        always=config.mining.negatives_from == "corpus",
    )


def make_step(opened: pair.Pair, mesh: Mesh) -> tuple[optim.Rules, optax.GradientTransformation, TrainState, Step]:
    """The rules of rate and freezing, the optimizer, the abstract state, and the step; no array is made."""
    config = opened.config
    params = pair.abstract_params(opened, mesh)
    rules = optim.with_adapters(rate_rules(config, used_roles(opened)), params)
    trainable, frozen = split(opened, params, rules)
    check_bases(config, trainable)
    optimizer = optim.make_optimizer(config.optimizer, config.total_steps, trainable)
    state = abstract_state(trainable, frozen, optimizer, mesh)
    step = make_train_step(
        opened.model,
        optimizer,
        optim.learning_rate(config.optimizer, config.total_steps),
        jax.tree.map(lambda a: a.sharding, state),
        dropout_seed=config.seed if has_dropout(opened) else None,
        skips_nonfinite=config.guard.skip_nonfinite > 0,
    )
    return rules, optimizer, state, step


def split(opened: pair.Pair, params: Tree, rules: optim.Rules) -> tuple[Tree, Tree]:
    """What is trained and what is not. The base that both models share is held once, as the generator's."""
    trainable, frozen = optim.split_frozen(params, rules)
    if not pair.shares_base(opened.config, opened.sources):
        return trainable, frozen
    frozen = optim.borrowed(frozen)

    def own(tree: Tree) -> Tree:  # of two leaves with the same memory neither could be given away
        copied = jax.tree.map(lambda a: a.copy() if isinstance(a, jax.Array) else a, tree["retriever"])
        return tree | {"retriever": copied}

    return own(trainable), own(frozen)


def check_bases(config: Config, trainable: Tree) -> None:
    """UserError where a model would be trained in whose weights small changes are lost."""
    for role, tree in trainable.items():
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        coarse = [jax.tree_util.keystr(path, simple=True, separator="/") for path, a in leaves if a.dtype != np.float32]
        if coarse:
            raise UserError(
                f"{role}.base_dtype={config[role].base_dtype}: is of weights that are not trained, and {coarse[0]} is; "
                f"set {role}.lora.rank, freeze the model by optimizer.rate_rules, or say float32"
            )


def shared_facts(training: Training, start_step: int) -> dict[str, Any]:
    """What must be the same in all processes of a run."""
    examples = {"rows of data.train": data.fingerprint(training.examples)}
    place = {"--workdir": training.workdir.absolute(), "step to start from": start_step}
    return {f"config.{name}": value for name, value in configs.flat(training.config).items()} | place | examples


def used_roles(opened: pair.Pair) -> set[str]:
    objective = opened.model.objective
    return {role for role in opened.sources if getattr(objective, f"uses_{role}")}


def several_on_cpus() -> bool:
    """Whether the run may end because the exchanges of a step (by gloo) meet in another order in each process.

    It has been seen in steps that pack rows or keep evidence, of whose exchanges more wait for nothing.
    """
    return jax.process_count() > 1 and jax.default_backend() == "cpu"


def generator_learns(config: Config, trainable: Tree) -> bool:
    """Whether anything of the generator is trained, and on a loss that has a weight."""
    return config.objective.marginal_weight > 0 and bool(jax.tree.leaves(trainable.get("generator")))


def keeps_evidence(config: Config, objective: rag.Objective, trainable: Tree) -> bool:
    """Whether what the generator says of a pair never changes, and all that a step may ask it is known beforehand.

    Not by several processes on CPUs.
    """
    if several_on_cpus():
        return False
    is_read_alone = bool(objective.formula.divergence) and objective.marginal_weight == 0
    is_frozen = not jax.tree.leaves(trainable.get("generator"))
    by_row = config.objective.candidates_from == "row"
    return config.objective.kept_evidence == "auto" and is_read_alone and is_frozen and by_row


def reads_scores(config: Config) -> bool:
    """Whether rows bring what their passages are compared by."""
    return OBJECTIVES[config.objective.name].reads == "scores"


def rate_rules(config: Config, used: set[str]) -> optim.Rules:
    """The config's rules; a model that the objective does not use stays as it is."""
    unused = tuple((f"^{role}/", 0.0) for role in ROLES if role not in used)
    return unused + tuple(config.optimizer.rate_rules)


def has_dropout(opened: pair.Pair) -> bool:
    model_configs = [pair.model_config(opened.config, role, source) for role, source in opened.sources.items()]
    rates = [*(rate for each in model_configs for rate in pair.dropouts(each).values())]
    return any(rates) or any(each.computing.lora.dropout for each in model_configs if each.computing.lora)


def write_workdir(training: Training, start_step: int, inputs: provenance.Inputs) -> None:
    """config.json, what the run reads, and all of the models but their weights: the workdir can be used on its own."""
    files.write_whole(training.workdir / "config.json", configs.to_json(training.config))
    folder = training.workdir / "models"
    if not start_step:
        for old in (folder, training.workdir / "mining"):
            shutil.rmtree(old, ignore_errors=True)
        for role, source in training.opened.sources.items():
            hf.copy_small_files(source, folder / role)
        provenance.write(training.workdir, inputs)
        files.write_json(training.workdir / "rows.json", rows_facts(training))


# Training texts that held-out ones are compared with beyond being equal, before a run starts.
MOST_ALIKE = 20_000


def rows_facts(training: Training) -> dict[str, Any]:
    """What became of the rows, and what held-out rows have in common with them, for the report."""
    facts: dict[str, Any] = {"data.train": told(training.report)}
    if training.eval_rows is not None and training.eval_report is not None:
        facts["data.eval"] = told(training.eval_report)
        held_out = training.eval_rows.examples
        if training.config.data.eval != training.config.data.train:
            for what, found in {
                "queries": overlap.queries(training.examples, held_out, MOST_ALIKE),
                "passages": overlap.passages(training.examples, held_out, MOST_ALIKE),
            }.items():
                facts[f"shared {what}"] = {"of": found.of, "same": found.same, "alike": found.alike}
    return facts


def told(report: data.Report) -> dict[str, Any]:
    return {"summary": str(report), "read": report.rows_read, "rows": report.rows, "dropped": report.dropped}


def pretrained(training: Training, params: Tree) -> TrainState:
    return init_state(*split(training.opened, params, training.rules), training.optimizer, training.mesh)


def keep_fingerprints(training: Training, state: TrainState) -> None:
    """What the run does not train is written down, by its fingerprint. Every process must call."""
    fingerprints = fingerprint.of_params(state.frozen)
    if training.is_main:
        untrained.write(training.workdir, fingerprints)


def saved_params(opened: pair.Pair, workdir: pathlib.Path, step: int | str | None) -> tuple[int, Tree]:
    """The step that a number, "best" or "latest" stands for, and the parameters that the run had there."""
    with Checkpoints(workdir, higher_is_better=HIGHER_IS_BETTER) as checkpoints:
        found = checkpoints.find(step)
        return found, _restored(opened, workdir, checkpoints, found, pair.abstract_params(opened), {})["params"]


def trained_of_base(opened: pair.Pair, role: str) -> list[str]:
    """Paths of a model's own leaves that the run trains beside its adapters."""
    shapes = opened.shapes()
    rules = optim.with_adapters(rate_rules(opened.config, used_roles(opened)), shapes)
    rates = jax.tree_util.tree_leaves_with_path(optim.multipliers(shapes, rules)[role])
    paths = {jax.tree_util.keystr(path, simple=True, separator="/"): rate for path, rate in rates}
    return [path for path, rate in paths.items() if rate and not adapters.is_adapter(path)]


def restore(training: Training, checkpoints: Checkpoints, step: int) -> TrainState:
    abstract = training.state
    params, others = optim.join(abstract.params, abstract.frozen), {"opt_state": abstract.opt_state}
    restored = _restored(training.opened, training.workdir, checkpoints, step, params, others)
    trainable, frozen = split(training.opened, restored["params"], training.rules)
    at = jax.device_put(np.int32(step), abstract.step.sharding)
    return TrainState(at, trainable, frozen, restored["opt_state"])


def _restored(
    opened: pair.Pair, workdir: pathlib.Path, checkpoints: Checkpoints, step: int, params: Tree, others: dict[str, Tree]
) -> dict[str, Tree]:
    """All parameters and the other items of a checkpoint: what was not trained comes from the models' own folders.

    UserError where these hold something else than what the run began with.
    """
    known = untrained.read(workdir).keys()
    if pair.shares_base(opened.config, opened.sources):
        known |= {path.replace("generator/", "retriever/", 1) for path in known}
    elsewhere = known - checkpoints.paths(step, "params")
    is_saved = optim.by_path(params, lambda path: path not in elsewhere)
    saved = jax.tree.map(lambda leaf, kept: leaf if kept else None, params, is_saved)
    restored = checkpoints.restore({"params": saved, **others}, step)
    if elsewhere:
        whole = pair.base_params(opened, jax.tree.leaves(params)[0].sharding.mesh)
        rest = jax.tree.map(lambda leaf, kept: None if kept else leaf, whole, is_saved)
        paths = {role: opened.config[role].path for role in opened.sources}
        untrained.check(workdir, fingerprint.of_params(rest), paths)
        restored["params"] = optim.join(restored["params"], rest)
    return restored


def say(training: Training, text: str) -> None:
    if training.is_main:
        print(text, flush=True)
