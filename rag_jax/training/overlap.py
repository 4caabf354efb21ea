"""What held-out rows have in common with training rows: what is measured on those is partly memory."""

import dataclasses
from collections.abc import Collection, Sequence

from rag_jax import data
from rag_jax.evaluation import metrics


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Of so many texts of held-out rows those that training rows have: as they are, and but for case and the like."""

    of: int
    same: int
    alike: int
    others: tuple[str, ...]  # the rest

    @classmethod
    def between(cls, ours: Collection[str], held_out: Sequence[str], most: int | None) -> "Overlap":
        """With more than `most` training texts only equal ones are counted."""
        distinct = set(ours)
        same = sum(text in distinct for text in held_out)
        if most is not None and len(distinct) > most:
            return cls(len(held_out), same, 0, tuple(text for text in held_out if text not in distinct))
        alike = set(map(metrics.normalise, distinct))
        others = tuple(text for text in held_out if metrics.normalise(text) not in alike)
        return cls(len(held_out), same, len(held_out) - same - len(others), others)


def queries(training: data.Examples, held_out: data.Examples, most: int | None = None) -> Overlap:
    """Of each held-out row's query."""
    return Overlap.between(training.queries, [held_out.queries[key] for key in held_out.query_key.tolist()], most)


def passages(training: data.Examples, held_out: data.Examples, most: int | None = None) -> Overlap:
    """Of the distinct passages that held-out rows name, beside those that training rows name."""
    return Overlap.between(own_passages(training), sorted(own_passages(held_out)), most)


def own_passages(examples: data.Examples) -> set[str]:
    return {examples.passages[key] for key in examples.own_key.ravel().tolist() if key >= 0}
