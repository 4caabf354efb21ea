"""Every shipped config runs as it stands, by the names of models and rows that it holds."""

import csv
import json
import math
import pathlib
import shutil
import subprocess

import jax
import pytest
from command import ROOT, environment, words

from rag_jax import config, data, hf, pair, plan
from rag_jax.distributed import sharding
from rag_jax.hf import folder as folders
from rag_jax.hf import tiny
from rag_jax.training import setup
from rag_jax.workdir import checkpoint

FILES = sorted((ROOT / "configs").glob("*.py"))
WHOLE = ("tiny",)  # whose evaluation is small as it is
UNLABELLED = ("minilm_smollm2_unlabelled",)  # whose rows name no passage, so that they take a file of passages
EVALUATED = ("quickstart",)  # also with less than whole batches: evaluation takes as long to compile as the step
# The kind of small random model that stands for a named one; the first part of the name that is found decides.
KINDS = {"minilm": "bert", "bge": "bert", "smollm": "llama", "llama": "llama", "gpt2": "gpt2", "qwen3": "qwen3"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
STEPS = 2
# Less of the same: an evaluation of a few rows.
EVAL = {"rows": 16, "answers": 2}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Compiled programs and tokenised rows, for all configs."""
    return tmp_path_factory.mktemp("cache")


def kind_of(name):
    kinds = [kind for part, kind in KINDS.items() if part in name.lower()]
    assert kinds, f"say in KINDS which random model stands for {name}"
    return kinds[0]


def put_model(name, home, hub):
    """A random model where the config looks for `name`: in a folder, or in the hub's cache as its client keeps it."""
    if name is None or name.startswith(folders.RANDOM):
        return
    if not folders.HUB_NAME.fullmatch(name):
        target = home / name
    else:
        repository = hub / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        target = repository / "snapshots" / COMMIT
    target.mkdir(parents=True)
    tiny.build(kind_of(name), target)


def put_rows(name, home, columns, count):
    """The rows that come with the project, if it has this file; else made ones, no two alike, of several lengths.

    `columns`: names of their columns of query, passage and answer, as far as the file has these.
    """
    path = home / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.startswith("tests/"):
        shutil.copyfile(ROOT / name, path)
        return
    things, places = ("lamp", "boat", "mill", "bell", "gate"), ("harbour", "valley", "chapel", "orchard")
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(columns.values())
        for i in range(count):
            thing, place = things[i % len(things)], places[i % len(places)]
            more = f" It was mended in {1700 + i} by the smith's daughter." * (i % 4 if count < 100 else 0)
            passage = f"The {thing} of the {place} bears number {i}, painted in white.{more}"
            row = {
                "query": f"What number has the {thing} {i} of the {place}?",
                "passage": passage,
                "answer": f"number {i}",
            }
            lines.writerow(row[part] for part in columns)


def put_everything(loaded, home, hub, batch_size, labelled):
    """All that a config names, relative to `home`; and what its header leaves to the user, as overrides."""
    for name in {loaded[role].path for role in ("retriever", "generator")}:  # Both may be adapters of one base.
        put_model(name, home, hub)
    left_open = {}
    for name in ("train", "eval", "passages"):
        source = loaded.data[name]
        if source is None and (name != "passages" or not labelled):
            source = left_open[f"data__{name}"] = f"{name}_rows.csv"
        if source is not None:
            parts = {"train": ("query", "answer"), "passages": ("passage",)}.get(name) if not labelled else None
            columns = {part: loaded.data.columns[part] for part in parts or ("query", "passage", "answer")}
            put_rows(source, home, columns, batch_size + 8)
    return left_open


def devices_of(loaded):
    """What the mesh asks for; an axis that takes what is left gets one.

    Not more: with long loops XLA's CPU runtime may begin exchanges that do not depend on each other in another order on
    each fake device, and they wait for ever. Meshes are tested with small programs.
    """
    return math.prod(size for size in loaded.mesh.to_dict().values() if size != -1)


def test_models_stand_for_names():
    assert (kind_of("BAAI/bge-small-en"), kind_of("meta-llama/Llama-2-7b-hf")) == ("bert", "llama")
    with pytest.raises(AssertionError, match="say in KINDS"):
        kind_of("someone/new")


# The run that other tests share is of configs/tiny.py.
CASES = [pytest.param(file, False, id=file.stem, marks=pytest.mark.slow) for file in FILES if file.stem not in WHOLE]
CASES += [pytest.param(file, True, id=f"{file.stem}, whole batches", marks=pytest.mark.soak) for file in FILES]


@pytest.mark.parametrize(("file", "whole"), CASES)
def test_a_config_runs_unchanged(file, whole, tmp_path, cache):
    """But for its batch, which is two groups, and mostly without evaluation; `whole`: all of its own."""
    loaded = config.load(file)
    home, hub, workdir = tmp_path / "home", tmp_path / "hub", tmp_path / "run"
    home.mkdir()
    less = {} if whole else {"batch_size": min(loaded.batch_size, 2 * loaded.group_size)}
    batch_size = less.get("batch_size", loaded.batch_size)
    labelled = file.stem not in UNLABELLED
    values = put_everything(loaded, home, hub, batch_size, labelled) | {"total_steps": STEPS} | less
    env = environment(cache) | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    if whole:  # large batches: compiling well takes less than running badly
        env["XLA_FLAGS"] = ""
    if not whole and file.stem not in EVALUATED:
        values["eval__every_steps"] = 0
    elif file.stem not in WHOLE:
        values |= {f"eval__{name}": min(loaded.eval[name] or most, most) for name, most in EVAL.items()}
    env["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices_of(loaded)}"
    command = words("main", f"--config={file}", f"--workdir={workdir}", **values)
    process = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)

    assert process.returncode == 0, process.stderr
    assert f"trained to step {STEPS}" in process.stdout
    assert process.stdout.split()[:2] == ["devices", str(devices_of(loaded))]
    # Progress and nothing else: no warning, no traceback, nothing of other libraries.
    told = ("step ", "the step for ", *(() if labelled else ("evidence: ",)))
    strange = [line for line in process.stderr.splitlines() if not line.startswith(told)]
    assert not strange, strange
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}
    every = loaded.log.every_steps
    assert list(losses) == [step for step in range(1, STEPS + 1) if step == STEPS or (every and step % every == 0)]
    assert all(math.isfinite(loss) and loss > 0 for loss in losses.values())
    with checkpoint.Checkpoints(workdir) as checkpoints:
        assert checkpoints.steps() == ([STEPS] if loaded.checkpoint.every_steps else [])
    evaluated = {path.name for path in (workdir / "eval").glob("*")}
    steps = (0, STEPS) if values.get("eval__every_steps", loaded.eval.every_steps) else ()
    assert evaluated == {f"step_{step}.{kind}" for step in steps for kind in ("json", "rows.jsonl")}
    # Nothing but what the command above names differs from the file.
    flat = config.flat(loaded)
    changed = {name for name, value in config.flat(config.load_workdir(workdir)).items() if value != flat[name]}
    assert changed <= {name.replace("__", ".") for name in values}


NAMED = {"minilm": "sentence-transformers/all-MiniLM-L6-v2", "smollm2-135m": "HuggingFaceTB/SmolLM2-135M"}


@pytest.mark.slow
@pytest.mark.parametrize("file", [pytest.param(file, id=file.stem) for file in FILES if file.stem not in WHOLE])
def test_the_step_of_a_config_takes_its_shapes(file):
    """Traced with the sizes of the models that it names and with its own batch; nothing is computed."""
    loaded = config.load(file)
    for role in pair.ROLES:
        loaded[role].path = NAMED.get(pathlib.Path(loaded[role].path).name, loaded[role].path)
    sources = {role: hf.open_config(loaded[role].path, f"{role}.path", role) for role in pair.ROLES}
    opened = pair.Pair(loaded, sources, pair.composite(loaded, sources), None, None, None)
    mesh = sharding.make_mesh(**loaded.mesh.to_dict(), devices=jax.devices()[: devices_of(loaded)])
    _, _, state, step = setup.make_step(opened, mesh)
    shapes = data.shape_of(plan.batch_lengths(loaded, set(pair.ROLES)), loaded.batch_size, loaded.objective.negatives)
    batch = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(*shape),
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, tuple) and not hasattr(leaf, "_fields"),
    )
    after, metrics = jax.eval_shape(step, state, batch, None)
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == before
    learns_by = "evidence" if file.stem in UNLABELLED else "marginal"
    assert {"loss/contrastive", f"loss/{learns_by}", "loss/total"} <= metrics.keys()
