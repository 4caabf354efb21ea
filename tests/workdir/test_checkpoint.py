"""Saving while training goes on, restoring apart and elsewhere, what is kept, and clear errors."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command import ROOT
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rag_jax.errors import UserError
from rag_jax.evaluation.metrics import HIGHER_IS_BETTER
from rag_jax.workdir import checkpoint, checksums
from rag_jax.workdir.checkpoint import Checkpoints, best_step, set_aside


def sharding(devices, *spec):
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    return NamedSharding(mesh, PartitionSpec(*spec))


def abstract(tree, where):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), tree)


def params_of(value):
    """Two parameters and a leaf that lives elsewhere; `value` tells saves apart."""
    return {"generator": {"kernel": jnp.full((8, 3), value), "frozen": None}, "retriever": {"scale": jnp.arange(5.0)}}


def write_eval(workdir, step, **metrics):
    (workdir / "eval").mkdir(exist_ok=True)
    (workdir / "eval" / f"step_{step}.json").write_text(json.dumps(metrics))


def test_what_was_saved_comes_back_on_another_mesh(tmp_path):
    rng = np.random.default_rng(0)
    kernel, scale = rng.normal(size=(8, 3)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    params = {"norm": {"scale": jax.device_put(scale, sharding(8))}}
    params["kernel"] = jax.device_put(kernel, sharding(8, "data"))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(7, {"params": params, "opt_state": opt_state})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest_good() == (7, {})
        where = sharding(4)
        items = {"params": abstract(params, where), "opt_state": abstract(opt_state, where)}
        restored = checkpoints.restore(items)
        only_params = checkpoints.restore({"params": abstract(params, sharding(2, None))}, 7)
    np.testing.assert_array_equal(restored["params"]["kernel"], kernel)
    np.testing.assert_array_equal(restored["params"]["norm"]["scale"], scale)
    assert restored["params"]["kernel"].sharding.num_devices == 4
    assert jax.tree.structure(restored["opt_state"]) == jax.tree.structure(opt_state)
    adam = restored["opt_state"][1]
    np.testing.assert_array_equal(adam.mu["kernel"], opt_state[1].mu["kernel"])
    assert int(adam.count) == 1
    np.testing.assert_array_equal(only_params["params"]["kernel"], kernel)
    assert list(only_params) == ["params"]


def test_the_saved_arrays_are_those_of_the_call_though_their_memory_is_reused(tmp_path):
    update = jax.jit(lambda tree: jax.tree.map(lambda a: a * 0 - 1.0, tree), donate_argnums=0)
    params = {"kernel": jnp.full((512, 512), 3.0)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"params": params, "opt_state": {"count": jnp.zeros(())}})
        for _ in range(3):
            params = update(params)
        jax.block_until_ready(params)
        checkpoints.wait()
        restored = checkpoints.restore({"params": abstract(params, sharding(1))})
    assert float(restored["params"]["kernel"].min()) == 3.0


def test_the_newest_are_kept_and_the_best(tmp_path):
    write_eval(tmp_path, 1, **{"eval/mrr@10": 0.2})
    write_eval(tmp_path, 2, **{"eval/mrr@10": 0.9, "eval/answer_nll": 9.0})
    write_eval(tmp_path, 4, **{"eval/mrr@10": 0.5})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, {"params": params_of(step), "opt_state": {"count": jnp.zeros(())}})
            checkpoints.save(step, {"params": params_of(-1.0), "opt_state": {"count": jnp.zeros(())}})
        assert checkpoints.steps() == [2, 4, 5]
        assert (checkpoints.find("best"), checkpoints.find("latest"), checkpoints.find(4)) == (2, 5, 4)
        restored = checkpoints.restore({"params": abstract(params_of(0.0), sharding(1))}, "best")
        assert float(restored["params"]["generator"]["kernel"][0, 0]) == 2.0, "the first save of a step stays"


def test_steps_of_a_period_are_kept_for_good(tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_every=3) as checkpoints:
        for step in range(1, 9):
            checkpoints.save(step, {"params": params_of(step), "opt_state": {"count": jnp.zeros(())}})
        assert checkpoints.steps() == [3, 6, 8]


def test_the_best_is_the_best_by_what_the_newest_evaluation_names(tmp_path):
    write_eval(tmp_path, 1, **{"eval/mrr@10": 0.9, "eval/recall@1": 0.1, "eval/answer_nll_gold": 3.0})
    write_eval(tmp_path, 2, **{"eval/mrr@10": 0.8, "eval/recall@1": 0.3, "eval/answer_nll_gold": 2.0})
    write_eval(tmp_path, 3, **{"eval/mrr@10": 0.7, "eval/recall@1": 0.2, "eval/answer_nll_gold": 1.0})
    assert best_step(tmp_path, [1, 2, 3]) == 1
    for name, best in (("eval/recall@1", 2), ("eval/answer_nll_gold", 3), ("eval/mrr@10", 1)):
        write_eval(tmp_path, 4, **{"best_by": name, "eval/mrr@10": 0.0})
        assert best_step(tmp_path, [1, 2, 3], HIGHER_IS_BETTER) == best
    assert checkpoint.scores(tmp_path, HIGHER_IS_BETTER) == {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.0}


def test_the_direction_is_what_the_table_says_and_not_what_the_name_looks_like(tmp_path):
    for step, (loss, nll) in enumerate([(3.0, 1.0), (1.0, 2.0), (2.0, 3.0)], start=1):
        write_eval(tmp_path, step, **{"best_by": "eval/answer_loss", "eval/answer_loss": loss, "eval/nllish": nll})
    assert best_step(tmp_path, [1, 2, 3], HIGHER_IS_BETTER | {"eval/answer_loss": False}) == 2
    write_eval(tmp_path, 4, best_by="eval/nllish")
    assert best_step(tmp_path, [1, 2, 3], HIGHER_IS_BETTER | {"eval/nllish": True}) == 3
    assert best_step(tmp_path, [1, 2, 3], HIGHER_IS_BETTER) is None  # of a metric nobody knows there is no best


def test_patience_ends_when_nothing_better_came():
    assert not checkpoint.exhausted({0: 0.1, 3: 0.2}, 0)  # 0: never
    assert not checkpoint.exhausted({0: 0.5, 3: 0.2}, 2)  # too few yet
    assert checkpoint.exhausted({0: 0.5, 3: 0.2, 6: 0.5}, 2)  # as good is not better
    assert not checkpoint.exhausted({0: 0.5, 3: 0.2, 6: 0.6}, 2)
    assert not checkpoint.exhausted({0: 0.5, 3: 0.6, 6: 0.1}, 2)
    assert checkpoint.exhausted({6: 0.1, 0: 0.5, 9: 0.1, 3: 0.6}, 2)


def test_without_a_retriever_the_best_has_the_lowest_answer_nll(tmp_path):
    write_eval(tmp_path, 1, **{"eval/answer_nll": 3.0})
    write_eval(tmp_path, 2, **{"eval/answer_nll": 2.0})
    write_eval(tmp_path, 3, **{"eval/answer_nll": 2.5})
    assert best_step(tmp_path, [1, 2, 3, 4]) == 2
    assert best_step(tmp_path, [4]) is None


def test_a_missing_checkpoint_is_one_clear_line(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest_good() == (None, {})
        with pytest.raises(UserError, match=r"no checkpoint in .*checkpoints"):
            checkpoints.find()
    assert not list(tmp_path.iterdir()), "looking creates nothing"
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, {"params": params_of(1.0), "opt_state": {"count": jnp.zeros(())}})
        with pytest.raises(UserError, match=r"--step=7: not in .*, which holds 3; give one, latest or best"):
            checkpoints.find("7")
        with pytest.raises(UserError, match=r"--step=newest: not in"):
            checkpoints.find("newest")
        with pytest.raises(UserError, match=r"--step=best: no saved step of .* was evaluated"):
            checkpoints.find("best")


def test_other_models_than_the_checkpoint_holds_are_listed(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, {"params": params_of(1.0), "opt_state": {"count": jnp.zeros(())}})
        other = {"generator": {"kernel": jnp.ones((8, 4))}, "retriever": {"bias": jnp.ones(5)}}
        with pytest.raises(UserError, match="does not fit the config") as error:
            checkpoints.restore({"params": abstract(other, sharding(1))})
    for part in (
        "params/generator/kernel is (8, 3), not (8, 4)",
        "params/retriever/bias is missing",
        "params/retriever/scale is not part of these models",
    ):
        assert part in str(error.value)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A workdir with the steps 10 and 20, as they came out of saving."""
    workdir = tmp_path_factory.mktemp("two_steps")
    with Checkpoints(workdir, keep=2) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, {"params": params_of(float(step)), "opt_state": {"count": jnp.full((), step)}})
    return workdir


def truncated(content):
    return content[: len(content) // 2]


def last_byte_cut(content):
    return content[:-1]


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def deleted(content):
    return None


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", [truncated, last_byte_cut, flipped, deleted])
def test_whatever_file_of_the_newest_is_damaged_the_one_before_it_is_used(two_steps, tmp_path, damage, capsys):
    """Each file in turn: found, named, nothing restored from it, nothing of it changed."""
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    newest = workdir / "checkpoints" / "20"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert len(files) > 20 and {"CHECKSUMS", "_CHECKPOINT_METADATA", "manifest.ocdbt"} <= {path.name for path in files}
    items = {"params": abstract(params_of(0.0), sharding(1)), "opt_state": {"count": jnp.zeros(())}}
    for path in files:
        whole = path.read_bytes()
        content = damage(whole)
        path.unlink() if content is None else path.write_bytes(content)
        before = everything(workdir)
        with Checkpoints(workdir) as checkpoints:
            name = path.relative_to(newest).as_posix()
            if name == "CHECKSUMS" and damage is flipped:
                name = "params/_METADATA"  # whose sum was changed: which of both is wrong cannot be told
            assert checkpoints.steps() == [10, 20]
            step, damaged = checkpoints.newest_good()
            assert step == 10 and list(damaged) == [20] and damaged[20].startswith(f"{name} "), (name, damaged)
            with pytest.raises(UserError, match=rf"--step=20: checkpoint .*/20 is damaged \({re.escape(name)} "):
                checkpoints.restore(items, 20)
            restored = checkpoints.restore(items)
        assert float(restored["params"]["generator"]["kernel"][0, 0]) == float(restored["opt_state"]["count"]) == 10
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and f"checkpoints/20 is damaged ({name} " in said[0] and "step 10 is taken" in said[0]
        assert everything(workdir) == before
        path.write_bytes(whole)
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.newest_good() == (20, {}), "put back, it is good again"


def test_a_file_that_does_not_belong_there_makes_a_step_doubtful(two_steps, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    (workdir / "checkpoints" / "20" / "params" / "d" / "more").write_bytes(b"1")
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.newest_good() == (10, {20: "params/d/more does not belong there"})


def test_without_a_whole_one_nothing_is_restored_and_nothing_changed(two_steps, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    for step in (10, 20):
        (workdir / "checkpoints" / str(step) / "params" / "_METADATA").unlink()
    before = everything(workdir)
    nothing = r"no checkpoint in .* is intact \(20: params/_METADATA is missing; 10: params/_METADATA is missing\)"
    with Checkpoints(workdir) as checkpoints:
        for ask in (checkpoints.newest_good, checkpoints.find):
            with pytest.raises(UserError, match=nothing):
                ask()
    assert everything(workdir) == before


def test_what_is_set_aside_is_kept_whole_and_no_step_any_more(two_steps, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    kept = everything(workdir / "checkpoints" / "20")
    line = set_aside(workdir, {20: "params/d/x is missing"})
    assert line == [
        f"checkpoint {workdir}/checkpoints/20 is damaged (params/d/x is missing): it is kept as damaged-20, and an "
        "older one is used"
    ]
    with Checkpoints(workdir, keep=1) as checkpoints:
        assert checkpoints.steps() == [10]
        for step in (20, 30):
            checkpoints.save(step, {"params": params_of(1.0), "opt_state": {"count": jnp.zeros(())}})
        assert checkpoints.steps() == [30]
    assert everything(workdir / "checkpoints" / "damaged-20") == kept
    (workdir / "checkpoints" / "30").rename(workdir / "checkpoints" / "20")
    set_aside(workdir, {20: "again"})
    assert (workdir / "checkpoints" / "damaged-20-2").is_dir()


@pytest.mark.parametrize("name", ["with space", "ünïcode 文", "a#b%20c", 'it\'s "so"', "two\nlines", "-dash"])
def test_any_name_of_a_folder_will_do(tmp_path, name):
    tree = {"params": params_of(2.0), "opt_state": {"count": jnp.zeros(())}}
    with Checkpoints(tmp_path / name, keep=1) as checkpoints:
        checkpoints.save(1, tree)
    with Checkpoints(tmp_path / name) as checkpoints:
        restored = checkpoints.restore({"params": abstract(params_of(0.0), sharding(1))})
    assert float(restored["params"]["generator"]["kernel"][0, 0]) == 2.0


def test_checksums_are_those_of_b2sum(two_steps):
    folder = two_steps / "checkpoints" / "20"
    ended = subprocess.run(["b2sum", "--check", "--quiet", "CHECKSUMS"], cwd=folder, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    lines = (folder / "CHECKSUMS").read_text().splitlines()
    assert {line.split("  ")[1] for line in lines} == {str(path) for path in everything(folder)} - {"CHECKSUMS"}


def test_a_save_that_fails_in_the_background_is_told_at_the_next_look(tmp_path, monkeypatch):
    monkeypatch.setattr(
        checksums, "write", lambda folder: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    tree = {"params": params_of(1.0), "opt_state": {"count": jnp.zeros(())}}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(5, tree)
    with pytest.raises(UserError, match=r"checkpoints/5 could not be saved \(no space left on the device\)"):
        for _ in range(1000):
            checkpoints.check_saving()
            time.sleep(0.01)
    checkpoints.close()
    monkeypatch.undo()
    with Checkpoints(tmp_path, keep=1) as again:
        assert again.steps() == []
        again.save(5, tree)
        assert again.newest_good() == (5, {})


FILLING = """
import sys, time
from rag_jax import cli
def main():
    import jax.numpy as jnp, numpy as np
    from rag_jax.workdir.checkpoint import Checkpoints
    arrays = {str(n): jnp.asarray(np.random.default_rng(n).normal(size=(300, 300))) for n in range(8)}
    checkpoints = Checkpoints(sys.argv[1], keep=9)
    for step in range(1, 9):
        checkpoints.save(step, {"params": arrays, "opt_state": {"count": jnp.zeros(())}})
        while checkpoints.check_saving() or checkpoints.steps() != list(range(1, step + 1)):
            time.sleep(0.01)
cli.run(main)
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_the_ones_before(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        command = [sys.executable, "-c", FILLING, str(disk / "run")]
        ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        with Checkpoints(disk / "run") as checkpoints:
            steps = checkpoints.steps()
            assert len(steps) > 1 and checkpoints.newest_good() == (steps[-1], {})
        failed = f"rag_jax: error: checkpoint {disk}/run/checkpoints/{steps[-1] + 1} could not be saved (no space left"
        assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1 and ended.stderr.startswith(failed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.soak
def test_a_process_killed_while_it_saves_leaves_the_finished_ones(tmp_path):
    program = textwrap.dedent("""
        import sys, jax.numpy as jnp
        from rag_jax.workdir.checkpoint import Checkpoints
        checkpoints = Checkpoints(sys.argv[1], keep=100)
        for step in range(1, 1000):
            tree = {"kernel": jnp.full((1024, 1024), float(step))}
            checkpoints.save(step, {"params": tree, "opt_state": {"count": jnp.zeros(())}})
            print(step, flush=True)
    """)
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "6":
            pass
        os.kill(process.pid, signal.SIGKILL)
    with Checkpoints(tmp_path, keep=100) as checkpoints:
        newest = checkpoints.find()
        assert newest >= 4
        tree = {"kernel": jnp.zeros((1024, 1024))}
        restored = checkpoints.restore({"params": abstract(tree, sharding(1))})
    np.testing.assert_array_equal(restored["params"]["kernel"], np.full((1024, 1024), newest, np.float32))
