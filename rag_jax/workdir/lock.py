"""One writer a workdir."""

import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import socket
from collections.abc import Iterator

from rag_jax.errors import UserError

NAME = ".lock"
# Of file systems that have no locks, such as Lustre without the option flock.
WITHOUT = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def only_writer(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir; UserError when another process does. The kernel lets go of it, however a process ends."""
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / NAME, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"--workdir={workdir}: {holder} trains there; stop it first, or give another folder"
            ) from None
        except OSError as error:
            if error.errno not in WITHOUT:
                raise
            logging.warning(
                "--workdir=%s: its file system has no locks (%s), so nothing keeps a second process from training "
                "there; see to it yourself",
                workdir,
                error.strerror,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
