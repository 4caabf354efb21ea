"""The mesh, and rule tables that say how parameters and batches lie on it.

Axes: `replica` (copies of everything, across slices), `data` (the batch, and a share of every large parameter and of
its optimizer state), `model` (tensor parallel).
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rag_jax.errors import UserError

P = PartitionSpec

AXES = ("replica", "data", "model")
BATCH = P(("replica", "data"))

# Path -> axes of the parameter, first match wins. Layers are stacked: their leading axis N stays whole. An axis that
# does not divide its dimension is left out for that parameter, so odd vocabularies are whole along V.
PARAM_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/(word|position|token_type)/embedding$", P("model", "data")),
    (r"layers/.*(query|key|value|gate|up)/kernel$", P(None, "data", "model")),
    (r"layers/.*(out|down)/kernel$", P(None, "model", "data")),
    (r"head/kernel$", P("data", "model")),
    (r"(bias|scale)$", P()),
)


def make_mesh(replica: int, data: int, model: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices; -1 stands for what the other axes leave. UserError when the numbers do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = {"replica": replica, "data": data, "model": model}
    shown = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    taken = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise UserError(f"{shown}: only one axis may be -1; give the others a number")
    if len(devices) % taken or (not free and taken != len(devices)):
        raise UserError(f"{shown}: does not fit {len(devices)} devices; their product must be {len(devices)}")
    if free:
        sizes[free[0]] = len(devices) // taken
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return mesh.shape["replica"] * mesh.shape["data"]


def check_batch(mesh: Mesh, batch_size: int, group_size: int) -> None:
    """UserError unless every device gets the same number of whole groups."""
    shards, groups = batch_shards(mesh), batch_size // group_size
    if groups % shards:
        raise UserError(
            f"batch_size={batch_size}, group_size={group_size}: {groups} groups cannot be split over the {shards} "
            f"devices of mesh.replica and mesh.data; make batch_size a multiple of {group_size * shards}"
        )


def path_of(key_path: tuple[Any, ...]) -> str:
    """`generator/layers/mlp/up/kernel` for a path of `jax.tree_util`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path)


def param_shardings(mesh: Mesh, shapes: Any) -> Any:
    """A sharding for every parameter by `PARAM_RULES`; ValueError lists what no rule matches."""
    unmatched: list[str] = []

    def place(key_path: tuple[Any, ...], shape: Any) -> NamedSharding:
        path = path_of(key_path)
        for pattern, spec in PARAM_RULES:
            if re.search(pattern, path):
                return NamedSharding(mesh, _fit(spec, shape.shape, mesh))
        unmatched.append(path)
        return NamedSharding(mesh, P())

    shardings = jax.tree_util.tree_map_with_path(place, shapes)
    if unmatched:
        raise ValueError(f"no sharding rule matches {', '.join(unmatched)}; add one to sharding.PARAM_RULES")
    return shardings


def _fit(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    return P(*(a if a is None or n % mesh.shape[a] == 0 else None for a, n in zip(spec, shape, strict=False)))


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Global arrays, split along the batch, from numpy arrays that hold this process's rows (all of them if alone)."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), batch)
