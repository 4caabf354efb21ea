"""What a run writes down: every step's metrics once its values are there, and where the time went."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from rag_jax import data, models
from rag_jax.config import Config
from rag_jax.evaluation.metrics import METRICS
from rag_jax.models import flops
from rag_jax.objectives import OBJECTIVES
from rag_jax.progress import Progress, clock
from rag_jax.training import watch
from rag_jax.training.peak import peak
from rag_jax.training.step import Metrics
from rag_jax.training.writer import Writer

# What a run stops its steps for.
PAUSES = ("compile", "eval", "checkpoint", "mining")
# Of the candidates that mining finds, from which share on it is told that a group has no slot for them.
MANY_WITHOUT_SLOT = 0.2


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a batch besides its arrays."""

    lengths: data.Lengths
    padding_share: float  # of the tokens that both models read
    wait_s: float  # until it was there, on the mesh


class Record:
    """Times the steps, watches their numbers and writes them; `used` are the models that a step runs, by role."""

    def __init__(
        self,
        config: Config,
        used: dict[str, models.ModelConfig],
        writer: Writer,
        progress: Progress,
        nonfinite: watch.NonFinite,
        generator_learns: bool = True,
    ):
        self.nonfinite = nonfinite
        self.spikes = watch.Spikes(config.guard.spike_factor, writer.written("loss/total"))
        self.config, self.used, self.writer, self.progress = config, used, writer, progress
        self.reading = (evidence_read(config), generator_learns)
        self.peak = peak()
        self.steps, self.flops, self.padding = 0, 0.0, 0.0  # sums over this process's steps
        self.seconds: dict[str, float] = dict.fromkeys(("step", "data_wait", *PAUSES), 0.0)
        self.unwritten: dict[str, float] = dict.fromkeys(PAUSES, 0.0)  # since the last line of metrics
        self.done_at = time.perf_counter()

    @contextlib.contextmanager
    def pausing(self, name: str) -> Iterator[None]:
        """Around what a run stops its steps for: its time is no step's."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.done_at += seconds
        self.progress.pause(seconds)
        self.seconds[name] += seconds
        self.unwritten[name] += seconds

    def train(self, step: int, values: Metrics, facts: Facts) -> None:
        """Waits for the metrics of a step and writes them; UserError for non-finite ones."""
        numbers = {name: float(value) for name, value in jax.device_get(values).items()}
        now = time.perf_counter()
        step_s, self.done_at = now - self.done_at, now
        loss, config = numbers["loss/total"], self.config
        if note := self.nonfinite.check(step, numbers):
            self.progress.print(note)
        objective = config.objective
        model_flops = flops.training_step(
            self.used, config.batch_size, objective.candidates, facts.lengths, objective.negatives, *self.reading
        )
        self.steps += 1
        self.flops += model_flops
        self.padding += facts.padding_share
        self.seconds["step"] += step_s
        self.seconds["data_wait"] += facts.wait_s
        self.progress.update(step, loss)
        if (ratio := self.spikes.ratio(loss)) is not None:
            numbers["loss/spike"] = ratio
            self.progress.print(f"step {step}: loss {loss:.4f} is {ratio:.3g} times the median of the last ones")
        if due(step, config.log.every_steps) or step == config.total_steps or ratio is not None:
            self.spikes.add(loss)
            numbers |= {
                "time/step_s": step_s,
                "time/data_wait_s": facts.wait_s,
                "throughput/queries_per_s": config.batch_size / step_s,
                "throughput/mfu": model_flops / step_s / self.peak.flops,
                "throughput/padding_share": facts.padding_share,
            }
            numbers |= {f"time/{name}_s": seconds for name, seconds in self.unwritten.items()}
            self.unwritten = dict.fromkeys(PAUSES, 0.0)
            self.writer.write(step, numbers)

    def evaluation(self, step: int, values: dict[str, float], by_row: Sequence[Mapping[str, Any]] = ()) -> None:
        self.writer.write(step, values)
        self.writer.write_rows(step, by_row)
        shown = "  ".join(
            f"{name} {values[f'eval/{name}']:.3f}"
            for name, metric in METRICS.items()
            if metric.shown and f"eval/{name}" in values
        )
        self.progress.print(f"step {step}: {shown}")

    def mining(self, step: int, values: dict[str, float]) -> None:
        """Metrics of the groups that were mined after this step, and what all minings cost so far."""
        share = self.seconds["mining"] / (self.seconds["mining"] + self.seconds["step"])
        self.writer.write(step, values | {"time/mining_share": share})
        shown = "  ".join(f"{name.removeprefix('mining/')} {value:.3f}" for name, value in values.items())
        self.progress.print(f"step {step}: mined  {shown}")
        if (share := values.get("mining/candidates_without_slot", 0.0)) > MANY_WITHOUT_SLOT:
            self.progress.print(
                f"step {step}: {share:.0%} of the candidates find no slot in their group and are left out: "
                f"raise objective.negatives={self.config.objective.negatives}"
            )

    def summary(self) -> str:
        """Where this process's time went, and how fast its steps were."""
        steps_s = self.seconds["step"]
        pauses = {"compile": "compilation", "eval": "evaluation", "checkpoint": "checkpoints"}
        spent = [f"{text} {clock(self.seconds[name])}" for name, text in pauses.items()]
        if mining_s := self.seconds["mining"]:
            spent.append(f"mining {clock(mining_s)} ({mining_s / (mining_s + steps_s):.1%} of training)")
        spent.insert(0, f"steps {clock(steps_s)} ({self.seconds['data_wait'] / steps_s:.1%} waiting for data)")
        queries_per_s = self.steps * self.config.batch_size / steps_s
        return (
            f"time       {', '.join(spent)}\n"
            f"speed      {steps_s / self.steps:.3g} s a step, {queries_per_s:.3g} queries/s, "
            f"MFU {self.flops / steps_s / self.peak.flops:.0%} of {self.peak}, "
            f"{self.padding / self.steps:.0%} of the tokens padding"
        )


def evidence_read(config: Config) -> str | None:
    """What of a candidate a listwise objective reads; None: the objective is none."""
    return config.objective.evidence if OBJECTIVES[config.objective.name].divergence else None


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
