"""The mesh, and rule tables that say how parameters and batches lie on it.

Axes: `replica` (copies of everything, across slices), `data` (the batch, and a share of every large parameter and of
its optimizer state), `model` (tensor parallel).
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as PS

from rag_jax.errors import UserError

AXES = ("replica", "data", "model")
BATCH = PS(("replica", "data"))

# Path -> axes of the parameter, first match wins. Layers are stacked: their leading axis N is never split. An axis that
# does not divide its dimension is left out for that parameter, so odd vocabularies are not split along V.
PARAM_RULES: tuple[tuple[str, PS], ...] = (
    (r"embed/(word|position|token_type)/embedding$", PS("model", "data")),
    (r"embed/distance/embedding$", PS()),
    (r"layers/.*(query|key|value|gate|up)/(kernel|codes|scales)$", PS(None, "data", "model")),
    (r"layers/.*(out|down)/(kernel|codes|scales)$", PS(None, "model", "data")),
    (r"head/kernel$", PS("data", "model")),
    (r"projection/.*kernel$", PS("data", None)),
    # Adapters are small: a copy for every share of `data`, split along `model` as their layers are.
    (r"layers/.*(query|key|value|gate|up)/lora_b$", PS(None, None, "model")),
    (r"layers/.*(out|down)/lora_a$", PS(None, "model", None)),
    (r"lora_[ab]$", PS()),
    (r"(bias|scale)$", PS()),
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


def connect(mesh: Mesh) -> None:
    """Devices exchange a number over every set of axes, when all processes have just met.

    Gloo, which carries what processes on CPUs exchange, gives devices that first meet 30 s to come together. Later they
    may be apart by as long as one compiles and the other does not.
    """
    if jax.process_count() == 1:
        return
    axes = [axis for axis in AXES if mesh.shape[axis] > 1]
    sets = [chosen for count in range(1, len(axes) + 1) for chosen in itertools.combinations(axes, count)]

    def sums() -> list[jax.Array]:
        return [jax.lax.psum(jax.lax.axis_index(chosen), chosen) for chosen in sets]

    jax.block_until_ready(jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=(), out_specs=PS(), check_vma=False))())


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes over which the rows of a batch are split; those of one device are none."""
    return tuple(axis for axis in BATCH[0] if mesh.shape[axis] > 1)


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return mesh.shape["replica"] * mesh.shape["data"]


def check_batch(mesh: Mesh, batch_size: int, group_size: int) -> None:
    """UserError unless every device gets the same number of complete groups."""
    shards, groups = batch_shards(mesh), batch_size // group_size
    if groups % shards:
        raise UserError(
            f"batch_size={batch_size}, group_size={group_size}: {groups} groups cannot be split over the {shards} "
            f"devices of mesh.replica and mesh.data; make batch_size a multiple of {group_size * shards}"
        )


def param_shardings(mesh: Mesh | AbstractMesh, shapes: Any) -> Any:
    """A sharding for every parameter by `PARAM_RULES`; ValueError lists what no rule matches."""
    unmatched: list[str] = []

    def place(key_path: tuple[Any, ...], shape: Any) -> NamedSharding:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")  # generator/layers/mlp/up/kernel
        for pattern, spec in PARAM_RULES:
            if re.search(pattern, path):
                return NamedSharding(mesh, _fit(spec, shape.shape, mesh))
        unmatched.append(path)
        return NamedSharding(mesh, PS())

    shardings = jax.tree_util.tree_map_with_path(place, shapes)
    if unmatched:
        raise ValueError(f"no sharding rule matches {', '.join(unmatched)}; add one to sharding.PARAM_RULES")
    return shardings


def _fit(spec: PS, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PS:
    return PS(*(a if a is None or n % mesh.shape[a] == 0 else None for a, n in zip(spec, shape, strict=False)))


def on_each_device(fn: Callable[..., Any], mesh: Mesh, shardings: Sequence[Any], results: Sequence[Any]) -> Any:
    """`fn` on every device's own rows and shares of parameters; as it is where nothing is split but along `model`.

    The axes of the batch are in our hands inside, so that nothing crosses them but what `fn` sends; `model` stays the
    compiler's.
    """
    axes = batch_axes(mesh)
    if not axes:
        return fn
    own = functools.partial(jax.tree.map, lambda s: PS(*(_axes_among(part, axes) for part in s.spec)))
    return jax.shard_map(
        fn, mesh=mesh, in_specs=tuple(map(own, shardings)), out_specs=tuple(map(own, results)),
        axis_names=set(axes), check_vma=False,
    )  # fmt: skip


def _axes_among(part: Any, axes: tuple[str, ...]) -> Any:
    """What of a dimension's axes is among `axes`."""
    kept = tuple(axis for axis in (part if isinstance(part, tuple) else (part,)) if axis in axes)
    return kept or None


def gather_params(shardings: Any, path: tuple[str, ...], params: Any, sent: Any, dtype: Any) -> Any:
    """The parameters below `path`, complete along `data` and in `dtype`, from the shares that devices have `sent`.

    Runs inside `on_each_device`. Without the leading axis of `shardings` for one layer of stacked parameters. Their
    gradients come back summed over `data` in float32, each device's share to it.
    """
    for name in path:
        shardings = shardings[name]

    def complete(param: jax.Array, sharding: NamedSharding) -> jax.Array:
        if not batch_axes(sharding.mesh):
            return param.astype(dtype)
        spec = tuple(sharding.spec) + (None,) * (param.ndim - len(sharding.spec))
        spec = spec[len(spec) - param.ndim :]
        if "data" not in spec or sharding.mesh.shape["data"] == 1:
            return param.astype(dtype)
        gather = functools.partial(_gather, axis=spec.index("data"), sent=sent, dtype=dtype)
        if sharding.mesh.shape["model"] == 1:
            return gather(param)
        # Left to the compiler, `model` would be gathered first and cut again afterwards.
        inner = PS(*(name if name == "model" else None for name in spec))
        return jax.shard_map(gather, in_specs=inner, out_specs=inner, axis_names={"model"}, check_vma=False)(param)

    return jax.tree.map(complete, params, {name: shardings[name] for name in params})


@functools.partial(jax.custom_vjp, nondiff_argnames=("axis", "sent", "dtype"))
def _gather(share: jax.Array, axis: int, sent: Any, dtype: Any) -> jax.Array:
    return jax.lax.all_gather(share.astype(sent), "data", axis=axis, tiled=True).astype(dtype)


def _gather_forward(share: jax.Array, axis: int, sent: Any, dtype: Any) -> tuple[jax.Array, None]:
    return _gather(share, axis, sent, dtype), None


def _gather_backward(axis: int, sent: Any, dtype: Any, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    gradient = gradient.astype(jnp.float32)
    return (jax.lax.psum_scatter(gradient, "data", scatter_dimension=axis, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)


def sum_gradients(gradients: Any, shardings: Any) -> Any:
    """Gradients of the batch from those of every device's rows; `gather_params` has summed some over `data` before."""

    def total(gradient: jax.Array, sharding: NamedSharding) -> jax.Array:
        axes = batch_axes(sharding.mesh)
        left = tuple(axis for axis in axes if not (axis == "data" and "data" in sharding.spec))
        return jax.lax.psum(gradient, left) if left else gradient

    return jax.tree.map(total, gradients, shardings)


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Places in the batch of the rows that lie on this process's devices, ascending."""
    places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in places.values() if index is not None]))


def put_batch(mesh: Mesh, batch: Any, batch_size: int) -> Any:
    """Global arrays of `batch_size` rows, split along the batch, from numpy arrays of this process's `own_rows`."""
    sharding, rows = NamedSharding(mesh, BATCH), own_rows(mesh, batch_size)

    def put(own: Any) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(batch_size)
            start = int(np.searchsorted(rows, first))
            return np.asarray(own[start : start + last - first])

        return jax.make_array_from_callback((batch_size, *own.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)


def to_host(array: jax.Array) -> np.ndarray:
    """All of an array on every process, wherever its parts lie; every process must call."""
    if array.is_fully_addressable:
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
