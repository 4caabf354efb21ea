"""What an entry of the table of families says, and the parts that entries are made of."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from rag_jax.models import ModelConfig

# Heads that stand beside a causal model, which has its own or is tied.
HEADS = r"(lm_head|score)\.weight"


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of theirs and ours. `{i}` counts layers, which ours stack on a leading axis.

    Several of ours lie side by side along their last axis. `transpose`: PyTorch's linear layers are (out, in). `first`:
    the layer that has it first; of those before it ours hold numbers that nothing reads.
    """

    hf: str
    ours: str | tuple[str, ...]
    transpose: bool = False
    first: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def stacked(self) -> bool:
        return "{i}" in self.hf


@dataclasses.dataclass(frozen=True)
class Family:
    """One of Hugging Face's model types: its keys in one of our configs, and its tensors in our trees."""

    config: type[ModelConfig]
    architecture: str  # the class that reads what export writes
    fields: Mapping[str, str | tuple[str, ...]]  # their key -> our field or fields of the same value
    rules: tuple[Rule, ...]
    prefix: str  # which tensor names have or lack, depending on whether the head was saved with the model
    # Patterns of tensors that no rule names and that may stand in a file. Carried: part of the model, but not of our
    # forward pass, so export writes them as they came. Dropped: heads that a loaded model makes anew or does not have.
    carried: str = ""
    dropped: str = ""
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # our field -> its value for this type
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # their key -> the one value that we compute
    # Our field -> its value where theirs is null, from the other fields.
    absent: Mapping[str, Callable[[Mapping[str, Any]], Any]] = dataclasses.field(default_factory=dict)
    causal_key: tuple[str, bool] = ("is_causal", True)  # what their config says of a causal model, if it may be none
    # What takes several keys: our fields from their config, what is wrong appended to the problems; and back.
    read: Callable[[Mapping[str, Any], list[str]], dict[str, Any]] = lambda theirs, problems: {}
    write: Callable[[Any], dict[str, Any]] = lambda config: {}

    @property
    def pooling(self) -> str:
        """How to make an embedding where a model's folder does not say."""
        return "last" if self.config.causal else "mean"

    @property
    def prefixed(self) -> bool:
        """Whether `rules` name tensors with the prefix."""
        return self.rules[0].hf.startswith(self.prefix)


def is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def linear(hf: str, *ours: str) -> tuple[Rule, Rule]:
    kernels, biases = (tuple(f"{name}/{leaf}" for name in ours) for leaf in ("kernel", "bias"))
    return Rule(f"{hf}.weight", kernels, transpose=True), Rule(f"{hf}.bias", biases)


def conv1d(hf: str, *ours: str) -> tuple[Rule, Rule]:
    """GPT-2's linear layers are (in, out)."""
    return tuple(dataclasses.replace(rule, transpose=False) for rule in linear(hf, *ours))  # type: ignore[return-value]


def norm(hf: str, ours: str, first: int = 0) -> tuple[Rule, Rule]:
    return Rule(f"{hf}.weight", f"{ours}/scale", first=first), Rule(f"{hf}.bias", f"{ours}/bias", first=first)
