"""What a run is about to do, in a few lines, for a look before it takes hours."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from rag_jax import data, files, hf, models, pair
from rag_jax.config import Config
from rag_jax.hf import known
from rag_jax.models import adapters, flops
from rag_jax.training import optim, setup
from rag_jax.training.setup import Training
from rag_jax.training.step import Tree


def summary(training: Training, start_step: int) -> str:
    """One line a topic."""
    config, opened, mesh = training.config, training.opened, training.mesh
    objective, devices = opened.model.objective, mesh.devices.size
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    lines = {"devices": f"{devices} {jax.devices()[0].device_kind} ({axes})"}
    for role, source in opened.sources.items():
        lines[role] = model_line(training, role, source)
    lines["attention"] = attention_line(training)
    lines["rows"] = str(training.report)
    if training.eval_rows is not None:
        counts = training.eval_rows.counts()
        lines["evaluation"] = (
            f"{counts['queries']:,} queries against {counts['passages']:,} passages and {counts['answers']} greedy "
            f"answers, every {config.eval.every_steps} steps"
            + ("" if config.data.eval == config.data.train else f"; {training.eval_report}")
        )
    weights = objective.formula.weights(objective)
    own = " of those that it brings" if objective.candidates_from == "row" else ""
    lines["objective"] = f"{objective.name}: {', '.join(weights)}, K = {objective.candidates} candidates a query{own}"
    if training.keeps_evidence:
        lines["evidence"] = f"of the frozen generator, computed once and kept in {files.folder() / 'evidence'}"
        if objective.label_noise is not None:
            lines["evidence"] += f"; it corrects labels by a margin of {objective.label_noise:g}"
    lines |= batch_lines(config, labelled=bool((training.examples.passage_key >= 0).any()))
    if every := config.mining.every_steps:
        margin = config.mining.margin
        sought = ", and candidates of rows that name no passage" if not opened.model.labelled else ""
        lines["mining"] = f"groups of near passages{sought}, anew every {every} steps" + (
            "" if margin is None else f"; kept apart: passages that score above a query's own by more than {margin:g}"
        )
    lines["lengths"] = lengths_line(training.batching.shapes)
    epochs = config.total_steps * config.batch_size / len(training.examples)
    late = config.optimizer.schedule != "constant" and config.optimizer.warmup_steps > config.total_steps
    unreached = " (more than all: it is never reached)" if late else ""
    begins = f"from step {start_step} of" if start_step else "from the pretrained models,"
    lines["steps"] = (
        f"{begins} {config.total_steps} ({epochs:.1f} epochs), {config.optimizer.schedule} rate up to "
        f"{config.optimizer.learning_rate:g} after {config.optimizer.warmup_steps}{unreached}, {config.dtype}"
    )
    every, keep = config.checkpoint.every_steps, f"the newest {config.checkpoint.keep}"
    if period := config.checkpoint.keep_every:
        keep += f" and those of every {period} steps"
    often = [f"{every} steps"] if every else []
    often += [f"{config.checkpoint.every_minutes:g} minutes"] if config.checkpoint.every_minutes else []
    saves = f"a checkpoint every {' and every '.join(often)}, {keep} kept" if often else "no checkpoints"
    lines["output"] = f"{training.workdir} ({saves})"
    return "\n".join(f"{name:<11}{text}" for name, text in lines.items())


def rate_change(section: Any, step: int, was: int, now: int) -> str | None:
    """A line where a changed `total_steps` makes the learning rate jump after `step`; None where it does not.

    `section`: the config's `optimizer`. The schedules are functions of total_steps too.
    """
    if was == now:
        return None
    before, after = (float(optim.learning_rate(section, total_steps)(step)) for total_steps in (was, now))
    if math.isclose(before, after, rel_tol=1e-6):
        return None
    return (
        f"rate       learning rate at step {step + 1} was {before:.3g}, is {after:.3g}: total_steps was {was}, is {now}"
    )


def batch_lines(config: Config, labelled: bool) -> dict[str, str]:
    """What a query of a batch meets; `labelled`: the passage of some row is known."""
    size, number = config.group_size, config.objective.negatives
    groups = config.batch_size // size
    batch = f"{config.batch_size} queries in {groups} group{'s' if groups > 1 else ''} of {size}"
    if not labelled:
        return {"batch": f"{batch}; a group has room for {size * (1 + number)} passages found for its queries"}
    lines = {"batch": f"{batch}, {config.batch_size - 1} in-batch negatives a query"}
    if number:
        column = config.data.columns.negative
        of = "those mined for it" if column is None else f"those given in column {column!r}"
        lines["negatives"] = f"{number} more that each query brings, of {of}"
    return lines


def model_line(training: Training, role: str, source: hf.Source) -> str:
    def count(tree: Tree) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree.get(role)))

    whole, trainable = flops.parameters(source.model_config), count(training.state.params)
    text = f"{training.config[role].path} ({source.model_type}), {whole / 1e6:,.1f} M parameters"
    share = trainable / whole
    text += f", {share:.{0 if share in (0, 1) or share >= 0.01 else 2}%} trained" + adapters_of(training, role, source)
    return f"{text}, {reading(training)}" if role == "retriever" else text


def adapters_of(training: Training, role: str, source: hf.Source) -> str:
    """Which adapters a model has, whether anything is trained beside them, and how its base is kept."""
    lora, base_dtype = source.model_config.computing.lora, source.model_config.computing.base_dtype
    base = "" if base_dtype == "float32" else f", {base_dtype} base"
    if role == "retriever" and pair.shares_base(training.config, training.opened.sources):
        base += ", on the generator's weights"
    if lora is None:
        return base
    layers = models.linear_layers(source.model_config)
    adapted = sum(adapters.is_target(path, lora) for path in layers)
    beside = len(setup.trained_of_base(training.opened, role))
    more = f", and {beside} arrays of its own" if beside else ""
    return f" (adapters of rank {lora.rank} on {adapted} of {len(layers)} linear layers{more}){base}"


def reading(training: Training) -> str:
    """How the retriever reads and what its embeddings are, with a hint where its family is used with other prefixes."""
    opened = training.opened
    source, how = opened.sources["retriever"], pair.pooling(training.config, opened.sources["retriever"])
    text = f"{how.mode} pooling"
    if how.truncate_dim is not None:
        text += f", the first {how.truncate_dim} channels"
    text += f", {how.similarity}" if how.similarity != "cosine" else ""
    text += ", in lower case" if how.lower_case else ""
    prefixes = how.query_prefix, how.passage_prefix
    text += ", no prefixes" if not any(prefixes) else f", prefixes {prefixes[0]!r} and {prefixes[1]!r}"
    usual = known.prefixes_of(training.config.retriever.path, source.folder)
    if usual and not any(prefixes):
        text += (
            f" (such models are trained with retriever.query_prefix={usual[0]!r} and "
            f"retriever.passage_prefix={usual[1]!r}; without them they find less)"
        )
    return text


def attention_line(training: Training) -> str:
    """The kernel of each model, or of both where they are alike."""
    said: dict[str, list[str]] = {}
    for role, source in training.opened.sources.items():
        kernel, reason = pair.attention_kernel(training.config, role, source, pair.this_device())
        said.setdefault(kernel + (f" ({reason})" if reason else ""), []).append(role)
    return next(iter(said)) if len(said) == 1 else "; ".join(f"{role} {text}" for text, (role,) in said.items())


def lengths_line(shapes: Sequence[data.Lengths]) -> str:
    """To what lengths the texts are padded, in any of the shapes that batches take."""
    sizes = {name: sorted({getattr(shape, name) for shape in shapes} - {0}) for name in data.TEXTS}
    told = ", ".join(f"{name} {' or '.join(f'{size:,}' for size in some)}" for name, some in sizes.items() if some)
    return f"{told} tokens" + (f"; the step is compiled for {len(shapes)} shapes" if len(shapes) > 1 else "")


def describe(shape: data.Lengths) -> str:
    def told(sizes: Any, names: Sequence[str]) -> str:
        return ", ".join(f"{name} {size:,}" for name in names if (size := getattr(sizes, name)))

    packed = told(shape.packed, data.TEXTS[:-1])
    return told(shape, data.TEXTS) + " tokens" + (f" (packed: {packed})" if packed else "")
