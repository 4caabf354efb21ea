"""Programs of one model, compiled once and run where its parameters lie: on one device, or on all of their mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as PS

from rag_jax import rag
from rag_jax.distributed import sharding

Specs = tuple[PS, ...]
# Kept at a time; the least recently used are dropped.
PROGRAMS = 64


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where each parameter of a model lies. Equal for parameters that lie alike, so programs can be kept by it."""

    role: str  # "retriever" | "generator"
    structure: Any
    leaves: tuple[Any, ...]

    @property
    def mesh(self) -> Mesh | None:
        """None: everything is on one device."""
        return self.leaves[0].mesh if all(isinstance(leaf, NamedSharding) for leaf in self.leaves) else None

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh's axes over which rows are split."""
        return () if self.mesh is None else sharding.batch_axes(self.mesh)

    @property
    def shards(self) -> int:
        """How many devices share the rows of a batch."""
        return 1 if self.mesh is None else sharding.batch_shards(self.mesh)

    def split_rows(self, *arrays: np.ndarray) -> tuple[Any, ...]:
        """Arrays of rows, all of them on every process, as `compiled` programs take them: split over the devices."""
        mesh = self.mesh
        if mesh is None:
            return arrays
        return tuple(sharding.put_batch(mesh, a[sharding.own_rows(mesh, len(a))], len(a)) for a in arrays)


def placement(params: dict, role: str) -> Placement:
    """Where the parameters of one model lie."""
    leaves, structure = jax.tree.flatten(params[role])
    return Placement(role, structure, tuple(getattr(leaf, "sharding", None) for leaf in leaves))


def compiled(
    fn: Callable[..., Any],
    model: rag.Rag,
    where: Placement,
    split: tuple[Specs, Specs] | None = None,
    *,
    overwritten: bool = False,
    **statics: Any,
) -> Callable[..., Any]:
    """`fn(model, *arrays, **statics)` as a program of (parameters, *arrays); the same one for the same arguments.

    `split`: how arrays and results lie, each device computing for its own rows. None: as the compiler chooses.
    `overwritten`: the results take the place of the first of the arrays, which is no more.
    """
    return _compiled(fn, model, where, split, overwritten, tuple(sorted(statics.items())))


@functools.lru_cache(maxsize=PROGRAMS)
def _compiled(
    fn: Callable[..., Any],
    model: rag.Rag,
    where: Placement,
    split: tuple[Specs, Specs] | None,
    overwritten: bool,
    statics: tuple,
) -> Callable[..., Any]:
    role, mesh = where.role, where.mesh

    def program(params: Any, *arrays: Any) -> Any:
        return fn(model.model(role, model.cast({role: params})), *arrays, **dict(statics))

    if split is None or mesh is None:
        return jax.jit(program, donate_argnums=(1,) if overwritten else ())
    shardings = jax.tree.unflatten(where.structure, where.leaves)
    if where.axes:
        gather = functools.partial(sharding.gather_params, {role: shardings})
        model = dataclasses.replace(model, shard=rag.Shard(where.axes), gather=gather)
    inputs, results = (tuple(NamedSharding(mesh, spec) for spec in specs) for specs in split)
    return jax.jit(sharding.on_each_device(program, mesh, (shardings, *inputs), results))
