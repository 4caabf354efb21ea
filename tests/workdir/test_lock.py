"""A workdir has one writer, and a killed one leaves nothing behind."""

import re
import signal
import subprocess
import sys

import pytest
from command import ROOT

from rag_jax.errors import UserError
from rag_jax.workdir import lock

HOLDER = """
import pathlib, sys, time
from rag_jax.workdir import lock
with lock.only_writer(pathlib.Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(60)
"""


def test_the_second_is_refused_until_the_first_is_gone(tmp_path):
    workdir = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, workdir], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "holds\n"
        refused = rf"--workdir={re.escape(str(workdir))}: process {holder.pid} on \S+ trains there; stop it first"
        with pytest.raises(UserError, match=refused), lock.only_writer(workdir):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with lock.only_writer(workdir):
            pass
    finally:
        holder.kill()
        holder.wait()
