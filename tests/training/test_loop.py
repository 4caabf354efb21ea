"""The loop, end to end: trained, stopped, gone on with, evaluated; on tiny models through the real commands."""

import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from command import ROOT, TINY, TINY_STEPS, TINY_VALUES, call, environment, run, run_here, words

from rag_jax import config, data, hf, models, pair
from rag_jax.errors import UserError
from rag_jax.models import flops
from rag_jax.training import optim, setup, signals
from rag_jax.workdir import checkpoint, lock, provenance


@pytest.fixture(scope="module")
def cache(tiny_run):
    """For all of these tests and for nobody else: here it is counted what is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_COMPILATION_CACHE_DIR")
        yield tiny_run[2]


@pytest.fixture(scope="module")
def whole(tiny_run):
    """A run of all steps without a stop, and what it printed."""
    return tiny_run[:2]


def records(workdir, prefix="loss/"):
    """The lines of metrics.jsonl that hold such a metric, without times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.startswith(("time/", "throughput/"))} for line in lines]
    return [line for line in kept if any(name.startswith(prefix) for name in line)]


def state_of(workdir, step, cache):
    """Every array of a checkpoint, by path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAG_JAX_CACHE", str(cache))
        opened = pair.open_pair(config.load_workdir(workdir), workdir)
        abstract = pair.abstract_params(opened)
        trainable, _ = optim.split_frozen(abstract, setup.rate_rules(opened.config, setup.used_roles(opened)))
        optimizer = optim.make_optimizer(opened.config.optimizer, opened.config.total_steps, trainable)
        moments = jax.eval_shape(optimizer.init, trainable)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        items = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device),
            {"params": abstract, "opt_state": moments},
        )
        with checkpoint.Checkpoints(workdir) as checkpoints:
            is_saved = optim.by_path(abstract, checkpoints.paths(step, "params").__contains__)
            items["params"] = jax.tree.map(lambda a, saved: a if saved else None, items["params"], is_saved)
            return checkpoint.flatten(checkpoints.restore(items, step))


def test_the_record_has_every_step_once_and_the_names_of_the_contract(whole):
    workdir, printed = whole
    steps = records(workdir)
    assert [line["step"] for line in steps] == list(range(1, TINY_STEPS + 1))
    line = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[1])
    assert set(line) == {
        "step", "loss/total", "loss/contrastive", "loss/marginal", "optim/learning_rate",
        "optim/grad_norm", "optim/grad_norm_retriever", "optim/grad_norm_generator",
        "time/step_s", "time/data_wait_s", "time/compile_s", "time/eval_s", "time/checkpoint_s", "time/mining_s",
        "throughput/queries_per_s", "throughput/mfu", "throughput/padding_share",
    }  # fmt: skip
    of_models = line["optim/grad_norm_retriever"], line["optim/grad_norm_generator"]
    assert math.isclose(math.hypot(*of_models), line["optim/grad_norm"], rel_tol=1e-6) and min(of_models) > 0
    assert steps[-1]["loss/total"] < steps[0]["loss/total"]
    assert {path.name for path in workdir.iterdir()} == {
        "config.json", "inputs.json", "rows.json", "changed.json", "metrics.jsonl", "checkpoints", "tensorboard",
        "eval", "models", "report.html", ".lock",
    }  # fmt: skip
    for word in ("devices", "retriever", "generator", "29 rows", "7 in-batch negatives", "K = 3", "6 (", "output"):
        assert word in printed, word


@pytest.mark.slow
def test_evaluation_in_the_loop_and_by_command_are_the_same(whole, cache):
    workdir, _ = whole
    assert [line["step"] for line in records(workdir, "eval/")] == [0, 3, 6]
    in_loop = json.loads((workdir / "eval" / f"step_{TINY_STEPS}.json").read_text())
    by_command = json.loads(run(cache, "evaluate", f"--workdir={workdir}", "--json").splitlines()[-1])
    assert by_command == in_loop
    # In this process sums are split otherwise over threads.
    untrained = json.loads(run_here(cache, "evaluate", f"--config={TINY}", "--json", **TINY_VALUES).splitlines()[-1])
    before = json.loads((workdir / "eval" / "step_0.json").read_text())
    means = {name: value for name, value in before.items() if name.startswith("eval/")}
    assert len(means) > 8 and {name: untrained[name] for name in means} == pytest.approx(means, rel=1e-5)
    assert in_loop["eval/answer_nll"] < untrained["eval/answer_nll"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.soak)])
def test_a_stopped_run_goes_on_to_the_same_bits_and_compiles_nothing(whole, cache, tmp_path, number):
    programs = {path.name for path in (cache / "compiled").glob("*-cache")}
    workdir = tmp_path / "run"
    flags = (f"--config={TINY}", f"--workdir={workdir}")
    values = TINY_VALUES | {"checkpoint__every_steps": 2, "checkpoint__every_minutes": 0.0}
    process = subprocess.Popen(
        words("main", *flags, **values),
        cwd=ROOT,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while process.poll() is None and not any((workdir / "checkpoints").glob("[0-9]*")):
        time.sleep(0.02)
    process.send_signal(number)
    printed, complaint = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number and b"stopped by SIGTERM after step" in printed
        assert b"Traceback" not in complaint
    assert 0 < len(records(workdir)) <= TINY_STEPS
    printed = run(cache, "main", *flags, **values)
    assert "waiting for data" in printed and "of the tokens padding" in printed
    assert programs and {path.name for path in (cache / "compiled").glob("*-cache")} == programs
    assert records(workdir) == records(whole[0])
    assert records(workdir, "eval/") == records(whole[0], "eval/")
    ours, theirs = state_of(workdir, TINY_STEPS, cache), state_of(whole[0], TINY_STEPS, cache)
    assert ours.keys() == theirs.keys() and len(ours) > 80
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def test_a_run_that_another_has_overtaken_is_refused_and_changes_nothing(whole, cache, tmp_path, monkeypatch):
    """The other one held the workdir while this one looked for a checkpoint, and has ended before it asks for it."""
    workdir, build = tmp_path / "run", setup.build

    def while_another_trains(*args):
        shutil.copytree(whole[0], workdir)
        return build(*args)

    monkeypatch.setattr(setup, "build", while_another_trains)
    code, _, err = call(cache, "main", f"--config={TINY}", f"--workdir={workdir}", **TINY_VALUES)
    assert code == 2 and f"--workdir={workdir}: another run has saved step {TINY_STEPS} there" in err
    folders = (workdir, whole[0])
    ours, theirs = ({p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in folders)
    assert {name for name in ours if ours[name] != theirs.get(name)} <= {pathlib.Path(lock.NAME)}
    assert ours.keys() == theirs.keys()


def test_a_finished_run_says_so_and_a_longer_one_goes_on(whole, cache):
    workdir, _ = whole
    flags = (f"--config={TINY}", f"--workdir={workdir}")
    before = (workdir / "metrics.jsonl").read_text()
    assert f"is trained to step {TINY_STEPS} already" in run_here(cache, "main", *flags, **TINY_VALUES)
    assert (workdir / "metrics.jsonl").read_text() == before


def test_another_config_is_refused_with_the_difference(whole, cache, monkeypatch):
    workdir, _ = whole
    longer = config.load_workdir(workdir, {"total_steps": 9, "log.every_steps": 2, "mesh.data": 1})
    assert setup.resumable(longer, workdir)
    other = config.load_workdir(workdir, {"seed": 1, "objective.name": "sequence"})
    with pytest.raises(UserError, match="objective.name was 'token' and is 'sequence'; seed was 0 and is 1"):
        setup.resumable(other, workdir)


@pytest.mark.slow
def test_patience_ends_a_run_that_gets_no_better_and_more_of_it_goes_on(cache, tmp_path):
    workdir = tmp_path / "run"
    values = {
        "total_steps": 9, "eval__every_steps": 1, "objective__name": "none", "generator__path": None,
        "optimizer__learning_rate": 1e-15, "eval__metric": "recall@1", "checkpoint__every_steps": 5,
    }  # fmt: skip
    flags = ("main", f"--config={TINY}", f"--workdir={workdir}")
    assert "trained to step 2; ended early: 2 evaluations" in run_here(cache, *flags, **values, eval__patience=2)
    assert [line["step"] for line in records(workdir, "eval/")] == [0, 1, 2]
    assert "has ended early at step 2; raise eval.patience" in run_here(cache, *flags, **values, eval__patience=2)
    assert "trained to step 4; ended early: 4 evaluations" in run_here(cache, *flags, **values, eval__patience=4)
    assert json.loads((workdir / "eval" / "step_4.json").read_text())["best_by"] == "eval/recall@1"
    assert len((workdir / "eval" / "step_4.rows.jsonl").read_text().splitlines()) == 30


OTHERS = {
    "objective__name": "pdist", "objective__evidence": "both",
    "generator__path": "random:llama", "retriever__path": "random:qwen3",
    "dtype": "bfloat16", "retriever__remat": "dots", "generator__remat": "full",
}  # fmt: skip
OBJECTIVES = [
    pytest.param(OTHERS, id="pdist, other models, bfloat16", marks=pytest.mark.slow),
    pytest.param({"objective__name": "dalm", "objective__contrastive_weight": 0.5}, id="dalm", marks=pytest.mark.slow),
    pytest.param({"objective__name": "none", "generator__path": None}, id="retriever only", marks=pytest.mark.slow),
    pytest.param({"objective__name": "none"}, id="generator unused", marks=pytest.mark.slow),
]


def params_before_and_after(workdir, cache):
    """Of each model, by path: as it came in, and as the run has saved it at its last step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAG_JAX_CACHE", str(cache))
        before = pair.pretrained_params(pair.open_pair(config.load_workdir(workdir)))
        _, after = setup.saved_params(pair.open_pair(config.load_workdir(workdir), workdir), workdir, None)
    return {role: (checkpoint.flatten(before[role]), checkpoint.flatten(after[role])) for role in before}


@pytest.mark.parametrize("changes", OBJECTIVES)
def test_every_objective_trains(cache, tmp_path, changes):
    """What is used learns, what is not named is not there, what is not used stays as it is, bit for bit."""
    workdir = tmp_path / "run"
    values = {"total_steps": 2, "eval__every_steps": 0} | changes
    printed = run_here(cache, "main", f"--config={TINY}", f"--workdir={workdir}", **values)
    losses = records(workdir)
    assert len(losses) == 2 and all(np.isfinite(line["loss/total"]) for line in losses)
    assert ("loss/marginal" in losses[0]) == (changes.get("objective__name") != "none")
    assert ("loss/evidence" in losses[0]) == ("weight of the question and answer's evidence" in printed)
    assert ("loss/evidence" in losses[0]) == (changes.get("objective__name") == "pdist")
    assert (" 0% trained" in printed) == (changes == {"objective__name": "none"})
    assert ("\ngenerator " in printed) == ("generator__path" not in changes or changes["generator__path"] is not None)
    used = {"retriever"} if changes.get("objective__name") == "none" else {"retriever", "generator"}
    for line in losses:
        norms = {name for name in line if name.startswith("optim/grad_norm_") and line[name] > 0}
        assert norms == {f"optim/grad_norm_{role}" for role in used}
    for role, (before, after) in params_before_and_after(workdir, cache).items():
        equal = [np.array_equal(before[path], after[path]) for path in before]
        assert sum(equal) < len(equal) / 2 if role in used else all(equal), role


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(whole, cache, tmp_path):
    workdir = shutil.copytree(whole[0], tmp_path / "run")
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"5", "6"}
    damaged = next((workdir / "checkpoints" / "6" / "params" / "ocdbt.process_0" / "d").iterdir())
    damaged.write_bytes(flipped := bytes([damaged.read_bytes()[0] ^ 1]) + damaged.read_bytes()[1:])
    out = tmp_path / "export"
    code, told, complaint = call(cache, "export", f"--workdir={workdir}", f"--out={out}")
    assert code == 0 and "step 5 of" in told and "checkpoints/6 is damaged" in complaint
    printed = run(cache, "main", f"--config={TINY}", f"--workdir={workdir}", **TINY_VALUES)
    assert f"checkpoint {workdir}/checkpoints/6 is damaged (params/ocdbt.process_0/d/{damaged.name} is not" in printed
    assert "kept as damaged-6" in printed and "from step 5 of" in printed
    assert (
        workdir / "checkpoints" / "damaged-6" / damaged.relative_to(workdir / "checkpoints" / "6")
    ).read_bytes() == flipped
    assert records(workdir) == records(whole[0])
    assert records(workdir, "eval/") == records(whole[0], "eval/")


def test_other_rows_or_models_are_refused_with_the_difference(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_JAX_CACHE", str(tmp_path / "cache"))
    rows, model = tmp_path / "rows.csv", tmp_path / "model"
    model.mkdir()
    rows.write_text("Question,Abstract,Answer\n" + "".join(f"q{n},p{n},a{n}\n" for n in range(9)))
    hf.tiny.build("gpt2", model)
    values = {"data.train": str(rows), "generator.path": str(model)}
    loaded = config.load(TINY, values)

    def found():
        columns = loaded.data.columns.to_dict()
        examples, _ = data.load_examples(
            str(rows), key="data.train", columns=columns, bad_rows="drop", retriever=None, prompt=None
        )
        return provenance.of_run(loaded, examples)

    provenance.write(tmp_path, first := found())
    provenance.check(tmp_path, loaded, found())
    rows.write_text(rows.read_text() + "q9,p9,a9\n")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError) as error:
        provenance.check(tmp_path, loaded, second := found())
    assert f"data.train='{rows}': rows was 9 and is 10" in str(error.value)
    was, now = (files["generator.path"]["model.safetensors"] for files in (first, second))
    assert f"generator.path='{model}': model.safetensors was {was} and is {now}" in str(error.value)
    assert "config.json" not in str(error.value)
    shutil.rmtree(model)
    rows.write_text("Question,Abstract,Answer\n" + "".join(f"q{n},p{n},a{n}\n" for n in range(9)))
    provenance.check(tmp_path, loaded, found())
    (tmp_path / "inputs.json").write_text("[]")
    with pytest.raises(UserError, match="inputs.json is damaged"):
        provenance.check(tmp_path, loaded, found())


def test_of_a_large_file_any_of_many_blocks_tells_it_from_another(tmp_path):
    content = np.random.default_rng(0).bytes(6_000_000)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content)
    assert provenance.digest(tmp_path / "a") == provenance.digest(tmp_path / "b")
    for changed in (content[:-1] + b"x", b"x" + content[1:], content + b"x"):
        (tmp_path / "b").write_bytes(changed)
        assert provenance.digest(tmp_path / "a") != provenance.digest(tmp_path / "b")


@pytest.mark.slow
def test_a_full_and_a_read_only_disk_end_it_in_one_line_and_cost_no_checkpoint(cache, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    values = {
        "total_steps": TINY_STEPS, "objective__name": "none", "generator__path": None, "eval__every_steps": 0,
        "checkpoint__every_steps": 1, "checkpoint__keep": 9,
    }  # fmt: skip

    def mount(*options):
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(disk)], capture_output=True
        )

    def train_there():
        command = words("main", f"--config={TINY}", f"--workdir={disk / 'run'}", **values)
        return subprocess.run(command, cwd=ROOT, env=environment(cache), capture_output=True, text=True)

    if mount("size=4m").returncode:  # room for three checkpoints
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        for options, reason in ((None, "no space left on the device"), ("remount,ro,size=4m", "Read-only file system")):
            if options:
                assert mount(options).returncode == 0
            ended = train_there()
            assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
            (line,) = (line for line in ended.stderr.splitlines() if line.startswith("rag_jax: error: "))
            assert reason in line and line == ended.stderr.splitlines()[-1]
            with checkpoint.Checkpoints(disk / "run") as checkpoints:
                newest, damaged = checkpoints.newest_good()
            out = disk / "export"
            code, _, complaint = call(cache, "export", f"--workdir={disk / 'run'}", f"--out={out}")
            assert code == 2 and f"--out={out}: cannot be written (" in complaint and not out.exists()
            assert newest and newest < TINY_STEPS and not damaged
        before = records(disk / "run")
        assert mount("remount,rw,size=64m").returncode == 0
        ended = train_there()
        assert ended.returncode == 0 and f"from step {newest} of" in ended.stdout
        after = records(disk / "run")
        assert after[:newest] == before[:newest] and [line["step"] for line in after] == list(range(1, TINY_STEPS + 1))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_locale_umask_time_zone_and_names_do_not_matter(whole, cache, tmp_path):
    folder = tmp_path / "ein 'Lauf' ü#%20 文"
    folder.mkdir()
    rows, workdir, out = folder / "Fragen & Antworten ß\udcff.csv", folder / "läuft $HOME", folder / "-out {x}"
    shutil.copy(ROOT / "tests" / "data" / "rows.csv", rows)
    odd = {"LC_ALL": "C", "TZ": "Asia/Kathmandu"}

    def command(*flags, **values):
        ended = subprocess.run(
            words(*flags, **values), cwd=ROOT, env=environment(cache) | odd, umask=0o077, capture_output=True
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    values = TINY_VALUES | {"data__train": rows, "data__eval": rows}
    command("main", f"--config={TINY}", f"--workdir={workdir}", **values)
    assert records(workdir) == records(whole[0]) and records(workdir, "eval/") == records(whole[0], "eval/")
    command("export", f"--workdir={workdir}", f"--out={out}")
    read = {"data__eval": rows, "objective__marginal_temperature": TINY_VALUES["objective__marginal_temperature"]}
    evaluated = command("evaluate", f"--config={TINY}", f"--models={out}", "--json", **read)
    there = json.loads((workdir / "eval" / f"step_{TINY_STEPS}.json").read_text(encoding="utf-8"))
    assert json.loads(evaluated.splitlines()[-1]) | {"step": TINY_STEPS} == there
    assert not [path for path in folder.rglob("*") if path != rows and path.stat().st_mode & 0o077]


def test_signals_are_noted_once_then_as_before():
    before = signal.getsignal(signal.SIGTERM)
    with signals.stop_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        # A second one of either is the system's: nothing of ours stands in its way.
        assert {signal.getsignal(number) for number in signals.SIGNALS} == {signal.SIG_DFL}
    assert signal.getsignal(signal.SIGTERM) == before


def test_flops_of_a_step_by_hand():
    bert = models.BertConfig(50, 2, 2, 8, 16, 64, 2, 1e-12, "gelu", 0.0, 0.0)
    gpt2 = models.Gpt2Config(100, 3, 2, 8, 32, 64, 1e-5, "gelu_tanh", 0.0, 0.0, 0.0)
    lengths = data.Lengths(query=4, passage=6, prefix=10, suffix=5, answer=3)
    encoder = 2 * 2 * (4 * 8 * 8 + 2 * 8 * 16)  # weights met by a token, twice, in two layers
    retriever = 7 * (4 * encoder + 6 * encoder + 2 * 4 * 8 * (4 * 4 + 6 * 6))
    decoder = 3 * 2 * (4 * 8 * 8 + 2 * 8 * 32)
    prefixes = 7 * 10 * (decoder + 3 * 4 * 8 * 5)
    suffixes = 7 * 2 * 5 * (decoder + 3 * 4 * 8 * 12.5)
    head = 7 * 2 * 3 * 2 * 8 * 100
    got = flops.training_step({"retriever": bert, "generator": gpt2}, 7, 2, lengths)
    assert got == 3 * (retriever + prefixes + suffixes + head)
    further = 2 * 7 * (6 * encoder + 2 * 4 * 8 * 6 * 6) + 2 * prefixes  # two more passages a row for both models
    assert flops.training_step({"retriever": bert, "generator": gpt2}, 7, 2, lengths, 2) == got + 3 * further
    # Evidence of both: one pass over prefixes and the other candidate; the own passage's has a backward pass too.
    listwise = flops.training_step({"retriever": bert, "generator": gpt2}, 7, 2, lengths, 0, "answer")
    assert listwise == 3 * (retriever + prefixes + suffixes / 2 + head / 2) + prefixes + suffixes / 2 + head / 2
    frozen = flops.training_step({"retriever": bert, "generator": gpt2}, 7, 2, lengths, 0, "question", False)
    assert frozen == 3 * retriever + prefixes + suffixes + head / 3 * 4
