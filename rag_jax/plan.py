"""Plan: will a config fit, how fast will it be, and what limits it, on accelerators that are not here.

    python -m rag_jax.plan --config=FILE.py --topology=v5e:16x16 | h100:64 [--json] [--sweep]

The accelerator's own compiler runs on this machine, in a process of its own, on abstract arrays: no weights are needed.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rag_jax import cli, config
from rag_jax.errors import UserError
from rag_jax.objectives import OBJECTIVES
from rag_jax.planning import chips, fit

INSIDE = "--in-this-process"
# What a compiler says when a program does not fit: "Used 17.2G of 15.75G hbm".
TOO_MUCH = re.compile(r"Used ([\d.]+)([MG]) of ([\d.]+)([MG]) hbm")
# What the GPU's compiler says where no card is there to try kernels on: of some sizes, and of all since jax 0.12.
NO_KERNEL = ("Couldn't find output tile sizes", "Failed to get configs for")
UNITS = {"M": 2**20, "G": 2**30}
MOST_POINTS = 12
# No device is touched, nobody is asked where we are, and the compiler keeps to itself.
COMPILER = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so that plans may be made side by side
}  # fmt: skip
REMAT = ("dots", "full")
CUDNN = 90800  # the version that the cards' descriptions state
ASSUMPTIONS = (
    "every product at the peak, every other operation at the memory's bandwidth, one after the other; exchanges hidden "
    "behind them unless they take longer"
)


def main() -> None:
    flags = cli.parser("plan", __doc__)
    flags.add_argument("--config", required=True, metavar="FILE.py", help="file that defines get_config()")
    flags.add_argument("--topology", required=True, metavar="DEVICE:SHAPE", help="v5e:16x16, v5p:4x4x4, h100:64, ...")
    flags.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    flags.add_argument("--sweep", action="store_true", help="try batch, K, rematerialisation and mesh; best first")
    flags.add_argument("--most", type=int, default=MOST_POINTS, help="most points of a sweep; one takes minutes for 7B")
    flags.add_argument(INSIDE, action="store_true", help="compile here: what the command starts for itself")
    args, overrides = cli.parse(flags)
    topology = chips.topology(args.topology)
    loaded = config.load(args.config, overrides)
    if args.in_this_process:
        print(json.dumps(compile_step(loaded, topology)), flush=True)
        return
    check_compiler(topology)
    if args.sweep:
        found = sweep(args.config, overrides, loaded, topology, args.most)
        print(json.dumps(found) if args.json else table(found), flush=True)
        return
    held, room = held_bytes(args.config, overrides) / topology.devices / 2**30, topology.chip.hbm_bytes / 2**30
    print(
        "compiling, which takes minutes for large models; weights, gradients and moments alone are "
        f"{held:.1f} of {room:.1f} GiB a device",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    result = compiled(args.config, overrides, topology)
    if not result["fits"]:
        result["fits_with"] = first_that_fits(args.config, overrides, loaded, topology)
    print(json.dumps(result) if args.json else report(result, loaded), flush=True)


def packages(*, is_tpu: bool) -> list[str]:
    """The compiler that belongs to the installed jax, as pip takes it; those of GPUs without what only a GPU needs."""
    if is_tpu:
        wanted = [r for r in importlib.metadata.requires("jax") or () if re.match(r"libtpu.*extra == .tpu.", r)]
        return [wanted[0].split(";")[0].strip() if wanted else "libtpu"]
    version = importlib.metadata.version("jax")
    return [f"jax-cuda13-pjrt=={version}", f"jax-cuda13-plugin=={version}"]


def check_compiler(topology: chips.Topology) -> None:
    """UserError with the line that installs what is missing."""
    try:
        found = importlib.util.find_spec("libtpu" if topology.is_tpu else "jax_plugins.xla_cuda13")
    except ModuleNotFoundError:
        found = None
    if found is None:
        names = " ".join(f"'{name}'" for name in packages(is_tpu=topology.is_tpu))
        raise UserError(f"--topology={topology.text}: its compiler is not installed; pip install --no-deps {names}")


def compiled(file: str, overrides: Mapping[str, Any], topology: chips.Topology) -> dict[str, Any]:
    """`compile_step` in a process of its own. UserError for what it refuses."""
    values = [f"{cli.PREFIX}{name}={value}" for name, value in overrides.items()]
    command = [sys.executable, "-m", "rag_jax.plan", f"--config={file}", f"--topology={topology.text}", INSIDE, *values]
    done = subprocess.run(command, env=os.environ | COMPILER, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    said = [line for line in done.stderr.splitlines() if line.startswith("rag_jax: error: ")]
    if said:
        raise UserError(said[-1].removeprefix("rag_jax: error: "))
    raise RuntimeError(f"the compiler for {topology.text} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def compile_step(loaded: Any, topology: chips.Topology) -> dict[str, Any]:
    """Everything that the compiled step of a config says about itself, on one of the topology's devices."""
    import jax

    from rag_jax import data, hf, pair
    from rag_jax.distributed import sharding
    from rag_jax.models import flops
    from rag_jax.planning import hlo
    from rag_jax.training import setup
    from rag_jax.training.record import evidence_read

    sources = {
        role: pair.adapted(loaded, role, hf.open_config(loaded[role].path, f"{role}.path", role))
        for role in pair.ROLES
        if loaded[role].path is not None
    }
    pair.check_lengths(loaded, sources)
    mesh = sharding.make_mesh(**loaded.mesh.to_dict(), devices=devices(topology))
    sharding.check_batch(mesh, loaded.batch_size, loaded.group_size)
    opened = pair.Pair(loaded, sources, pair.composite(loaded, sources, device_of(topology)), None, None, None)
    _, _, state, step = setup.make_step(opened, mesh)
    lengths = batch_lengths(loaded, setup.used_roles(opened))
    rows = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(*a, sharding=rows),
        data.shape_of(lengths, loaded.batch_size, loaded.objective.negatives),
        is_leaf=lambda a: isinstance(a, tuple) and not hasattr(a, "_fields"),
    )
    used = {role: sources[role].model_config for role in setup.used_roles(opened)}
    K, J = loaded.objective.candidates, loaded.objective.negatives
    reading = (evidence_read(loaded), setup.generator_learns(loaded, state.params))
    needed = flops.training_step(used, loaded.batch_size, K, lengths, J, *reading) / topology.devices
    facts = {
        "topology": topology.text,
        "devices": topology.devices,
        "mesh": dict(mesh.shape),
        "batch_per_device": loaded.batch_size // sharding.batch_shards(mesh),
        "candidates": K,
        "batch_size": loaded.batch_size,
        "parameter_bytes": local_bytes((state.params, state.frozen)),
        "optimizer_bytes": local_bytes(state.opt_state),
        "hbm_limit_bytes": topology.chip.hbm_bytes,
        "model_flops_per_device": needed,
    }
    if (held := facts["parameter_bytes"] + facts["optimizer_bytes"]) > topology.chip.hbm_bytes:
        return facts | {"fits": False, "hbm_bytes_per_device": held, "compiled": False}
    options, lowered = fit.compiler_options(device_of(topology), loaded.kernels), step.lower(state, batch, None)
    try:
        program = _compiled(lowered, options)
    except jax.errors.JaxRuntimeError as error:
        told = TOO_MUCH.search(str(error))
        if told is None:
            raise
        return facts | {"fits": False, "hbm_bytes_per_device": float(told[1]) * UNITS[told[2]]}
    total, temporary = _bytes_of(program.memory_analysis())
    return facts | {
        "fits": total <= topology.chip.hbm_bytes,
        "hbm_bytes_per_device": total,
        "temporary_bytes": temporary,
        **timing(hlo.Program(program.as_text()), topology, needed, (loaded.dtype, loaded.matmul_precision)),
    }


def _compiled(lowered: Any, options: dict[str, Any]) -> Any:
    """The program; of cuBLAS' products where the compiler cannot choose kernels of its own."""
    import jax

    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if not any(said in str(error) for said in NO_KERNEL):
            raise
        return lowered.compile(compiler_options=options | {"xla_gpu_enable_triton_gemm": False})


def _bytes_of(memory: Any) -> tuple[int, int]:
    """Bytes of all that a compiled program needs on a device, by `memory_analysis`, and those of its own work."""
    total = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return total, memory.temp_size_in_bytes


def device_of(topology: chips.Topology) -> fit.Device:
    """What a run would find there. jax is made to lower to cuDNN's attention for a card that is not here."""
    chip, card = topology.chip, topology.chip.card
    if card is None:
        return fit.Device("tpu", topology.devices, memory=chip.hbm_bytes, kind=chip.kind)
    from jax._src.cudnn import fused_attention_stablehlo as fused

    fused.check_cudnn_version = lambda: CUDNN
    fused.check_compute_capability = lambda least: card.capability >= tuple(map(int, least.split(".")))
    fused.is_cuda_compute_capability_equal = lambda other: card.capability == tuple(map(int, other.split(".")))
    return fit.Device("gpu", topology.devices, card.capability, chip.hbm_bytes, chip.kind)


def timing(program: Any, topology: chips.Topology, needed: float, products: tuple[str, str]) -> dict[str, Any]:
    """A roofline of every operation, one after the other, and of the exchanges beside them.

    `products`: dtype and `matmul_precision` of those of the models.
    """
    from rag_jax.planning import hlo

    chip = topology.chip
    peak = chip.product_peak(*products)
    operations = list(program.operations())
    compute_s = sum(op.times * op.flops for op in operations) / peak
    memory_s = sum(op.times * op.bytes for op in operations) / chip.hbm_bandwidth
    in_order = [op for op in operations if not op.beside]
    busy_s = sum(op.times * max(op.flops / peak, op.bytes / chip.hbm_bandwidth) for op in in_order)
    exchanges = list(program.exchanges().values())
    sent = hlo.collective_bytes(exchanges)
    network_s = sum(sent.values()) / topology.bandwidth
    step_s = max(busy_s, memory_s, network_s)
    binds = "network" if network_s == step_s else "compute" if compute_s >= memory_s else "memory"
    return {
        "flops_per_device": sum(op.times * op.flops for op in operations),
        "collective_bytes_per_device": sent,
        "exchanged": sorted({f"{one.kind} {one.operand}" for one in exchanges}),
        "compute_s": compute_s,
        "memory_s": memory_s,
        "network_s": network_s,
        "predicted_step_s": step_s,
        "predicted_mfu": needed / step_s / chip.peak,
        "binds": binds,
    }


def devices(topology: chips.Topology) -> Any:
    """Abstract devices, from the accelerator's compiler."""
    from jax.experimental import topologies

    card = topology.chip.card
    if card is None:
        try:
            # A host has several chips where nothing else is said, and a single one is then no topology.
            alone = {"chips_per_host_bounds": [1, 1, 1]} if topology.devices == 1 else {}
            described = topologies.get_topology_desc(platform="tpu", topology_name=topology.text, **alone)
        except Exception as error:  # of any kind, for shapes that are not built
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--topology={topology.text}: the TPU compiler does not know this shape ({reason})"
            ) from None
        return described.devices
    nodes, in_node = max(topology.devices // chips.NODE, 1), min(topology.devices, chips.NODE)
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name=topology.name,
        target_config=card.target,
        topology=f"1x{nodes}x{in_node}",
    )
    return described.devices


def batch_lengths(loaded: Any, used: set[str]) -> Any:
    """The longest texts that the config lets in, in the shape that training rounds them up to."""
    from rag_jax import data
    from rag_jax.data.segments import round_up

    section, lengths = loaded.data, {}
    if "retriever" in used:
        lengths |= {"query": section.query_len, "passage": section.passage_len}
    suffix = section.prompt_query_len + section.answer_len
    if "generator" in used and OBJECTIVES[loaded.objective.name].reads == "strings":
        lengths |= {"string": section.prompt_passage_len + suffix}
    elif "generator" in used:
        lengths |= {"prefix": section.prompt_passage_len, "suffix": suffix, "answer": section.answer_len}
    return data.Lengths.of({name: round_up(length) for name, length in lengths.items()})


def local_bytes(tree: Any) -> int:
    """What one device holds of abstract arrays."""
    import jax

    return sum(a.dtype.itemsize * math.prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(tree))


def advice(result: Mapping[str, Any], loaded: Any) -> list[str]:
    """Keys to change, for a plan that does not fit or that the network holds up."""
    tips = []
    if not result["fits"]:
        for role in ("generator", "retriever"):
            if loaded[role].path is not None and loaded[role].remat != "full":
                tips.append(f"{role}.remat=full")
        if result["batch_per_device"] > loaded.group_size:
            tips.append(f"batch_size={result['batch_size'] * loaded.group_size // result['batch_per_device']}")
        if loaded.objective.negatives:
            tips.append(f"objective.negatives={loaded.objective.negatives // 2}")
        if loaded.group_size > loaded.objective.candidates:
            tips.append(f"group_size={loaded.objective.candidates}")
        elif loaded.objective.candidates > 2:
            tips.append(f"objective.candidates={loaded.objective.candidates // 2} and group_size with it")
        if not loaded.retriever.chunk_size and result["batch_per_device"] > 1:
            tips.append("retriever.chunk_size=1")
        held = result["parameter_bytes"] + result["optimizer_bytes"]
        if held > 0.5 * result["hbm_limit_bytes"] or not tips:
            tips.append("more devices: parameters and moments are shared by all")
    elif result["binds"] == "network":
        tips.append("a larger batch_size: weights cross the network once a group, whatever the number of its rows")
    return tips


def first_that_fits(
    file: str, overrides: Mapping[str, Any], loaded: Any, topology: chips.Topology
) -> dict[str, Any] | None:
    """The fewest of the changes that save memory with which a config fits, compiled; None: it does not with all.

    What only takes time comes first, then what trains less, then what changes the loss.
    """
    changes: dict[str, Any] = {}
    for change in changes_that_save(loaded):
        changes |= change
        shown = " ".join(f"{name}={value}" for name, value in changes.items())
        if held_bytes(file, {**overrides, **changes}) / topology.devices > topology.chip.hbm_bytes:
            print(f"too much before a step begins: {shown}", file=sys.stderr, flush=True)
            continue
        print(f"compiling with {shown}", file=sys.stderr, flush=True)
        result = compiled(file, {**overrides, **changes}, topology)
        if result["fits"]:
            return {"changes": changes, "hbm_bytes_per_device": result["hbm_bytes_per_device"]}
    return None


def changes_that_save(loaded: Any) -> Iterator[dict[str, Any]]:
    """Each beside those before it: rematerialisation, adapters, a base in four bits, smaller groups."""
    objective, generator = loaded.objective, loaded.generator
    used = [role for role in ("generator", "retriever") if loaded[role].path is not None]
    if remat := {f"{role}.remat": "full" for role in used if loaded[role].remat != "full"}:
        yield remat
    if generator.path is not None:
        if not generator.lora.rank:
            yield {"generator.lora.rank": 16}
        if generator.base_dtype not in ("int4", "uint4"):
            yield {"generator.base_dtype": "int4"}
    size = loaded.group_size
    while size % 2 == 0 and size // 2 * (1 + objective.negatives) >= objective.candidates:
        size //= 2
        yield {"group_size": size}


def held_bytes(file: str, overrides: Mapping[str, Any]) -> float:
    """Of parameters, and of those that are trained gradients and moments, on all devices together."""
    from rag_jax import hf, pair
    from rag_jax.models import flops

    loaded: Any = config.load(file, overrides)
    total = 0.0
    for role in pair.ROLES:
        if loaded[role].path is not None:
            source = hf.open_config(loaded[role].path, f"{role}.path", role)
            model_config = pair.adapted(loaded, role, source).model_config
            total += flops.held_bytes(model_config) + 12 * flops.trained_parameters(model_config)
    return total


def sweep(
    file: str, overrides: Mapping[str, Any], loaded: Any, topology: chips.Topology, most: int
) -> list[dict[str, Any]]:
    """Plans of nearby configs, those that fit, best predicted queries a second first."""
    found = []
    points = list(itertools.islice(nearby(loaded, topology), most))
    for n, changes in enumerate(points, start=1):
        shown = " ".join(f"{name}={value}" for name, value in changes.items())
        print(f"{n}/{len(points)} {shown}", file=sys.stderr, flush=True)
        try:
            result = compiled(file, {**overrides, **changes}, topology)
        except UserError as error:
            print(f"    {error}", file=sys.stderr, flush=True)
            continue
        if result["fits"]:
            found.append(result | {"changes": changes})
    return sorted(found, key=lambda r: r["predicted_step_s"] / r["batch_size"])


def nearby(loaded: Any, topology: chips.Topology) -> Iterator[dict[str, Any]]:
    """Changes to try: K, rematerialisation, tensor parallelism, groups a device."""
    ks = dict.fromkeys([loaded.objective.candidates, 4, 8])
    for model, k, remat, groups in itertools.product((1, 4), ks, REMAT, (1, 2)):
        shards = topology.devices // model
        if topology.devices % model == 0:
            yield {
                "batch_size": k * groups * shards,
                "group_size": k,
                "objective.candidates": k,
                "generator.remat": remat,
                "mesh.replica": 1,
                "mesh.data": shards,
                "mesh.model": model,
            }


def report(result: Mapping[str, Any], loaded: Any) -> str:
    """A plan to read."""
    gib = 2.0**30
    axes = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    fits = "fits" if result["fits"] else "does NOT fit"
    lines = [
        f"topology   {result['topology']}: {result['devices']} devices, {axes}",
        f"batch      {result['batch_size']} queries, {result['batch_per_device']} a device, K = {result['candidates']}",
        f"memory     {result['hbm_bytes_per_device'] / gib:.2f} of {result['hbm_limit_bytes'] / gib:.2f} GiB a device: "
        f"{fits}{'' if result.get('compiled', True) else ', before a step begins: it was not compiled'}",
        f"             parameters {result['parameter_bytes'] / gib:.2f}, moments {result['optimizer_bytes'] / gib:.2f}"
        + (f", temporaries {result['temporary_bytes'] / gib:.2f}" if "temporary_bytes" in result else ""),
    ]
    if "predicted_step_s" in result:
        done, needed = result["flops_per_device"], result["model_flops_per_device"]
        sent = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in result["collective_bytes_per_device"].items())
        lines += [
            f"work       {done / 1e12:.1f} TFLOP a device and step, {done / needed:.2f} times what the maths needs",
            f"exchanges  {sent or 'none'} sent by each device",
            f"step       {result['predicted_step_s']:.2f} s, {result['batch_size'] / result['predicted_step_s']:.0f} "
            f"queries/s, MFU {result['predicted_mfu']:.0%}; {result['binds']} binds",
            f"             compute {result['compute_s']:.2f} s, memory {result['memory_s']:.2f} s, network "
            f"{result['network_s']:.2f} s",
            f"assumed    {ASSUMPTIONS}",
        ]
    if with_changes := result.get("fits_with"):
        shown = " ".join(f"--config.{name}={value}" for name, value in with_changes["changes"].items())
        lines.append(f"fits with  {shown}: {with_changes['hbm_bytes_per_device'] / gib:.2f} GiB, compiled")
    if tips := advice(result, loaded):
        lines.append(f"try        {'; '.join(tips)}")
    return "\n".join(lines)


def table(found: list[dict[str, Any]]) -> str:
    """A sweep to read."""
    if not found:
        return "none of them fits; give more devices"
    lines = [f"{'queries/s':>10}{'MFU':>6}{'step s':>8}{'GiB':>7}  config"]
    for result in found:
        changes = " ".join(f"{name}={value}" for name, value in result["changes"].items())
        lines.append(
            f"{result['batch_size'] / result['predicted_step_s']:>10.0f}{result['predicted_mfu']:>6.0%}"
            f"{result['predicted_step_s']:>8.2f}{result['hbm_bytes_per_device'] / 2**30:>7.1f}  {changes}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
