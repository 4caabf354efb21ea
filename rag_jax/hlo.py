"""What a compiled program does, read from its text: XLA's own cost analysis counts the body of a loop once."""

import dataclasses
import math
import re

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"^\w+\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


@dataclasses.dataclass
class _Computation:
    flops: float = 0.0  # of its own products
    calls: list[tuple[str, int]] = dataclasses.field(default_factory=list)  # (computation, how often)


def dot_flops(text: str) -> float:
    """FLOPs of all matrix products of `compiled.as_text()` on one device, loops as often as they run.

    ValueError for a loop that holds products and whose number of turns the text does not say.
    """
    computations, entry = _parse(text)
    known: dict[str, float] = {}

    def total(name: str) -> float:
        if name not in known:
            here = computations[name]
            known[name] = here.flops
            for called, times in here.calls:
                inside = total(called)
                if times < 0 and inside:
                    raise ValueError(f"a loop over {called} does not say how often it runs")
                known[name] += max(times, 0) * inside
        return known[name]

    return total(entry)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, here, shapes = "", _Computation(), {}
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            here, shapes = computations.setdefault(found[1], _Computation()), {}
            entry = found[1] if line.startswith("ENTRY") else entry
        elif found := _INSTRUCTION.match(line):
            name, result, operation, rest = found.groups()
            shapes[name] = _dims(result)
            if operation == "dot":
                left = shapes[rest.split("%", 1)[1].split(",", 1)[0].split(")", 1)[0]]
                contracted = _numbers(_CONTRACTED, rest)
                here.flops += 2.0 * math.prod(shapes[name]) * math.prod(left[i] for i in contracted)
            times = 1
            if operation == "while":
                trips = _TRIPS.search(rest)
                times = int(trips[1]) if trips else -1
            names = _CALLED.findall(rest)
            if branches := _BRANCHES.search(rest):
                names += [branch.strip().lstrip("%") for branch in branches[1].split(",")]
            here.calls += [(called, times) for called in names]
    return computations, entry


def _dims(shape: str) -> tuple[int, ...]:
    found = _SHAPE.match(shape)
    return tuple(int(n) for n in found[1].split(",") if n) if found else ()


def _numbers(pattern: re.Pattern[str], text: str) -> tuple[int, ...]:
    found = pattern.search(text)
    return tuple(int(n) for n in found[1].split(",") if n) if found else ()
