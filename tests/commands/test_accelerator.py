"""The check of an accelerator, rehearsed on a CPU: every phase says what its table shows."""

import json
import subprocess
import sys

import pytest
from command import ROOT, environment

from benchmarks import accelerator


@pytest.mark.slow
@pytest.mark.parametrize(
    "phases",
    [pytest.param("steps,torch", id="steps"), pytest.param("numbers,resume", id="bits", marks=pytest.mark.soak)],
)
def test_a_rehearsal(tmp_path, phases):
    command = [sys.executable, "-m", "benchmarks.accelerator", "--small", f"--phases={phases}", f"--out={tmp_path}"]
    with_torch = environment(tmp_path) | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=with_torch, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "accelerator.json").read_text())
    assert {fact["phase"] for fact in found} == set(phases.split(",")) and all(fact.get("ok", True) for fact in found)
    kinds = {fact["kind"] for fact in found}
    expected = {
        "steps": {"step", "twice", "decode"},
        "numbers": {"device", "peaks", "correctness", "attention", "search"},
    }
    assert expected[phases.split(",")[0]] <= kinds and "FAILED" not in ended.stdout
    if "torch" in phases:
        assert "times as fast as PyTorch" in ended.stdout


def test_a_phase_that_fails_or_is_late_is_a_line_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (failed,) = accelerator.run_phase("numbers", 60, tmp_path, small=True)
    assert failed["kind"] == "error" and failed["error"].startswith("ended with 1")
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\necho \'RESULT {"kind": "peaks", "bf16_tflops": 1, "copy_tbs": 2}\'\nsleep 60\n')
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    said, late = accelerator.run_phase("numbers", 1, tmp_path, small=True)
    assert said["bf16_tflops"] == 1 and "cut off after 1 s" in late["error"]
    shown = accelerator.table([said, late])
    assert "product 1 TFLOP/s, copy 2.00 TB/s" in shown and "FAILED      numbers: ended with -9" in shown
