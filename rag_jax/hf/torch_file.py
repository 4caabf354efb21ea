"""Tensors of a `pytorch_model.bin`, read without PyTorch and without running anything that the file says.

The file is a zip archive of a pickle and of plain numbers. A pickle is a program for a small stack machine, and here is
one that knows only what weights need: containers, texts, numbers, and two functions of PyTorch's, which only note where
a tensor's numbers are. Whatever else a file asks for is refused.
"""

import dataclasses
import pathlib
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from rag_jax.errors import UserError

PICKLE_BYTES = 64 * 2**20
MOST_AXES = 8
# Of `torch`: safetensors' name of the numbers, and what they are.
STORAGES: dict[str, tuple[str, Any]] = {
    "FloatStorage": ("F32", np.float32),
    "HalfStorage": ("F16", np.float16),
    "BFloat16Storage": ("BF16", ml_dtypes.bfloat16),
    "DoubleStorage": ("F64", np.float64),
    "LongStorage": ("I64", np.int64),
    "IntStorage": ("I32", np.int32),
    "ShortStorage": ("I16", np.int16),
    "CharStorage": ("I8", np.int8),
    "ByteStorage": ("U8", np.uint8),
    "BoolStorage": ("BOOL", np.bool_),
}
# A header of a file in a zip archive: its length, and where it says how long the two texts after it are.
HEADER_BYTES, TEXT_LENGTHS = 30, slice(26, 30)


class Refused(ValueError):
    """What is not weights alone."""


@dataclasses.dataclass(frozen=True)
class _Name:
    """A function or type that the pickle names. It is never looked up."""

    text: str  # "module name"


@dataclasses.dataclass(frozen=True)
class _Storage:
    kind: str  # a key of STORAGES
    key: str  # its file's name in the archive
    size: int  # numbers


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # numbers


class TorchFile:
    """As `safetensors.safe_open(path, "np")`."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        if not zipfile.is_zipfile(path):
            raise Refused("not an archive as PyTorch writes it since 1.6; save it again as safetensors")
        with zipfile.ZipFile(path) as archive:
            self.files = {info.filename: info for info in archive.infolist()}
            root = next((name.removesuffix("data.pkl") for name in self.files if name.endswith("/data.pkl")), None)
            if root is None or self.files[f"{root}data.pkl"].file_size > PICKLE_BYTES:
                raise Refused("an archive without a data.pkl of a likely size")
            if f"{root}byteorder" in self.files and archive.read(f"{root}byteorder") != b"little":
                raise Refused("of big-endian numbers")
            content = unpickled(archive.read(f"{root}data.pkl"))
        self.root = root
        if not isinstance(content, dict) or not all(isinstance(value, _Tensor) for value in content.values()):
            raise Refused("something else than names and tensors")
        self.tensors: dict[str, _Tensor] = content
        for tensor in content.values():
            self.array(tensor)  # refuses what is not there

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def keys(self) -> Iterator[str]:
        return iter(self.tensors)

    def get_slice(self, name: str) -> "Slice":
        return Slice(self, self.tensors[name])

    def get_tensor(self, name: str) -> np.ndarray:
        return np.array(self.array(self.tensors[name]))

    def array(self, tensor: _Tensor) -> np.ndarray:
        """The tensor as it lies in the file, not read yet."""
        dtype = np.dtype(STORAGES[tensor.storage.kind][1])
        info = self.files.get(f"{self.root}data/{tensor.storage.key}")
        if info is None or (info.compress_type, info.compress_size) != (zipfile.ZIP_STORED, info.file_size):
            raise Refused(f"without the plain numbers {tensor.storage.key}")
        last = tensor.first + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
        size = min(tensor.storage.size, info.file_size // dtype.itemsize)
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, dtype)
        if last >= size:
            raise Refused("a tensor that reaches beyond its numbers")
        numbers = np.memmap(self.path, dtype, "r", self._begin(info), (size,))
        steps = tuple(step * dtype.itemsize for step in tensor.strides)
        return np.lib.stride_tricks.as_strided(numbers[tensor.first :], tensor.shape, steps, writeable=False)

    def _begin(self, info: zipfile.ZipInfo) -> int:
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            header = file.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES:
            raise Refused("an archive that is cut off")
        begin = info.header_offset + HEADER_BYTES + sum(struct.unpack("<HH", header[TEXT_LENGTHS]))
        if begin + info.file_size > self.path.stat().st_size:
            raise Refused("an archive that is cut off")
        return begin


@dataclasses.dataclass(frozen=True)
class Slice:
    """As safetensors' slices."""

    file: TorchFile
    tensor: _Tensor

    def get_dtype(self) -> str:
        return STORAGES[self.tensor.storage.kind][0]

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, where: Any) -> np.ndarray:
        return np.array(self.file.array(self.tensor)[where])


def unpickled(content: bytes) -> Any:
    """What a pickle of weights holds. Refused names the first thing that weights do not need."""
    machine = _Machine()
    try:
        for operation, argument, _ in pickletools.genops(content):
            if operation.name == "STOP":
                return machine.stack.pop()
            known = OPERATIONS.get(operation.name)
            if known is None:
                raise Refused(f"the pickle operation {operation.name}")
            known(machine, argument)
    except Refused:
        raise
    except Exception as error:  # of many kinds: whatever a stack, a list or a number is not
        raise Refused(f"a damaged pickle ({type(error).__name__})") from None
    raise Refused("a pickle without an end")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> list[Any]:
        if count > len(self.stack) - (self.marks[-1] if self.marks else 0):
            raise IndexError
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        return self.pop(len(self.stack) - mark)

    def store(self, place: int | None) -> None:
        self.memo[len(self.memo) if place is None else place] = self.stack[-1]

    def add(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError
        self.stack[-1].extend(items)

    def set(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or not all(isinstance(key, str) for key in items[::2]):
            raise TypeError
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def name(self, module: Any, name: Any) -> None:
        self.push(_Name(f"{module} {name}"))

    def call(self) -> None:
        function, arguments = self.pop(2)
        known = FUNCTIONS.get(function.text) if isinstance(function, _Name) else None
        if known is None or not isinstance(arguments, tuple):
            raise Refused(f"a call of {getattr(function, 'text', type(function).__name__)[:80]!r}")
        self.push(known(*arguments))

    def build(self) -> None:
        """Attributes of a dict (a state dict's `_metadata`) say nothing of its tensors."""
        self.pop(1)
        if not isinstance(self.stack[-1], dict):
            raise Refused("an object with a state")

    def storage(self) -> None:
        ((word, kind, key, _, size),) = self.pop(1)
        name = kind.text.removeprefix("torch ")
        if word != "storage" or not isinstance(key, str) or not isinstance(size, int):
            raise TypeError
        if name not in STORAGES:
            raise Refused(f"numbers of kind {name[:80]!r}")
        self.push(_Storage(name, key, size))


def _tensor(storage: Any, first: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    numbers = (first, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides) or len(shape) > MOST_AXES:
        raise TypeError
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError
    return _Tensor(storage, first, tuple(shape), tuple(strides))


def _dict(*items: Any) -> dict[str, Any]:
    if items not in ((), ([],)):
        raise TypeError
    return {}


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _dict,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
}

_VALUES = (
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
)  # fmt: skip
OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    **dict.fromkeys(_VALUES, lambda machine, value: machine.push(value)),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop(3))),
    "APPEND": lambda machine, _: machine.add(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.add(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set(machine.since_mark()),
    "BINPUT": lambda machine, place: machine.store(place),
    "LONG_BINPUT": lambda machine, place: machine.store(place),
    "MEMOIZE": lambda machine, _: machine.store(None),
    "BINGET": lambda machine, place: machine.push(machine.memo[place]),
    "LONG_BINGET": lambda machine, place: machine.push(machine.memo[place]),
    "GLOBAL": lambda machine, text: machine.name(*text.split(" ")),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.pop(2)),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.storage(),
}


def opened(path: pathlib.Path) -> TorchFile:
    """UserError for a file that is damaged or holds more than weights."""
    try:
        return TorchFile(path)
    except (Refused, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is refused, for it holds {str(error)[:160]}; nothing in it was run. Give the model as safetensors "
            "(`save_pretrained` of transformers writes it)"
        ) from None
