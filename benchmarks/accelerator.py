"""What rag_jax does on the accelerator that jax finds: is it right, how fast, how much memory, the same bits again.

    python -m benchmarks.accelerator [--out=DIR] [--seconds=470] [--phases=numbers,steps,torch,resume]
    JAX_PLATFORMS=cpu python -m benchmarks.accelerator --small          # a rehearsal on a CPU, minutes

Prints one table and writes accelerator.json into DIR (the current folder). Needs no network and no weights: models are
random, of the sizes of known ones. Each phase is a process of its own (PyTorch and jax do not share a card's memory
well), ended when its time is up; what it has said by then stands in the table.

    numbers   the device's peaks; losses and gradients of every family against float32 on the CPU; attention; search
    steps     the training step at three sizes, up to a generator of 1.5 billion parameters; the step twice; decoding
    torch     the same step by a capable PyTorch user: bfloat16 autocast, flash attention, one full sequence a pair
    resume    a run that is killed and goes on, against one that is not
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

PHASES = {"numbers": 150, "steps": 230, "torch": 110, "resume": 110}  # seconds that each may take at most
RESULT = "RESULT "
SLOWER_REHEARSAL = 10
Fact = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(), metavar="DIR")
    parser.add_argument("--seconds", type=float, default=470.0, help="all phases together")
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--small", action="store_true", help="tiny sizes: a rehearsal")
    args = parser.parse_args()
    seconds = args.seconds * (SLOWER_REHEARSAL if args.small else 1)
    ends, found = time.monotonic() + seconds, []
    args.out.mkdir(parents=True, exist_ok=True)
    for phase in args.phases.split(","):
        began = time.monotonic()
        limit = min(ends - began, PHASES[phase] * (SLOWER_REHEARSAL if args.small else 1))
        if limit < 20:
            found.append({"phase": phase, "kind": "error", "what": phase, "error": "no time was left for it"})
            continue
        found += run_phase(phase, limit, args.out, args.small)
        print(f"-- {phase}: {time.monotonic() - began:.0f} s", flush=True)
    (args.out / "accelerator.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found), flush=True)
    sys.exit(any(fact["kind"] == "error" or fact.get("ok") is False for fact in found))


def run_phase(phase: str, limit_s: float, out: pathlib.Path, small: bool) -> list[Fact]:
    """What a phase says in a process of its own, in at most so many seconds; its errors are results too."""
    words = [sys.executable, "-m", "benchmarks.on_device", phase, *(["--small"] if small else [])]
    there = os.environ | {"PYTHONUNBUFFERED": "1"}
    if phase == "torch":
        there["JAX_PLATFORMS"] = "cpu"  # there jax is asked for shapes alone
    errors, found = out / f"accelerator.{phase}.log", []
    with open(errors, "wb") as log:
        process = subprocess.Popen(
            words, env=there, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        late = threading.Timer(limit_s, lambda: os.killpg(process.pid, signal.SIGKILL))  # and what it has started
        late.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(RESULT):
                found.append(json.loads(line.removeprefix(RESULT)) | {"phase": phase})
                print(json.dumps(found[-1])[:400], flush=True)
        code, in_time = process.wait(), late.is_alive()
        late.cancel()
    if code:
        why = errors.read_text(errors="replace")[-400:] if in_time else f"cut off after {limit_s:.0f} s"
        found.append({"phase": phase, "kind": "error", "what": phase, "error": f"ended with {code}: {why}"})
    return found


def table(found: list[Fact]) -> str:
    """All facts of all phases, to read."""
    return "\n".join(lines(found))


def lines(found: list[Fact]) -> Iterator[str]:
    by_kind: dict[str, list[Fact]] = {}
    for fact in found:
        by_kind.setdefault(fact["kind"], []).append(fact)
    for d in by_kind.get("device", []):
        yield f"device      {d['name']} ({d['platform']}), {d['memory_gib']} GiB, jax {d['jax']}, Python {d['python']}"
    for p in by_kind.get("peaks", []):
        yield f"peaks       bfloat16 product {p['bf16_tflops']:.0f} TFLOP/s, copy {p['copy_tbs']:.2f} TB/s"
    if rows := by_kind.get("correctness", []):
        names = ("loss", "f32 loss", "f32 grad.", "f32 def.", "bf16", "bf16 CPU")
        yield f"{'against float32 on the CPU':<28}" + "".join(f"{name:>10}" for name in names) + "  (relative errors)"
        for c in rows:
            errors = [c[name] for name in ("f32 highest loss", "f32 highest", "f32 default", "bf16", "bf16 CPU")]
            shown = f"{c['loss']:>10.4f}" + "".join(f"{error:>10.1e}" for error in errors)
            yield f"  {c['name']:<26}{shown}  {'ok' if c['ok'] else 'WRONG'}, worst leaf of bf16: {c['bf16 worst']}"
    if rows := by_kind.get("attention", []):
        yield f"{'attention of a layer, both ways':<36}{'ms':>9}{'error':>10}"
        for a in rows:
            yield f"  {a['name'] + ', ' + a['side']:<34}{a['ms']:>9.3f}{a['error']:>10.1e}"
    yield from step_lines(by_kind.get("step", []))
    if rows := by_kind.get("decode", []):
        yield f"{'decoding':<34}{'B':>4}{'K':>3}{'tokens':>8}{'s':>9}{'answer tok/s':>14}{'stream tok/s':>14}"
        for s in rows:
            yield (
                f"  {s['name'] + ', ' + s['side']:<32}{s['B']:>4}{s['K']:>3}{s['tokens']:>8}{s['seconds']:>9.3f}"
                f"{s['answer_tokens_s']:>14.0f}{s['stream_tokens_s']:>14.0f}"
            )
    for t in by_kind.get("twice", []):
        yield f"same step twice, {t['name']}: {t['equal']} of {t['leaves']} parameters equal, bit for bit"
    for r in by_kind.get("resume", []):
        verdict = "ok" if r["ok"] else "DIFFERENT"
        yield f"killed and gone on, {r['name']}: {r['equal']} of {r['leaves']} arrays equal, bit for bit: {verdict}"
    for s in by_kind.get("search", []):
        yield (
            f"search      {s['queries']} queries, {s['passages']:,} x {s['width']}, k = {s['k']}: {s['first_s']:.2f} s "
            f"and {s['second_s']:.3f} s, error of scores {s['error']:.0e}: {'ok' if s['ok'] else 'WRONG'}"
        )
    for e in by_kind.get("error", []):
        yield f"FAILED      {e['what']}: {e['error'][:300]}"


def step_lines(steps: list[Fact]) -> Iterator[str]:
    if not steps:
        return
    heads = ("B", "K", "s", "predicted", "queries/s", "MFU", "GB", "compile s")
    yield f"{'training step':<34}{heads[0]:>4}{heads[1]:>3}" + "".join(f"{head:>11}" for head in heads[2:])
    for s in steps:
        numbers = f"{s['seconds']:>11.4f}{s.get('predicted_s', 0.0):>11.4f}{s['queries_s']:>11.1f}"
        numbers += f"{s['mfu']:>11.1%}{s['memory_gb']:>11.1f}{s.get('compile_s', 0.0):>11.0f}"
        yield f"  {s['name'] + ', ' + s['side']:<32}{s['B']:>4}{s['K']:>3}{numbers} {s.get('note', '')}"
    sides = {(s["name"], s["side"]): s for s in steps}
    for name, side in sides:
        if side == "ours" and (name, "torch") in sides:
            ours, theirs = sides[name, "ours"], sides[name, "torch"]
            memory = ours["memory_gb"] / max(theirs["memory_gb"], 1e-9)
            times = theirs["seconds"] / ours["seconds"]
            yield f"  {name}: {times:.2f} times as fast as PyTorch, {memory:.2f} of its memory"


if __name__ == "__main__":
    main()
