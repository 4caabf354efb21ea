"""What a compiled program does, read from its text: XLA's own cost analysis counts the body of a loop once.

The text of CPU, GPU and TPU programs is read alike. A TPU writes products as convolutions, and a collective that runs
beside other work several times, under one channel.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_WINDOW = re.compile(r"window=\{(.*?)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_OWN_KERNEL = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')  # what a Pallas kernel says of itself
_SCORES = re.compile(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([\d", ]+)\]')
_CUBLAS = re.compile(r'"lhs_contracting_dimensions":\s*\[([\d", ]*)\]')
_CHANNEL = re.compile(r"channel_id=(\d+)")
# Who takes part: the first of some lists, so many lists of so many, or the axes of a mesh (since jax 0.12).
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[(.*?)\] \{(.*?)\})")
_AXIS = re.compile(r"'([^']+)'(?:=(\d+))?")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
# Names for what is there already; and the ends of what was counted when it began.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all", "partition-id"}
# What a TPU writes as calls and does nothing for: memory that is set aside, pieces that lie together, a promise.
_FREE_CALL = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast|AssumeGatherIndicesInBound)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices, as often as it runs."""

    kind: str  # of COLLECTIVES
    operand: str  # "bf16[1,4096,256]"; the first of several
    bytes: float  # that a device sends, in a ring
    channel: str = ""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One thing that a device does after the other, `times` over; what it computes and moves each time."""

    name: str
    flops: float
    bytes: float  # to and from the device's main memory
    times: int
    beside: bool = False  # runs while others do: a copy made ahead of time, the ends of an exchange


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    result: str  # its shape
    operation: str
    rest: str  # operands and attributes
    is_root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        """Their names: the text up to the bracket that closes them."""
        depth = 1
        for end, letter in enumerate(self.rest):
            depth += (letter == "(") - (letter == ")")
            if not depth:
                return re.findall(r"%([\w.\-]+)", self.rest[:end])
        return []

    @property
    def called(self) -> list[str]:
        names = _CALLED.findall(self.rest)
        if branches := _BRANCHES.search(self.rest):
            names += [branch.strip().lstrip("%") for branch in branches[1].split(",")]
        return names


class Program:
    """The computations of `compiled.as_text()`, one device's share of the work."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry = ""
        here: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                here = self.computations.setdefault(found[1], {})
                self.entry = found[1] if line.startswith("ENTRY") else self.entry
            elif found := _INSTRUCTION.match(line):
                root, name, result, operation, rest = found.groups()
                here[name] = _Instruction(name, result, operation, rest, bool(root))
        self._flops: dict[str, float] = {}
        self._exchanges: dict[str, dict[tuple[str, str], Collective]] = {}

    def flops(self, name: str = "") -> float:
        """Of all matrix products, loops as often as they run."""
        name = name or self.entry
        if name not in self._flops:
            here = self.computations[name]
            total = 0.0
            for instruction in here.values():
                total += _product_flops(instruction, here)
                for called in instruction.called:
                    if inside := self.flops(called):
                        total += self._turns(instruction, called) * inside
            self._flops[name] = total
        return self._flops[name]

    def exchanges(self, name: str = "") -> dict[tuple[str, str], Collective]:
        """By kind and place, with the bytes of all turns; the fusions that share one have its channel."""
        name = name or self.entry
        if name not in self._exchanges:
            here = self.computations[name]
            found: dict[tuple[str, str], Collective] = {}
            for instruction in here.values():
                if (kind := instruction.operation.removesuffix("-start")) in COLLECTIVES:
                    found[kind, instruction.name] = _collective(kind, instruction, here)
                for called in instruction.called:
                    if not (inside := self.exchanges(called)):
                        continue
                    turns = self._turns(instruction, called)
                    shared = instruction.operation == "fusion"
                    for (kind, place), one in inside.items():
                        key = (kind, f"{one.channel} {one.operand}" if shared else f"{instruction.name}/{place}")
                        found[key] = dataclasses.replace(one, bytes=one.bytes * turns)
            self._exchanges[name] = found
        return self._exchanges[name]

    def operations(self, name: str = "", times: int = 1) -> Iterator[Operation]:
        """What the device does in order, exchanges left out."""
        name = name or self.entry
        here = self.computations[name]
        for instruction in here.values():
            kind = instruction.operation
            if kind in ("while", "call", "conditional"):
                for called in instruction.called:
                    if called in self.computations:
                        yield from self.operations(called, times * self._turns(instruction, called))
            elif not _is_free(instruction) and kind.removesuffix("-start") not in COLLECTIVES:
                flops = _product_flops(instruction, here) + sum(self.flops(called) for called in instruction.called)
                exchanges = any(self.exchanges(called) for called in instruction.called)
                beside = kind.endswith("-start") or (exchanges and not flops)
                yield Operation(instruction.name, flops, self._traffic(instruction, here), times, beside)

    def _turns(self, instruction: _Instruction, called: str) -> int:
        """How often the computation runs. ValueError where the text does not say."""
        if instruction.operation != "while":
            return 1
        if trips := _TRIPS.search(instruction.rest):
            return int(trips[1])
        # The counter starts at 0 and grows by 1 where the text does not say more.
        condition = _CONDITION.search(instruction.rest)
        here = self.computations.get(condition[1], {}) if condition else {}
        for compare in here.values():
            if compare.operation == "compare" and "direction=LT" in compare.rest:
                bound = here.get(compare.operands[-1])
                if (
                    bound
                    and bound.result.startswith("s32[]")
                    and bound.operation == "constant"
                    and (number := re.match(r"\d+", bound.rest))
                ):
                    return int(number[0])
        raise ValueError(f"a loop over {called} does not say how often it runs")

    def _traffic(self, instruction: _Instruction, here: dict[str, _Instruction]) -> float:
        """Bytes read and written in main memory: of an operand that is cut, the cut; of an updated one, the update."""
        if instruction.operation in ("copy-start", "slice-start"):
            ends = [shape[0] for shape in _SHAPE.finditer(instruction.result)][:2]  # from where, to where, or back
            return float(min(_size(end, everywhere=True) for end in ends) * sum(_size(end) > 0 for end in ends))
        inner = self.computations.get(instruction.called[0], {}) if instruction.operation == "fusion" else {}
        users = inner or {instruction.name: instruction}
        names = dict(enumerate(instruction.operands))
        if inner:
            numbers = {p.name: int(p.rest.split(")")[0]) for p in inner.values() if p.operation == "parameter"}
        else:
            numbers = {operand: n for n, operand in names.items()}
        written = [_size(instruction.result) - sum(map(_workspace, users.values()))]
        read = {n: _size(here[operand].result) if operand in here else 0.0 for n, operand in names.items()}
        for parameter, n in numbers.items():
            places = list(_uses(parameter, users))
            if not places or n not in read or not read[n] or any(place for _, place in places):
                continue
            uses = [user for user, _ in places]
            if all(u.operation in ("dynamic-slice", "slice", "gather") for u in uses):
                read[n] = min(read[n], sum(_size(u.result, everywhere=True) for u in uses))
            elif all(u.operation == "dynamic-update-slice" for u in uses):
                within = inner or here
                updates = [within[u.operands[1]].result for u in uses if u.operands[1] in within]
                read[n] = 0.0
                written = [sum(2 * _size(update, everywhere=True) for update in updates)]
        return float(sum(read.values()) + sum(written))


def _is_free(instruction: _Instruction) -> bool:
    kind = instruction.operation
    return (
        kind in _FREE or kind.endswith("-done") or (kind == "custom-call" and bool(_FREE_CALL.search(instruction.rest)))
    )


def _workspace(instruction: _Instruction) -> int:
    """Bytes of scratch memory, the last result of a product by cuBLAS: one with whole sums never touches it."""
    if instruction.operation != "custom-call" or "__cublas$" not in instruction.rest:
        return 0
    _, *others = _SHAPE.findall(instruction.result)
    return _size(f"s8[{others[-1][1]}]") if others and others[-1][0] == "s8" else 0


def _uses(name: str, among: dict[str, _Instruction]) -> Iterator[tuple[_Instruction, int]]:
    """Which instructions read it, and as which of their operands; one that only gives it another shape is none."""
    for user in among.values():
        for place, operand in enumerate(user.operands if user.operation != "parameter" else ()):
            if operand != name:
                continue
            if user.operation == "bitcast" and not user.is_root:
                yield from _uses(user.name, among)
            else:
                yield user, place


def dot_flops(text: str) -> float:
    """FLOPs of all matrix products of `compiled.as_text()` on one device, loops as often as they run.

    ValueError for a loop that holds products and whose number of turns the text does not say.
    """
    return Program(text).flops()


def collectives(text: str) -> list[Collective]:
    """All exchanges of `compiled.as_text()`."""
    return list(Program(text).exchanges().values())


def collective_bytes(found: list[Collective]) -> dict[str, float]:
    """Bytes that each device sends, by kind of exchange."""
    total: dict[str, float] = {}
    for one in found:
        total[one.kind] = total.get(one.kind, 0.0) + one.bytes
    return total


def _product_flops(instruction: _Instruction, here: dict[str, _Instruction]) -> float:
    rest, out = instruction.rest, math.prod(_dims(instruction.result))
    if instruction.operation == "dot":
        dims, contracted = _dims(here[instruction.operands[0]].result), _CONTRACTED.search(rest)
        assert contracted is not None
        return 2.0 * out * math.prod(dims[int(i)] for i in contracted[1].split(",") if i)
    if instruction.operation == "convolution":
        labels = _LABELS.search(rest)
        assert labels is not None
        left, kernel, result = labels.groups()
        shapes = [_dims(here[name].result) for name in instruction.operands[:2]] + [_dims(instruction.result)]
        taps = 1
        for n, window in enumerate(_windows(rest)):
            place = str(n)
            sizes = shapes[0][left.index(place)], shapes[2][result.index(place)]
            taps *= _taps(*sizes, window)
            out //= sizes[1]
        return 2.0 * out * taps * shapes[1][kernel.index("i")]
    if instruction.operation == "custom-call" and "__cublas$" in rest:
        dims, contracted = _dims(here[instruction.operands[0]].result), _CUBLAS.search(rest)
        assert contracted is not None
        return 2.0 * out * math.prod(dims[int(i)] for i in re.findall(r"\d+", contracted[1]))
    if instruction.operation == "custom-call" and "__cudnn$fmha" in rest:
        scores = _SCORES.search(rest)
        assert scores is not None
        channels = _dims(here[instruction.operands[0]].result)[-1]
        # Scores and values; backwards scores again, and the gradients of weights, values, queries and keys.
        return 2.0 * (5 if "Backward" in rest else 2) * math.prod(map(int, re.findall(r"\d+", scores[1]))) * channels
    if instruction.operation == "custom-call" and (own := _OWN_KERNEL.search(rest)):
        return float(own[1])
    return 0.0


class _Window(NamedTuple):
    """One dimension of a convolution's window."""

    size: int
    stride: int = 1
    pad: tuple[int, int] = (0, 0)
    lhs_dilate: int = 1
    rhs_dilate: int = 1


def _windows(rest: str) -> list[_Window]:
    """`window={size=4x8 pad=3_3x0_0 lhs_dilate=4x1}`, one a dimension."""
    found = _WINDOW.search(rest)
    if found is None:
        return []
    said = dict(part.split("=") for part in found[1].split())
    parts = {name: said[name].split("x") for name in _Window._fields if name in said}
    pads = [tuple(map(int, pad.split("_"))) for pad in parts.pop("pad", [])]
    columns = {name: list(map(int, values)) for name, values in parts.items()} | ({"pad": pads} if pads else {})
    return [_Window(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


@functools.lru_cache(maxsize=1024)
def _taps(size_in: int, size_out: int, window: _Window) -> int:
    """How many pairs of a place of the result and one of the window meet an element, not padding or a gap.

    A batch written as a convolution has a window as wide as all of it, of which each place meets one element.
    """
    starts = np.arange(size_out)[:, None] * window.stride - window.pad[0]
    places = starts + np.arange(window.size) * window.rhs_dilate
    return int(
        np.sum((places >= 0) & (places <= (size_in - 1) * window.lhs_dilate) & (places % window.lhs_dilate == 0))
    )


def _collective(kind: str, instruction: _Instruction, here: dict[str, _Instruction]) -> Collective:
    shapes = [here[name].result for name in instruction.operands if name in here]
    n = _group_size(instruction.rest)
    sent = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(kind, (n - 1) / n)
    first = _SHAPE.search(shapes[0]) if shapes else None
    size = sum(_size(shape, everywhere=True) for shape in shapes)
    channel = _CHANNEL.search(instruction.rest)
    operand = f"{first[1]}[{first[2]}]" if first else ""
    return Collective(kind, operand, float(size * sent), channel[1] if channel else "")


def _group_size(rest: str) -> int:
    """Devices that exchange with one another."""
    group = _GROUPS.search(rest)
    if group is None:
        return 1
    first, number, mesh, axes = group.groups()
    if mesh is None:
        return int(number) if number else len(first.split(","))
    sizes = {name: int(size) for name, size in _AXIS.findall(mesh)}
    return math.prod(sizes[name] for name, _ in _AXIS.findall(axes))


def _size(shape: str, *, everywhere: bool = False) -> int:
    """Bytes of a shape or a tuple of them; those that a TPU keeps on the chip itself, S(1), only `everywhere`."""
    return sum(
        BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims, layout in _SHAPE.findall(shape)
        if everywhere or "S(" not in layout
    )


def _dims(shape: str) -> tuple[int, ...]:
    found = _SHAPE.search(shape)  # of a tuple, its first
    return tuple(int(n) for n in found[2].split(",") if n) if found else ()
