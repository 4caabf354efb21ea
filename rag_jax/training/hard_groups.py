"""Hard groups: an order of rows in which the passages of a group are each other's near negatives.

**n** rows, **g** rows of a group, **J** negatives that a row brings, **E** embedding width. Arrays of numpy in and out.
"""

import dataclasses
import functools

import numpy as np

# Rows or groups that are compared at a time.
BLOCK = 1024
# The best candidates that are looked at first: most often one of them will do.
FIRST = 32


@dataclasses.dataclass(frozen=True)
class Near:
    """What grouping needs to know of the rows, in the opinion of the current retriever."""

    query_emb: np.ndarray  # (n, E) float32, normalised
    passage_emb: np.ndarray  # (n, E)
    query_key: np.ndarray  # (n,) equal where the query's text is equal
    passage_key: np.ndarray  # (n,) equal where the passage's text is equal
    neighbours: np.ndarray  # (n, m) other rows of high affinity, the highest first
    margin: float | None

    @functools.cached_property
    def positive(self) -> np.ndarray:
        """Cosine (n,) of each query and its own passage."""
        return np.einsum("ne,ne->n", self.query_emb, self.passage_emb)

    @functools.cached_property
    def sides(self) -> tuple[np.ndarray, np.ndarray]:
        """u, v (n, 2E): `u[i] @ v[j]` is the affinity cos(query i, passage j) + cos(query j, passage i)."""
        return affinity_sides(self.query_emb, self.passage_emb)

    def same(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Whether two rows hold one query or one passage, so that none is a negative of the other (broadcast)."""
        return (self.query_key[rows] == self.query_key[others]) | (self.passage_key[rows] == self.passage_key[others])

    def too_near(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Whether the passage of one answers the query of the other too, by its score (broadcast).

        A passage that scores above a query's own by more than the margin is more likely unlabelled than wrong.
        """
        if self.margin is None:
            return np.zeros(np.broadcast_shapes(rows.shape, others.shape), bool)
        there = np.einsum("...e,...e->...", self.query_emb[rows], self.passage_emb[others])
        back = np.einsum("...e,...e->...", self.query_emb[others], self.passage_emb[rows])
        return (there > self.positive[rows] + self.margin) | (back > self.positive[others] + self.margin)


def affinity_sides(query_emb: np.ndarray, passage_emb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 2E) twice: an inner product of the first's row i and the second's row j scores both pairs of i and j."""
    return np.concatenate([query_emb, passage_emb], axis=1), np.concatenate([passage_emb, query_emb], axis=1)


def plan(
    near: Near, met: np.ndarray, *, group_size: int, batch_size: int, num_steps: int, rng: np.random.Generator
) -> np.ndarray:
    """Rows (num_steps, batch_size) int32 of the coming batches, in groups of near neighbours, in random order.

    `met` (n,): how often each row was met before; those met least come first, so that however often rows are grouped
    anew, all are met equally often. Where an epoch does not end with a group, rows of the next one fill it.
    """
    met, needed = met.copy(), num_steps * batch_size
    done: list[np.ndarray] = []
    begun: list[int] = []
    while sum(map(len, done)) < needed:
        pool = np.flatnonzero(met == met.min())
        groups = regroup(near, pool, begun, group_size, rng)
        met[pool] += 1
        # The group that the last epoch began stays in front, the one that the next will fill comes last.
        begun, first = (groups.pop() if len(groups[-1]) < group_size else []), int(bool(begun))
        rows = np.array(groups, np.int32).reshape(-1, group_size)
        rows[first:] = rng.permutation(rows[first:])
        done.append(rows.reshape(-1))
    return np.concatenate(done)[:needed].reshape(num_steps, batch_size)


def regroup(
    near: Near, rows: np.ndarray, begun: list[int], group_size: int, rng: np.random.Generator
) -> list[list[int]]:
    """The rows in groups, the first one begun with the rows given, only the last one perhaps unfilled.

    Each group starts with a random row and takes what is nearest to all its rows. A passage of which as many rows are
    left as groups goes into each of them: so no group holds a passage twice, unless there are too many rows of it.
    """
    pool = Pool(near.passage_key, rows)
    anchors, most, group, groups = iter(rng.permutation(rows)), int(pool.left.max()), list(begun), []
    while pool.size:
        size = min(group_size, len(group) + pool.size)
        groups_left = -(-(len(group) + pool.size) // group_size)
        # Such a passage must go into each group from here on: left out of one, it would stand in another twice. Counts
        # only fall, so `most` bounds them, and they are looked at only where one of them can be that high.
        if most >= groups_left:
            most = int(pool.left.max())
            for passage in np.flatnonzero(pool.left >= groups_left)[: size - len(group)]:
                if passage not in near.passage_key[group]:
                    pool.take(group, int(np.flatnonzero(pool.free & (near.passage_key == passage))[0]))
        if not group:
            pool.take(group, int(next(row for row in anchors if pool.free[row])))
        while len(group) < size:
            pool.take(group, nearest(near, group, pool.free))
        groups.append(group)
        group = []
    return groups


class Pool:
    """The rows that no group has taken yet."""

    def __init__(self, passage_key: np.ndarray, rows: np.ndarray):
        self.passage_key, self.size = passage_key, len(rows)
        self.free = np.zeros(len(passage_key), bool)  # (n,)
        self.free[rows] = True
        self.left = np.bincount(passage_key[rows], minlength=int(passage_key.max()) + 1)  # rows of each passage

    def take(self, group: list[int], row: int) -> None:
        """Move a row from here to a group."""
        group.append(row)
        self.free[row] = False
        self.left[self.passage_key[row]] -= 1
        self.size -= 1


def nearest(near: Near, group: list[int], free: np.ndarray) -> int:
    """The free row of highest affinity to a group, of those that are negatives of all its rows, if there are any."""
    left, right = near.sides
    members = np.array(group)
    centre = right[members].sum(axis=0)
    # Rows far from everything, and the last ones of an epoch, have no free neighbour: then all are looked at.
    for candidates in (np.unique(near.neighbours[members]), np.arange(len(free))):
        candidates = candidates[free[candidates]]
        candidates = candidates[~near.same(candidates[:, None], members).any(axis=1)]
        order = np.argsort(-(left[candidates] @ centre), kind="stable")
        for start in range(0, len(order), FIRST):
            block = candidates[order[start : start + FIRST]]
            good = np.flatnonzero(~near.too_near(block[:, None], members).any(axis=1))
            if len(good):
                return int(block[good[0]])
    candidates = np.flatnonzero(free)
    twice = np.isin(near.passage_key[candidates], near.passage_key[members])
    return int(candidates[np.argmax(left[candidates] @ centre - np.where(twice, 1e3, 0.0))])


def negatives(
    right: np.ndarray, groups: np.ndarray, passages: np.ndarray, scores: np.ndarray, num: int
) -> tuple[np.ndarray, np.ndarray]:
    """What the rows of groups (_, g) bring besides their own passages: keys (_, g, J) int32, -1: none, and scores.

    Each row in turn brings the nearest passages that its group has not yet, none of them known to be `right` (n, R) for
    a query of the group. `passages`, `scores` (n, m): each row's nearest, those too near left out (-inf); where all m
    are taken, none.
    """
    found = np.full((*groups.shape, num), -1, np.int32)
    found_scores = np.full(found.shape, -np.inf, np.float32)
    for place, group in enumerate(groups):
        held = set(right[group].ravel().tolist())
        for member, row in enumerate(group):
            left = [i for i, p in enumerate(passages[row].tolist()) if p not in held and scores[row, i] > -np.inf][:num]
            found[place, member, : len(left)] = passages[row, left]
            found_scores[place, member, : len(left)] = scores[row, left]
            held.update(passages[row, left].tolist())
    return found, found_scores


def hardness(near: Near, groups: np.ndarray) -> dict[str, float]:
    """Of groups (_, g) of rows: how close a query's negatives come to its passage.

    `similarity`: mean cosine of queries and the group's other passages; `not_first`: share of queries for which one of
    those scores at least as high as their own.
    """
    negatives, lost = [], []
    for start in range(0, len(groups), BLOCK):
        rows = groups[start : start + BLOCK]
        cosine = np.einsum("nie,nje->nij", near.query_emb[rows], near.passage_emb[rows])
        negative = ~near.same(rows[:, :, None], rows[:, None, :])
        negatives.append(cosine[negative])
        lost.append((negative & (cosine >= near.positive[rows][:, :, None])).any(axis=2).ravel())
    found = np.concatenate(negatives)
    return {"similarity": float(found.mean()) if len(found) else 0.0, "not_first": float(np.concatenate(lost).mean())}


def masked_shares(near: Near) -> dict[str, float]:
    """How many of the rows' nearest neighbours are no negatives: by `identity` of a text, or else by the `margin`."""
    rows = np.arange(len(near.neighbours))
    same, above = 0, 0
    for start in range(0, len(rows), BLOCK):
        block, others = rows[start : start + BLOCK, None], near.neighbours[start : start + BLOCK]
        identical = near.same(block, others)
        same += int(identical.sum())
        above += int((near.too_near(block, others) & ~identical).sum())
    pairs = max(near.neighbours.size, 1)
    return {"identity": same / pairs, "margin": above / pairs}
