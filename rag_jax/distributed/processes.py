"""Several processes of one run: joining them, seeing that they agree, and ending together."""

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rag_jax import untrusted
from rag_jax.distributed import rendezvous
from rag_jax.errors import UserError

# All of these or none tell processes of each other; on Slurm, Kubernetes and TPU pods jax finds out by itself.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
ASKED, TIMEOUT = "RAG_JAX_DISTRIBUTED", "RAG_JAX_START_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 300
# How long the others go on waiting for a process that died without a word.
HEARTBEAT_S = 30
DIGEST_BYTES = 8
EXIT_S = 2.0
# What exchanges with a process that is gone fail with.
LOST = ("Gloo", "UNAVAILABLE", "Connection closed", "Connection reset")
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def start() -> None:
    """Join the other processes of the run, if the environment tells of any; before anything touches a device.

    UserError for variables that contradict each other, and when the others do not come in time.
    """
    given = [name for name in VARIABLES if name in os.environ]
    if given and len(given) < len(VARIABLES):
        missing = ", ".join(name for name in VARIABLES if name not in os.environ)
        raise UserError(f"{', '.join(given)} is set, but not {missing}; set all three or none")
    if not given and not _asked():
        return
    timeout = os.environ.get(TIMEOUT, str(DEFAULT_TIMEOUT_S))
    numbers = {name: os.environ[name] for name in VARIABLES[1:] if given} | {TIMEOUT: timeout}
    for name, value in numbers.items():
        if not value.isdecimal():
            raise UserError(f"{name}={value}: must be a whole number")
    if given and int(numbers[VARIABLES[2]]) >= int(numbers[VARIABLES[1]]):
        raise UserError(
            f"JAX_PROCESS_ID={numbers[VARIABLES[2]]}: must be below JAX_NUM_PROCESSES={numbers[VARIABLES[1]]}"
        )

    import jax  # here: commands answer a mistyped flag before they load it

    where: tuple[Any, ...] = ()
    if given:
        where = (os.environ[VARIABLES[0]], *(int(numbers[name]) for name in VARIABLES[1:]))
        past_proxies(os.environ[VARIABLES[0]])
        rendezvous.meet(*where, timeout_s=float(timeout))
    with _giving_up_after(int(timeout)):
        jax.distributed.initialize(*where, initialization_timeout=int(timeout), heartbeat_timeout_seconds=HEARTBEAT_S)


def past_proxies(coordinator: str) -> None:
    """Processes call each other directly, whatever proxy the environment names for the world outside.

    gRPC, by which jax's do, asks `no_grpc_proxy` first, then `no_proxy`.
    """
    before = next((os.environ[name] for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY") if os.environ.get(name)), "")
    host = coordinator.rpartition(":")[0].strip("[]")
    os.environ["no_grpc_proxy"] = ",".join(filter(None, [before, host]))


def check_platform() -> None:
    """UserError where the environment asks for a kind of device that jax does not find."""
    import jax

    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        asked = os.environ.get("JAX_PLATFORMS")
        if not asked:
            raise
        reason = untrusted.one_line(error) if str(error) else "jax has no such plugin here"
        raise UserError(
            f"JAX_PLATFORMS={asked}: no such device can be used ({reason}); install its jax, "
            "pip install -e '.[cuda]' or '.[tpu]' (docs/installing.md), or unset JAX_PLATFORMS"
        ) from None


def _asked() -> bool:
    """Whether this process is one of several that a cluster has started."""
    if ASKED in os.environ:
        return os.environ[ASKED] not in ("", "0")
    step_tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # of srun alone, not of a shell inside an allocation
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return step_tasks not in ("", "1") or "," in workers or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ


@contextlib.contextmanager
def _giving_up_after(timeout_s: int) -> Iterator[None]:
    """Ends the process with a line of ours a little before jax would end it with a stack trace."""

    def give_up() -> None:
        print(
            f"rag_jax: error: the other processes of this run did not come within {timeout_s} s; see which of them was "
            f"not started, or give them longer with {TIMEOUT}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(max(timeout_s - EXIT_S, 0.0), give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """What every process must get through: where one cannot, none goes on, and those that could say which it was.

    Whatever it fails with: the others would wait for it in their next exchange.
    """
    import jax

    problem: BaseException | None = None
    try:
        yield
    except BaseException as error:
        problem = error
    if jax.process_count() > 1:
        failed = np.flatnonzero(_from_all(np.array([problem is not None])))
        if len(failed) and problem is None:
            raise UserError(f"process {', '.join(map(str, failed))} cannot start; its own message says why")
    if problem is not None:
        raise problem


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """An error ends one of several processes at once: the others may be waiting for it, and learn of it by its end."""
    import jax

    try:
        yield
    except BaseException as error:
        text = str(error) if isinstance(error, UserError | OSError) else None
        if isinstance(error, jax.errors.JaxRuntimeError | ValueError) and any(word in str(error) for word in LOST):
            text = f"another process of this run has ended ({untrusted.one_line(error, 120)}); its own message says why"
        if jax.process_count() > 1:
            told = traceback.format_exc() if text is None else f"rag_jax: error: {untrusted.shown(text)}\n"
            print(told, end="", file=sys.stderr, flush=True)
            os._exit(1 if text is None else 2)
        raise


def check_agreement(facts: Mapping[str, Any]) -> None:
    """UserError that names what differs between the processes: code, libraries, or one of `facts`."""
    import jax

    if jax.process_count() == 1:
        return
    versions = {f"version of {name}": importlib.metadata.version(name) for name in LIBRARIES}
    # The code first: of other code the facts may have other names.
    for shared in ({"code of rag_jax": _code()} | versions, facts):
        digests = np.stack([np.frombuffer(_digest(str(value).encode()), np.uint8) for value in shared.values()])
        differs = (_from_all(digests) != digests).any(axis=(0, 2))
        names = [name for name, other in zip(shared, differs, strict=True) if other]
        if names:
            here = "; ".join(f"{name} is {shared[name]}" for name in names[:5])
            raise UserError(f"the processes of this run disagree: in process {jax.process_index()} {here}")


def _from_all(value: np.ndarray) -> np.ndarray:
    """Every process's value of one shape, in the order of the processes."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(value))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


def _code() -> str:
    """What the package's own source is, whatever its version says."""
    files = sorted(pathlib.Path(__file__).parents[1].rglob("*.py"))
    return _digest(b"".join(path.read_bytes() for path in files)).hex()
