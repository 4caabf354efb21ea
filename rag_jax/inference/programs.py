"""Programs of one model that run where its parameters lie: on one device, or on every device of their mesh."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rag_jax import rag
from rag_jax.distributed import sharding


@dataclasses.dataclass(frozen=True)
class Places:
    """Where each parameter of a model lies. Equal for parameters that lie alike, so programs can be kept by it."""

    role: str  # "retriever" | "generator"
    structure: Any
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, params: dict, role: str) -> "Places":
        leaves, structure = jax.tree.flatten(params[role])
        return cls(role, structure, tuple(getattr(leaf, "sharding", None) for leaf in leaves))

    @property
    def mesh(self) -> Mesh | None:
        """None: everything is on one device."""
        return self.leaves[0].mesh if all(isinstance(place, NamedSharding) for place in self.leaves) else None

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh's axes over which rows are split."""
        return () if self.mesh is None else sharding.batch_axes(self.mesh)

    @property
    def shards(self) -> int:
        """How many devices share the rows of a batch."""
        return 1 if self.mesh is None else sharding.batch_shards(self.mesh)

    def program(
        self,
        model: rag.Rag,
        fn: Callable[..., tuple],
        inputs: Sequence[PartitionSpec],
        results: Sequence[PartitionSpec],
    ) -> Callable[..., tuple]:
        """`fn(model, *arrays)` compiled as a function of (parameters, *arrays), on each device for its own rows."""
        mesh, role = self.mesh, self.role

        def whole(params: Any, *arrays: Any) -> tuple:
            return fn(model.model(role, {role: params}), *arrays)

        if mesh is None:
            return jax.jit(whole)
        shardings = jax.tree.unflatten(self.structure, self.leaves)
        if self.axes:
            gather = functools.partial(sharding.gather_params, {role: shardings})
            model = dataclasses.replace(model, shard=rag.Shard(self.axes), gather=gather)
        of = functools.partial(NamedSharding, mesh)
        return jax.jit(sharding.on_each_device(whole, mesh, (shardings, *map(of, inputs)), tuple(map(of, results))))

    def put(self, *arrays: np.ndarray) -> tuple[Any, ...]:
        """Arrays of rows, whole on every process, as `program` takes them: split over the devices."""
        mesh = self.mesh
        if mesh is None:
            return arrays
        return tuple(sharding.put_batch(mesh, a[sharding.own_rows(mesh, len(a))], len(a)) for a in arrays)
