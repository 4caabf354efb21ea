"""The soak in small: a few interruptions of one run, and a wrong continuation that it must tell apart."""

import os
import subprocess
import sys

import pytest
from command import ROOT


@pytest.mark.slow
def test_a_run_interrupted_in_every_way_ends_with_the_same_bits():
    words = "--interruptions=4 --processes=1 --controls=1 --seed=1".split()
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "different: none" in ended.stdout and "all holds" in ended.stdout
