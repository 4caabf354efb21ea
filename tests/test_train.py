"""The loop, end to end: trained, stopped, gone on with, evaluated; on tiny models through the real commands."""

import json
import os
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from command import ROOT, TINY, environment, run, words

from rag_jax import checkpoint, config, data, flops, models, train
from rag_jax import run as runs
from rag_jax.errors import UserError

STEPS = 6


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A run of all steps without a stop."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    printed = run(cache, "main", f"--config={TINY}", f"--workdir={workdir}", total_steps=STEPS, eval__every_steps=3)
    return workdir, printed


def records(workdir, prefix="loss/"):
    """The lines of metrics.jsonl that hold such a metric, without times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.startswith(("time/", "throughput/"))} for line in lines]
    return [line for line in kept if any(name.startswith(prefix) for name in line)]


def state_of(workdir, step, cache):
    """Every array of a checkpoint, by path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAG_JAX_CACHE", str(cache))
        opened = runs.open_run(config.load_workdir(workdir), workdir)
        abstract = runs.abstract_params(opened)
        optimizer = train.optim.make_optimizer(opened.config.optimizer, opened.config.total_steps, abstract)
        moments = jax.eval_shape(optimizer.init, abstract)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        items = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device),
            {"params": abstract, "opt_state": moments},
        )
        with checkpoint.Checkpoints(workdir) as checkpoints:
            return checkpoint.flatten(checkpoints.restore(items, step))


def test_the_record_has_every_step_once_and_the_names_of_the_contract(whole):
    workdir, printed = whole
    steps = records(workdir)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    line = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[1])
    assert set(line) == {
        "step", "loss/total", "loss/contrastive", "loss/marginal", "optim/learning_rate", "optim/grad_norm",
        "time/step_s", "time/data_wait_s", "time/compile_s", "time/eval_s", "time/checkpoint_s", "time/mining_s",
        "throughput/queries_per_s", "throughput/mfu", "throughput/padding_share",
    }  # fmt: skip
    assert steps[-1]["loss/total"] < steps[0]["loss/total"]
    assert {path.name for path in workdir.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoints", "tensorboard", "eval", "models", ".lock"
    }  # fmt: skip
    for word in ("devices", "retriever", "generator", "29 rows", "7 in-batch negatives", "K = 3", "6 (", "output"):
        assert word in printed, word


def test_evaluation_in_the_loop_and_by_command_are_the_same(whole, cache):
    workdir, _ = whole
    assert [line["step"] for line in records(workdir, "eval/")] == [0, 3, 6]
    in_loop = json.loads((workdir / "eval" / f"step_{STEPS}.json").read_text())
    by_command = json.loads(run(cache, "evaluate", f"--workdir={workdir}", "--json").splitlines()[-1])
    assert by_command == in_loop
    untrained = json.loads(run(cache, "evaluate", f"--config={TINY}", "--json").splitlines()[-1])
    assert untrained == json.loads((workdir / "eval" / "step_0.json").read_text())
    assert in_loop["eval/answer_nll"] < untrained["eval/answer_nll"]


def test_the_second_start_compiles_nothing(whole, cache, tmp_path):
    programs = {path.name for path in (cache / "compiled").glob("*-cache")}
    assert programs
    values = {"total_steps": STEPS, "eval__every_steps": 3}
    printed = run(cache, "main", f"--config={TINY}", f"--workdir={tmp_path / 'run'}", **values)
    assert {path.name for path in (cache / "compiled").glob("*-cache")} == programs
    assert records(tmp_path / "run") == records(whole[0])
    assert "waiting for data" in printed and "of the tokens padding" in printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on_to_the_same_bits(whole, cache, tmp_path, number):
    workdir = tmp_path / "run"
    flags = (f"--config={TINY}", f"--workdir={workdir}")
    values = {"total_steps": STEPS, "eval__every_steps": 3, "checkpoint__every_steps": 2}
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
    assert 0 < len(records(workdir)) <= STEPS
    run(cache, "main", *flags, **values)
    assert records(workdir) == records(whole[0])
    assert records(workdir, "eval/") == records(whole[0], "eval/")
    ours, theirs = state_of(workdir, STEPS, cache), state_of(whole[0], STEPS, cache)
    assert ours.keys() == theirs.keys() and len(ours) > 80
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def test_a_finished_run_says_so_and_a_longer_one_goes_on(whole, cache):
    workdir, _ = whole
    flags = (f"--config={TINY}", f"--workdir={workdir}")
    before = (workdir / "metrics.jsonl").read_text()
    assert f"is trained to step {STEPS} already" in run(cache, "main", *flags, total_steps=STEPS, eval__every_steps=3)
    assert (workdir / "metrics.jsonl").read_text() == before


def test_another_config_is_refused_with_the_difference(whole, cache, monkeypatch):
    workdir, _ = whole
    longer = config.load_workdir(workdir, {"total_steps": 9, "log.every_steps": 2, "mesh.data": 1})
    assert train.resumable(longer, workdir)
    other = config.load_workdir(workdir, {"seed": 1, "objective.name": "sequence"})
    with pytest.raises(UserError, match="objective.name was 'token' and is 'sequence'; seed was 0 and is 1"):
        train.resumable(other, workdir)


def test_patience_ends_a_run_that_gets_no_better_and_more_of_it_goes_on(cache, tmp_path):
    workdir = tmp_path / "run"
    values = {
        "total_steps": 9, "eval__every_steps": 1, "objective__name": "none", "generator__path": None,
        "optimizer__learning_rate": 1e-15, "eval__metric": "recall@1", "checkpoint__every_steps": 5,
    }  # fmt: skip
    flags = ("main", f"--config={TINY}", f"--workdir={workdir}")
    assert "trained to step 2; ended early: 2 evaluations" in run(cache, *flags, **values, eval__patience=2)
    assert [line["step"] for line in records(workdir, "eval/")] == [0, 1, 2]
    assert "has ended early at step 2; raise eval.patience" in run(cache, *flags, **values, eval__patience=2)
    assert "trained to step 4; ended early: 4 evaluations" in run(cache, *flags, **values, eval__patience=4)
    assert json.loads((workdir / "eval" / "step_4.json").read_text())["best_by"] == "eval/recall@1"
    assert len((workdir / "eval" / "step_4.rows.jsonl").read_text().splitlines()) == 30


SLOW = pytest.mark.slow
OBJECTIVES = [
    pytest.param({"objective__name": "sequence"}, id="sequence", marks=SLOW),
    pytest.param({"objective__name": "dalm", "objective__contrastive_weight": 0.5}, id="dalm"),
    pytest.param({"objective__name": "none", "generator__path": None}, id="retriever only"),
    pytest.param({"objective__name": "none"}, id="generator unused", marks=SLOW),
    pytest.param({"generator__path": "random:llama", "retriever__path": "random:qwen3"}, id="llama", marks=SLOW),
    pytest.param(
        {"dtype": "bfloat16", "retriever__remat": "dots", "generator__remat": "full"}, id="bfloat16", marks=SLOW
    ),
]


@pytest.mark.parametrize("changes", OBJECTIVES)
def test_every_objective_trains(cache, tmp_path, changes):
    """What is not named is not there, what is not used stays as it is."""
    workdir = tmp_path / "run"
    printed = run(
        cache, "main", f"--config={TINY}", f"--workdir={workdir}", total_steps=2, eval__every_steps=0, **changes
    )
    losses = records(workdir)
    assert len(losses) == 2 and all(np.isfinite(line["loss/total"]) for line in losses)
    assert ("loss/marginal" in losses[0]) == (changes.get("objective__name") != "none")
    assert (" 0% trained" in printed) == (changes == {"objective__name": "none"})
    assert ("\ngenerator " in printed) == ("generator__path" not in changes or changes["generator__path"] is not None)


def test_signals_are_noted_once_then_as_before():
    before = signal.getsignal(signal.SIGTERM)
    with train.stop_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == before
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
