"""What a run does not train. No checkpoint holds it: `frozen.json` says what it was, its models' folders have it."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from rag_jax import files
from rag_jax.errors import UserError

NAME = "frozen.json"
Fingerprints = Mapping[str, list[int]]  # of each parameter, by its path


def write(workdir: pathlib.Path, fingerprints: Fingerprints) -> None:
    """In place of what an earlier run left there; of a run that trains all, nothing."""
    (workdir / NAME).unlink(missing_ok=True)
    if fingerprints:
        files.write_json(workdir / NAME, dict(fingerprints))


def read(workdir: pathlib.Path) -> dict[str, list[int]]:
    """The fingerprints of what the run does not train; none of a run that trains all or keeps all in checkpoints."""
    path = workdir / NAME
    if not path.is_file():
        return {}
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); bring it back from a copy") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (no object); bring it back from a copy")
    return content


def check(workdir: pathlib.Path, now: Fingerprints, paths: Mapping[str, str]) -> None:
    """UserError where parameters are others than the run began with; `paths`: of the models' folders, by role."""
    before = read(workdir)
    changed = [path for path, numbers in now.items() if before.get(path, numbers) != numbers]
    if changed:
        role = changed[0].split("/")[0]
        raise UserError(
            f"{role}.path={paths[role]!r}: holds other weights than {workdir} was trained with ({changed[0]}"
            f"{f' and {len(changed) - 1} more' if len(changed) > 1 else ''}), and its checkpoints hold only what was "
            f"trained; bring back the model that it began with, or say where it is, --config.{role}.path=DIR"
        )
