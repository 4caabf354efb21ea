"""What a run's config stands for: the models it names, how they read, and the composite of both."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rag_jax import data, hf, models, rag
from rag_jax.distributed import sharding
from rag_jax.errors import UserError
from rag_jax.models import adapters, flops, projection
from rag_jax.models.quantised import KINDS
from rag_jax.objectives import OBJECTIVES, ROLES
from rag_jax.planning import fit


@dataclasses.dataclass(frozen=True)
class Pair:
    """The models of a config before any weight is read. What the config does not name is None."""

    config: Any
    sources: dict[str, hf.Source]  # by role
    model: rag.Rag
    retriever_text: data.RetrieverText | None
    prompt: data.Prompt | None
    whole_string: data.WholeString | None  # objective "dalm": what its generator trains on

    def shapes(self) -> dict[str, Any]:
        """Shapes of all parameters, by role."""
        return {role: models.abstract(source.model_config)[1] for role, source in self.sources.items()}


def open_pair(config: Any, workdir: pathlib.Path | None = None) -> Pair:
    """Configs and tokenizers of the models, from the copies in the workdir where it has them. Reads no weights."""
    sources = {}
    for role in ROLES:
        if config[role].path is not None:
            copy = None if workdir is None else workdir / "models" / role
            path = str(copy) if copy is not None and copy.is_dir() else config[role].path
            sources[role] = adapted(config, role, hf.open_model(path, f"{role}.path", role))
    check_lengths(config, sources)
    text, prompt_text = retriever_text(config, sources), prompt(config, sources)
    whole_string = None
    if prompt_text is not None and OBJECTIVES[config.objective.name].reads == "strings":
        whole_string = data.WholeString(prompt_text.tokenizer, string_len(config))
    return Pair(config, sources, composite(config, sources), text, prompt_text, whole_string)


def adapted(config: Any, role: str, source: hf.Source) -> hf.Source:
    """The model as the run holds it: with adapters that it brings or that the config asks for, its base in fewer bits.

    UserError for what cannot be.
    """
    source = dataclasses.replace(source, model_config=models.with_base(source.model_config, config[role].base_dtype))
    section, brought = config[role].lora, source.model_config.computing.lora
    if section.path is not None and source.adapter is None:
        source = hf.with_adapter(source, section.path, f"{role}.lora.path")
        brought = source.model_config.computing.lora
    asked = models.Lora(
        section.rank, section.alpha, tuple(section.targets), section.scaling == "rank_stabilised", section.dropout
    )
    if brought is None:
        if not section.rank:
            return source
        problem = adapters.problem(asked, models.linear_layers(source.model_config))
        if problem := problem or hf.fused_problem(source, asked):
            raise UserError(f"{role}.lora.{problem} ({role}.path={source.path!r})")
        return dataclasses.replace(source, model_config=models.with_lora(source.model_config, asked))
    if section.rank and (asked.rank, asked.scale) != (brought.rank, brought.scale):
        raise UserError(
            f"{role}.lora.rank={section.rank}, {role}.lora.alpha={section.alpha:g}: the adapter in {source.adapter} "
            f"has rank {brought.rank} and a scale of {brought.scale:g}; leave the rank at 0 to take the adapter's own"
        )
    return source


def shares_base(config: Any, sources: dict[str, hf.Source]) -> bool:
    """Whether both models are adapters on one base, which is then held once."""
    if len(sources) < 2:
        return False
    computing = [source.model_config.computing for source in sources.values()]
    bases = {hf.base_of(config[role].path, f"{role}.path") for role in sources}
    return len(bases) == 1 and all(one.lora for one in computing) and len({one.base_dtype for one in computing}) == 1


def use_precision(config: Any) -> None:
    """Of every float32 product that is traced from now on, until another run is opened; jax keeps programs apart by it.

    In a bfloat16 run it stays the device's own: all of its float32 products but those of the scores, which ask for
    more themselves, are gradients of bfloat16 ones.
    """
    precision = config.matmul_precision if config.dtype == "float32" else "default"
    jax.config.update("jax_default_matmul_precision", precision)


def string_len(config: Any) -> int:
    """The most tokens the generator reads: all three segments."""
    return config.data.prompt_passage_len + config.data.prompt_query_len + config.data.answer_len


def check_lengths(config: Any, sources: dict[str, hf.Source]) -> None:
    """UserError for texts longer than the positions that a model has."""
    lengths = {
        "retriever": {name: config.data[name] for name in ("query_len", "passage_len")},
        "generator": {"prompt_passage_len + data.prompt_query_len + data.answer_len": string_len(config)},
    }
    problems = [
        f"data.{name}={length}: {role}.path={source.path!r} has {source.model_config.max_positions} positions"
        for role, source in sources.items()
        for name, length in lengths[role].items()
        if length > source.model_config.max_positions
    ]
    if problems:
        raise UserError(f"{'; '.join(problems)}; lower what is too long")


def this_device() -> fit.Device:
    """What the devices of this run are."""
    own = jax.local_devices()[0]  # of the other processes' nobody tells the memory
    stats = own.memory_stats() or {}
    major, minor = map(int, getattr(own, "compute_capability", "0.0").split("."))
    memory = stats.get("bytes_limit", 0.0)
    if own.platform == "cpu" and jax.process_count() == 1:  # several of them share a host's memory
        memory = fit.host_memory() / jax.local_device_count()
    return fit.Device(own.platform, jax.device_count(), (major, minor), memory, own.device_kind)


def composite(config: Any, sources: dict[str, hf.Source], device: fit.Device | None = None) -> rag.Rag:
    """Both models in one; what is traced from now on computes with the config's precision, see `use_precision`.

    `device`: what it will run on; None: the devices here.
    """
    use_precision(config)
    device = device or this_device()
    configs = {role: model_config(config, role, source, device) for role, source in sources.items()}
    groups, head_tokens = _at_a_time(config, configs, device)
    if "generator" in configs:
        configs["generator"] = _frugal(config, configs, device, groups)
    graphs = {role: models.abstract(configs[role])[0] for role in sources}
    embedding = pooling(config, sources["retriever"]) if "retriever" in sources else hf.Pooling("mean")
    if embedding.similarity == "dot" and config.objective.name == "dalm":
        raise UserError(
            "objective.name=dalm: compares by cosines, and retriever.similarity is dot; set it to cosine, or choose "
            "another objective"
        )
    return rag.Rag(
        rag.Objective(**config.objective.to_dict()),
        graphs.get("retriever"),
        graphs.get("generator"),
        embedding.mode,
        config.group_size,
        jnp.dtype(config.dtype),
        config.retriever.chunk_size,
        groups,
        head_tokens,
        similarity=embedding.similarity,
        truncate_dim=embedding.truncate_dim,
        matryoshka_dims=_matryoshka_dims(config, sources, embedding),
    )


def _matryoshka_dims(config: Any, sources: dict[str, hf.Source], embedding: hf.Pooling) -> tuple[int, ...]:
    """Widths below that of the embedding; UserError for others."""
    dims = config.retriever.matryoshka_dims if "retriever" in sources else ()
    if dims:
        before = hf.pooled_width(embedding.mode, sources["retriever"].model_config.width)
        width = embedding.truncate_dim or projection.width_of(embedding.projection, before)
        if max(dims) >= width:
            raise UserError(
                f"retriever.matryoshka_dims={dims}: an embedding has {width} channels, and is trained whole in any "
                "case; name fewer"
            )
    return tuple(dims)


def pooling(config: Any, source: hf.Source) -> hf.Pooling:
    """How a retriever reads, and how its states become an embedding: as the config says, else as its folder says."""
    section, folder_says = config.retriever, source.pooling
    query, passage = OBJECTIVES[config.objective.name].prefixes or (
        folder_says.query_prefix,
        folder_says.passage_prefix,
    )
    width = section.truncate_dim or folder_says.truncate_dim
    mode = folder_says.mode if section.pooling == "auto" else section.pooling
    parts, before = folder_says.projection, hf.pooled_width(mode, source.model_config.width)
    if problem := projection.problem(parts, before):
        raise UserError(f"retriever.pooling={mode}: retriever.path={source.path!r} has {problem}; choose another")
    if width is not None and width > (most := projection.width_of(parts, before)):
        raise UserError(
            f"retriever.truncate_dim={width}: retriever.path={source.path!r} has {most} channels; give fewer"
        )
    return hf.Pooling(
        mode,
        query if section.query_prefix is None else section.query_prefix,
        passage if section.passage_prefix is None else section.passage_prefix,
        max(config.data.query_len, config.data.passage_len),
        folder_says.similarity if section.similarity == "auto" else section.similarity,
        width,
        folder_says.lower_case,
        parts,
    )


def _at_a_time(config: Any, configs: dict[str, models.ModelConfig], device: fit.Device) -> tuple[int, int]:
    """Groups that the generator reads at a time, and tokens whose logits exist at a time."""
    if "generator" not in configs:
        return 1, fit.CPU_TOKENS
    groups = fit.groups_at_a_time(device, _held_bytes(configs, device), _group_bytes(config, configs["generator"]))
    return groups, fit.head_chunk(device, configs["generator"].vocab_size)


def _frugal(config: Any, configs: dict[str, models.ModelConfig], device: fit.Device, groups: int) -> models.ModelConfig:
    """The generator's config, which keeps less for the backward pass where memory would be short."""
    generator, of_device = configs["generator"], config.batch_size // config.group_size // device.count
    used = _held_bytes(configs, device) + min(groups, max(of_device, 1)) * _group_bytes(config, generator)
    remat = fit.remat(device, config.generator.remat, used)
    return dataclasses.replace(generator, computing=dataclasses.replace(generator.computing, remat=remat))


def _held_bytes(configs: dict[str, models.ModelConfig], device: fit.Device) -> float:
    """Parameters, and of those that are trained their gradients and two moments, float32, shared by all devices."""
    return sum(flops.held_bytes(one) + 12 * flops.trained_parameters(one) for one in configs.values()) / device.count


def _group_bytes(config: Any, generator: models.ModelConfig) -> float:
    """What stays of a group for the generator's backward pass."""
    section, objective = config.data, config.objective
    prefix_tokens = (1 + objective.negatives) * section.prompt_passage_len
    suffix_tokens = objective.candidates * (section.prompt_query_len + section.answer_len)
    return flops.kept_bytes(generator, config.group_size * (prefix_tokens + suffix_tokens))


def model_config(config: Any, role: str, source: hf.Source, device: fit.Device | None = None) -> models.ModelConfig:
    """The model's own config, with what the run decides: dropout, and how it is computed on such a device."""
    device = device or this_device()
    kernel, _ = attention_kernel(config, role, source, device)
    own = _with_dropout(config, source)
    # Layers one after the other, nothing would keep the compiler from making all quantised ones whole at the start.
    unrolls = own.computing.base_dtype not in KINDS and fit.unrolls(device, own.num_layers)
    held = own.computing.lora, own.computing.base_dtype, own.computing.projection
    remat = fit.remat(device, config[role].remat)
    computing = models.Computing(config.dtype, remat, kernel, unrolls, *held)
    return dataclasses.replace(own, computing=computing)


def _with_dropout(config: Any, source: hf.Source) -> models.ModelConfig:
    changes = {} if config.dropout is None else dict.fromkeys(dropouts(source.model_config), config.dropout)
    return dataclasses.replace(source.model_config, **changes)


def attention_kernel(config: Any, role: str, source: hf.Source, device: fit.Device) -> tuple[models.Kernel, str]:
    """The kernel of a model's attention in training and, of the plain one, why it is no fused one.

    UserError where the config asks for one that cannot compute this model.
    """
    own = _with_dropout(config, source)
    rate = getattr(own, "attention_dropout", 0.0)
    kernel = fit.FUSED.get(device.platform) if config.attention == "auto" else config.attention
    if kernel is None or kernel == "plain":
        return "plain", ""
    problem = own.unfused or fit.fused_problem(kernel, device, config.dtype, own.heads, config.mesh.model, rate)
    if problem and config.attention != "auto":
        raise UserError(
            f"attention={kernel}: cannot compute {role}.path={source.path!r}, as {problem}; say auto or plain"
        )
    return ("plain", f"not {kernel}: {problem}") if problem else (kernel, "")


def dropouts(model_config: models.ModelConfig) -> dict[str, float]:
    """The dropout rates of a model, by the names of its config."""
    return {name: rate for name, rate in vars(model_config).items() if name.endswith("dropout")}


def retriever_text(config: Any, sources: dict[str, hf.Source]) -> data.RetrieverText | None:
    if "retriever" not in sources:
        return None
    reads = pooling(config, sources["retriever"])
    return data.RetrieverText(
        sources["retriever"].tokenizer,
        reads.query_prefix,
        reads.passage_prefix,
        config.data.query_len,
        config.data.passage_len,
    )


def prompt(config: Any, sources: dict[str, hf.Source]) -> data.Prompt | None:
    if "generator" not in sources:
        return None
    texts, lengths = config.prompt, config.data
    return data.Prompt(
        sources["generator"].tokenizer, texts.passage, texts.query, texts.answer,
        lengths.prompt_passage_len, lengths.prompt_query_len, lengths.answer_len,
    )  # fmt: skip


def abstract_params(pair: Pair, mesh: Mesh | None = None) -> dict[str, Any]:
    """Shapes of all parameters and how they lie on a mesh; without one, on a mesh of all devices."""
    shapes = pair.shapes()
    places = sharding.param_shardings(mesh or sharding.make_mesh(1, -1, 1), shapes)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, places)


def pretrained_params(pair: Pair, mesh: Mesh | None = None) -> dict[str, Any]:
    """The parameters in the models' folders, which lie as `abstract_params` says; new adapters are drawn by seed."""
    params: dict[str, Any] = {}
    shares = shares_base(pair.config, pair.sources)
    for role, leaves in sorted(abstract_params(pair, mesh).items()):  # the generator first
        source = pair.sources[role]
        places = jax.tree.map(lambda a: a.sharding, leaves)
        if shares and "generator" in params:
            params[role] = params["generator"]
        else:
            params[role] = hf.load_params(source.folder, source.model_type, source.model_config, places)
        if source.model_config.computing.lora is not None or source.model_config.computing.projection:
            params[role] = _with_others(pair.config.seed, role, source, params[role], leaves)
    return params


def base_params(pair: Pair, mesh: Mesh) -> dict[str, Any]:
    """`pretrained_params` of a run whose models are open from its workdir, where their weights are not."""
    sources = {role: _base(pair.config, role, source) for role, source in pair.sources.items()}
    return pretrained_params(dataclasses.replace(pair, sources=sources), mesh)


def _base(config: Any, role: str, source: hf.Source) -> hf.Source:
    """The model with its weights; of an adapter whose folder is gone, which the run has no more need of, its base."""
    section, key = config[role], f"{role}.path"
    try:
        return adapted(config, role, hf.open_model(section.path, key, role))
    except UserError:
        if source.adapter is None:
            raise
    path = section.path if section.lora.path is not None else hf.base_beside(source.adapter, key)
    return dataclasses.replace(hf.open_model(path, key, role), model_config=source.model_config)


def _with_others(seed: int, role: str, source: hf.Source, params: Any, leaves: Any) -> Any:
    """The parameters, what stands behind the pooling, and adapters: those of the source's folder, or new ones."""
    found = hf.load_projection(source)
    found |= hf.load_adapter(source) if source.adapter is not None else {}
    key = jax.random.fold_in(jax.random.key(seed), ROLES.index(role))
    named = jax.tree_util.tree_leaves_with_path(params)
    have = {jax.tree_util.keystr(path, simple=True, separator="/"): a for path, a in named}
    have = {path: a for path, a in have.items() if not adapters.is_adapter(path)}  # of another role, if any

    def leaf(key_path: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if path in found:
            return jax.make_array_from_callback(wanted.shape, wanted.sharding, lambda index: found[path][index])
        if path in have:
            return have[path]
        draw = functools.partial(adapters.drawn, path, wanted.shape)
        return jax.jit(draw, out_shardings=wanted.sharding)(key)

    return jax.tree_util.tree_map_with_path(leaf, leaves)
