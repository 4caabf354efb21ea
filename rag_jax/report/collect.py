"""What the page of a run shows, from the files that the run left: as plain JSON, cut to what a page can hold."""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from rag_jax import untrusted
from rag_jax.errors import UserError

# Bytes of the page's data, and how many characters a text keeps: the longest of these with which all rows fit.
MOST_BYTES = 4_000_000
EXCERPTS = (240, 160, 100, 60)
# Passages of a row that are shown.
SHOWN = 5
# Points of a curve; of more, means of neighbours.
MOST_POINTS = 600
# Metrics of the table, those that a run has, in this order.
METRICS = (
    "recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10", "answer_hit@1", "answer_hit@10", "document_hit@1",
    "answer_nll", "answer_nll_gold", "answer_nll_none", "em", "f1",
)  # fmt: skip
# Of these less is better.
FALLING = ("answer_nll", "answer_nll_gold", "answer_nll_top1", "answer_nll_none", "retrieval_utility")


Points = list[list[int | float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's files, read."""

    name: str
    config: dict[str, Any]  # flat
    lines: list[dict[str, Any]]  # of metrics.jsonl
    evaluations: list[dict[str, Any]]  # by step
    folder: pathlib.Path
    rows: dict[str, Any] = dataclasses.field(default_factory=dict)  # of rows.json
    changed: dict[str, Any] = dataclasses.field(default_factory=dict)  # of changed.json

    @property
    def first(self) -> dict[str, Any] | None:
        return self.evaluations[0] if self.evaluations else None

    @property
    def last(self) -> dict[str, Any] | None:
        return self.evaluations[-1] if self.evaluations else None


def read(workdir: pathlib.Path) -> Run:
    """A run's files; UserError for a folder that is none, or for files that cannot be read."""
    if not (workdir / "config.json").is_file():
        raise UserError(f"--workdir={workdir}: holds no config.json of a run; give the folder of one")
    config = flat(untrusted.read_json(workdir / "config.json", str(workdir / "config.json")))
    lines = []
    if (workdir / "metrics.jsonl").is_file():
        text = (workdir / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
        lines = [line for line in map(_parsed, text.splitlines()) if line is not None]
    records = []
    for path in (workdir / "eval").glob("step_*.json"):
        if re.fullmatch(r"step_\d+\.json", path.name):
            records.append(untrusted.read_json(path, str(path)))
    records = [record for record in records if isinstance(record, dict) and isinstance(record.get("step"), int)]
    evaluations = sorted(records, key=lambda record: record["step"])
    facts = (_facts(workdir / name) for name in ("rows.json", "changed.json"))
    return Run(workdir.resolve().name, config, lines, evaluations, workdir, *facts)


def _facts(path: pathlib.Path) -> dict[str, Any]:
    found = untrusted.read_json(path, str(path)) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of metrics; None for one that is not whole, as the last of a run that is writing may be."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """`{"data.train": ...}` of nested sections."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{name}.")
        else:
            found[f"{above}{name}"] = value
    return found


def page(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the page shows of the first run and of those beside it."""
    run = runs[0]
    sides = evaluated(run)
    return {
        "title": run.name,
        "falling": FALLING,
        "runs": [summary(each) for each in runs],
        "differences": differences(runs),
        "config": run.config,
        "changed": run.changed,
        "curves": curves(run.lines),
        "time": times(run.lines),
        "warnings": warnings(run),
        "read": {key: run.rows[key].get("summary") for key in ("data.train", "data.eval") if key in run.rows},
        "definitions": (run.last or {}).get("definitions", {}),
        "calibration": calibration(run, sides),
        "plane": plane(sides),
        "kept_neighbours": kept_neighbours(sides),
        **rows_of(sides),
    }


def summary(run: Run) -> dict[str, Any]:
    """A run's name, what it trained, and its evaluations."""
    steps = [line["step"] for line in run.lines if "loss/total" in line]
    kept = [
        {
            "step": record["step"],
            "counts": record.get("counts", {}),
            "metrics": {
                name.removeprefix("eval/"): value
                for name, value in record.items()
                if name.startswith("eval/") and _is_number(value)
            },
            "intervals": {name.removeprefix("eval/"): value for name, value in (record.get("intervals") or {}).items()},
        }
        for record in run.evaluations
    ]
    names = (
        "retriever.path",
        "generator.path",
        "objective.name",
        "data.train",
        "data.eval",
        "batch_size",
        "total_steps",
    )
    return {
        "name": run.name,
        "steps": max(steps, default=0),
        "facts": {name: run.config.get(name) for name in names},
        "evaluations": kept,
    }


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The keys in which runs differ, and their values."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    values = {key: [run.config.get(key) for run in runs] for key in keys}
    return {key: of for key, of in values.items() if any(value != of[0] for value in of)}


def curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, Points]:
    """`{name: [[step, value], ...]}` of every number of the metrics that changes over a run."""
    found: dict[str, Points] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and not name.startswith("eval/") and _is_number(value):
                found.setdefault(name, []).append([line["step"], value])
    return {name: thinned(points) for name, points in found.items()}


def thinned(points: Points) -> Points:
    """No more than MOST_POINTS: means of neighbours."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return [[step, _short(value)] for step, value in points]
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [[part[-1][0], _short(sum(value for _, value in part) / len(part))] for part in parts]


def times(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by what they were spent on; those of waiting for data are part of the steps'."""
    names = {
        "steps": "time/step_s",
        "compiling": "time/compile_s",
        "evaluation": "time/eval_s",
        "checkpoints": "time/checkpoint_s",
        "mining": "time/mining_s",
    }
    totals = dict.fromkeys(names, 0.0)
    last = 0
    for line in lines:
        for what, name in names.items():
            value = line.get(name)
            if _is_number(value):
                totals[what] += value * (line["step"] - last if what == "steps" else 1)
        if _is_number(line.get("time/step_s")):
            last = line["step"]
    return {what: round(seconds, 3) for what, seconds in totals.items() if seconds > 0}


def warnings(run: Run) -> list[str]:
    """What someone should look at, in sentences."""
    found = []
    spikes = [line for line in run.lines if _is_number(line.get("loss/spike"))]
    if spikes:
        worst = max(spikes, key=lambda line: line["loss/spike"])
        found.append(
            f"Steps whose loss rose far above its usual value: {len(spikes)}, most at step {worst['step']} "
            f"({worst['loss/spike']:.1f} times the median of the steps before)."
        )
    broken = [line["step"] for line in run.lines if "loss/total" in line and line["loss/total"] is None]
    if broken:
        found.append(f"Steps whose loss was not finite: {len(broken)}, first step {broken[0]}.")
    for key, what in (("data.train", "Rows"), ("data.eval", "Held-out rows")):
        dropped = run.rows.get(key, {}).get("dropped") or {}
        if number := sum(dropped.values()):
            why = ", ".join(f"{count:,} with {reason}" for reason, count in dropped.items() if count)
            found.append(f"{what} that were dropped: {number:,} of {run.rows[key].get('read', 0):,} ({why}).")
    train, held_out = (run.config.get(f"data.{name}") for name in ("train", "eval"))
    if train is not None and train == held_out:
        found.append("The rows that are evaluated are those that were trained on: what is measured is memory.")
    for what in ("queries", "passages"):
        shared = run.rows.get(f"shared {what}", {})
        if number := shared.get("same", 0) + shared.get("alike", 0):
            found.append(
                f"Held-out {what} that training rows have too, or have but for case and punctuation: {number:,} of "
                f"{shared['of']:,}. What is measured on them is partly memory."
            )
    if not run.evaluations:
        found.append("The run was never evaluated: set data.eval and eval.every_steps, or run rag_jax.evaluate.")
    elif len(run.evaluations) == 1:
        found.append("There is one evaluation alone, so nothing says what training has changed.")
    last = run.last or {}
    queries = (last.get("counts") or {}).get("queries")
    if isinstance(queries, int) and queries < 100:
        found.append(f"Metrics are over {queries} queries: small differences between them are chance.")
    return found


def evaluated(run: Run) -> list[list[dict[str, Any]]]:
    """The rows of the first evaluation and of the last, of those that have some: two lists, one or none."""
    return [rows for record in run.evaluations[:1] + run.evaluations[1:][-1:] if (rows := _rows_beside(run, record))]


def paired(sides: Sequence[Sequence[dict]]) -> list[tuple[dict, dict]]:
    """Each row after training, and what it was before; {} where it was not evaluated then."""
    by_row = {line.get("row"): line for line in sides[0]} if sides else {}
    return [(by_row.get(line.get("row"), {}), line) for line in sides[-1]] if sides else []


def rows_of(sides: Sequence[Sequence[dict]]) -> dict[str, Any]:
    """Rows before and after, their passages in a table of their own, as long as the page can hold them."""
    pairs = paired(sides)
    content: dict[str, Any] = {}
    for excerpt in EXCERPTS:
        content = _shortened(pairs, excerpt)
        if _size(content) <= MOST_BYTES:
            break
    left_out = 0
    while _size(content) > MOST_BYTES:  # those that changed least are left out
        keep = sorted(pairs, key=_change, reverse=True)[: len(pairs) * 3 // 4]
        left_out += len(pairs) - len(keep)
        pairs = keep
        content = _shortened(pairs, EXCERPTS[-1])
    return content | {"left_out": left_out}


def _rows_beside(run: Run, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    path = run.folder / "eval" / f"step_{record['step']}.rows.jsonl"
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows


def _shortened(pairs: Sequence[tuple[dict, dict]], excerpt: int) -> dict[str, Any]:
    """The rows with texts of so many characters, and the distinct passages that they name by number."""
    numbers: dict[str, int] = {}

    def passage(text: Any) -> int:
        return numbers.setdefault(_cut(text, excerpt), len(numbers))

    def side(line: Mapping[str, Any]) -> dict[str, Any]:
        found = line.get("retrieved") or []
        kept: dict[str, Any] = {
            "found": [
                [
                    passage(one.get("passage")),
                    _short(one.get("score", 0.0)),
                    int(bool(one.get("relevant"))),
                    *([_short(one["evidence"])] if _is_number(one.get("evidence")) else []),
                ]
                for one in found[:SHOWN]
            ],
            "rank": next((i for i, one in enumerate(found, start=1) if one.get("relevant")), 0),
        }
        for name in ("answer_nll", "em", "f1", "mrr@10"):
            if _is_number(line.get(name)):
                kept[name] = _short(line[name])
        if "generated" in line:
            kept["answer"] = _cut(line["generated"], excerpt)
        return kept

    rows = []
    for before, after in pairs:
        row: dict[str, Any] = {"row": after.get("row"), "query": _cut(after.get("query"), excerpt)}
        if "answer" in after:
            row["answer"] = _cut(after["answer"], excerpt)
        if "gold" in after:
            row["gold"] = passage(after["gold"])
        rows.append(row | {"before": side(before), "after": side(after)})
    return {"rows": rows, "passages": list(numbers)}


def _change(pair: tuple[dict, dict]) -> float:
    """How much a row's retrieval and its answer's likelihood have changed."""
    before, after = pair
    names = {"mrr@10": 1.0, "answer_nll": 0.1}
    return sum(
        weight * abs(after[name] - before[name])
        for name, weight in names.items()
        if _is_number(after.get(name)) and _is_number(before.get(name))
    )


def kept_neighbours(sides: Sequence[Sequence[dict]]) -> dict[str, Any] | None:
    """Of the nearest passages of a query before training, the share that is among them after it."""
    if len(sides) < 2:
        return None
    shares = []
    for before, after in paired(sides):
        near, now = ({one.get("passage") for one in line.get("retrieved") or []} for line in (before, after))
        if near:
            shares.append(len(near & now) / len(near))
    histogram = [0] * 11
    for share in shares:
        histogram[round(10 * share)] += 1
    return {"mean": sum(shares) / len(shares) if shares else None, "histogram": histogram}


def calibration(run: Run, sides: Sequence[Sequence[dict]]) -> dict[str, Points]:
    """How often the passage that is weighed most is right, by how much it is weighed: p(k | query) of the first K.

    `{"before": [[mean weight, share that is right, rows], ...], "after": ...}`, in ten bins; by its step where there is
    one evaluation alone.
    """
    temperature, count = run.config.get("objective.marginal_temperature"), run.config.get("objective.candidates")
    if not _is_number(temperature) or temperature <= 0 or not isinstance(count, int) or count < 2:
        return {}
    found = {}
    names = ("before", "after") if len(sides) > 1 else [f"step {record['step']}" for record in run.evaluations[-1:]]
    for name, rows in zip(names, sides, strict=False):
        bins: Points = [[0.0, 0.0, 0] for _ in range(10)]
        for line in rows:
            scored = [one for one in (line.get("retrieved") or [])[:count] if _is_number(one.get("score"))]
            if len(scored) < 2 or "gold" not in line:
                continue
            best = max(one["score"] for one in scored)
            weights = [math.exp((one["score"] - best) / temperature) for one in scored]
            weight = max(weights) / sum(weights)
            own = bins[min(int(10 * weight), 9)]
            own[0] += weight
            own[1] += bool(scored[weights.index(max(weights))].get("relevant"))
            own[2] += 1
        found[name] = [[_short(a / n), _short(b / n), n] for a, b, n in bins if n]
    return found


def plane(sides: Sequence[Sequence[dict]]) -> dict[str, Any]:
    """`{"before": [[x, y of a query, x, y of its passage], ...], "after": ..., "row": [...]}`, of rows that both have.

    Each evaluation has axes of its own: those of the first are turned, and mirrored if that fits better, onto the
    second's (orthogonal Procrustes in two dimensions), so that what moves has moved.
    """
    if len(sides) < 2:
        return {}
    (before, after), own = sides, {}
    by_row = {line.get("row"): line["plane"] for line in before if _is_plane(line.get("plane"))}
    for line in after:
        if line.get("row") in by_row and _is_plane(line.get("plane")):
            own[line["row"]] = (by_row[line["row"]], line["plane"])
    if len(own) < 2:
        return {}
    pairs = [(a[i : i + 2], b[i : i + 2]) for a, b in own.values() for i in (0, 2)]

    def turned(mirror: float) -> tuple[float, float]:
        """How well the first fit the second when turned by the best angle, and the angle."""
        dot = sum(a[0] * b[0] + mirror * a[1] * b[1] for a, b in pairs)
        cross = sum(a[0] * b[1] - mirror * a[1] * b[0] for a, b in pairs)
        return math.hypot(dot, cross), math.atan2(cross, dot)

    mirror = max((1.0, -1.0), key=lambda sign: turned(sign)[0])
    cos, sin = (fn(turned(mirror)[1]) for fn in (math.cos, math.sin))

    def fitted(point: Sequence[Any]) -> list[float]:
        x, y = point[0], mirror * point[1]
        return [_short(cos * x - sin * y), _short(sin * x + cos * y)]

    return {
        "row": list(own),
        "before": [[*fitted(a[:2]), *fitted(a[2:])] for a, _ in own.values()],
        "after": [[_short(value) for value in b] for _, b in own.values()],
    }


def _is_plane(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _cut(text: Any, most: int) -> str:
    """A text of at most so many characters, without those that no page can hold."""
    text = "" if text is None else str(text)
    text = text if len(text) <= most else text[: most - 1] + "…"
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")


def _size(content: Any) -> int:
    return len(json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"))


def _short(value: Any) -> float:
    return float(f"{value:.5g}") if _is_number(value) else 0.0


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
