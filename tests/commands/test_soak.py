"""The soak in small: a few interruptions, and a wrong continuation that it must tell apart."""

import os
import subprocess
import sys

import pytest
from command import ROOT


@pytest.mark.soak
def test_interrupted_runs_end_with_the_same_bits():
    """One process and two, with dropout, shuffling, groups, buckets and bfloat16."""
    words = "--interruptions=6 --processes=1,2 --controls=1 --seed=1".split()
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("different: none") == 2 and "all holds" in ended.stdout
