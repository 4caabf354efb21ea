"""The processes of a run find each other before jax does: jax ends a late start without a word on who is missing.

Process 0 listens where jax's coordinator will, every other one knocks there and says who it is, and when all have come
each is let in. One JSON object a line both ways.
"""

import contextlib
import json
import socket
import time
from collections.abc import Mapping
from typing import Any

from rag_jax.errors import UserError

RETRY_S = 0.2
LINE_BYTES = 4096
# A connection that says nothing for so long is not one of ours.
SILENCE_S = 5.0


def meet(address: str, count: int, index: int, timeout_s: float) -> None:
    """Returns when all `count` processes have come to `address` (host:port); UserError names those that have not."""
    if count == 1:
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: must be HOST:PORT")
    deadline = time.monotonic() + timeout_s
    here = (host.strip("[]"), int(port))
    if index:
        _knock(here, count, index, deadline, timeout_s)
    else:
        _gather(here, count, deadline, timeout_s)


def _gather(here: tuple[str, int], count: int, deadline: float, timeout_s: float) -> None:
    came: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_server(here, backlog=count))
        except OSError as error:
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS={here[0]}:{here[1]}: process 0 cannot listen there ({error.strerror}); "
                "give a free port of the machine that process 0 runs on"
            ) from None
        while len(came) < count - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                caller = stack.enter_context(server.accept()[0])
                caller.settimeout(min(SILENCE_S, left))
                said = _read(caller)
            except (OSError, ValueError):
                continue
            index = said.get("process")
            if said.get("processes") != count or not isinstance(index, int) or not 0 < index < count:
                _tell(caller, error=f"process 0 counts {count} processes; give all the same JAX_NUM_PROCESSES")
            elif index in came:
                _tell(caller, error=f"JAX_PROCESS_ID={index} is taken; give each process its own")
            else:
                came[index] = caller
        missing = [index for index in range(1, count) if index not in came]
        problem = None
        if missing:
            named = f"process{'es' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {count}"
            problem = f"{named} did not come to {here[0]}:{here[1]} within {timeout_s:g} s; is each started there?"
        for caller in came.values():
            _tell(caller, error=problem)
    if problem:
        raise UserError(problem)


def _knock(there: tuple[str, int], count: int, index: int, deadline: float, timeout_s: float) -> None:
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(there, timeout=left) as door:
                _tell(door, process=index, processes=count)
                # Process 0 answers at its own deadline at the latest, and it may have started later.
                door.settimeout(left + timeout_s)
                answer = _read(door)
        except (OSError, ValueError):
            time.sleep(RETRY_S)
            continue
        if answer.get("error"):
            raise UserError(f"process {index}: {answer['error']}")
        return
    raise UserError(
        f"process {index} of {count}: process 0 was not to be reached at {there[0]}:{there[1]} within {timeout_s:g} s; "
        "is it started, is JAX_COORDINATOR_ADDRESS its machine, is the port open?"
    )


def _tell(to: socket.socket, **what: Any) -> None:
    with contextlib.suppress(OSError):
        to.sendall(json.dumps(what).encode() + b"\n")


def _read(caller: socket.socket) -> Mapping[str, Any]:
    line = b""
    while not line.endswith(b"\n"):
        part = caller.recv(LINE_BYTES)
        if not part or len(line) > LINE_BYTES:
            raise ValueError("no complete line")
        line += part
    said = json.loads(line)
    if not isinstance(said, dict):
        raise ValueError("no object")
    return said
