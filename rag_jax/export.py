"""Export: a run's checkpoint as two Hugging Face folders.

    python -m rag_jax.export --workdir=DIR --out=OUT [--step=N|best|latest] [--dtype=float32]
    python -m rag_jax.export --workdir=DIR --out=OUT --adapters
    python -m rag_jax.export --workdir=DIR --out=OUT --push=OWNER/NAME       # to the hub, private

OUT/retriever is read by `transformers.AutoModel` and `SentenceTransformer`, OUT/generator by
`transformers.AutoModelForCausalLM`, and OUT with its config.json by `rag_jax.load`. With --adapters a model that has
adapters (LoRA) is written as those alone, as `peft` reads them; else they are merged into its weights. --push uploads
each model with its card, no config and no rows.
"""

import contextlib
import dataclasses
import errno
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from rag_jax import cli, config, files
from rag_jax.errors import UserError
from rag_jax.objectives import ROLES
from rag_jax.publishing import cards, hub

# In place of the run's paths, which are those of this machine: an export is handed on.
NO_ROWS = {"data.train": None, "data.eval": None, "data.passages": None}
DTYPES = ("float32", "float16", "bfloat16", "source")
# Passages by which is told how far adapters have moved embeddings.
SAMPLE = 64
# The mean cosine above which they have hardly moved.
HARDLY = 0.999


def main() -> None:
    flags = cli.parser("export", __doc__)
    flags.add_argument("--workdir", required=True, type=cli.path, metavar="DIR", help="a run")
    flags.add_argument("--out", required=True, type=cli.path, metavar="OUT", help="a folder that is not there yet")
    flags.add_argument("--step", metavar="N|best|latest", help="which of its checkpoints; the latest if not given")
    flags.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights; source: as they came in")
    flags.add_argument("--adapters", action="store_true", help="adapters by themselves (PEFT), not merged")
    flags.add_argument("--push", metavar="OWNER/NAME", help="to the hub too, as OWNER/NAME-retriever and -generator")
    flags.add_argument("--public", action="store_true", help="with --push: for all to see; private if not given")
    args, overrides = cli.parse(flags)
    loaded: Any = config.load_workdir(args.workdir, overrides)
    cli.check_out(args.out)
    if args.public and args.push is None:
        raise UserError("--public: goes with --push=OWNER/NAME")
    names = {role: role for role in ROLES if loaded[role].path is not None}
    push = args.push
    if push is not None:
        names = hub.repositories(push, list(names))
        hub.check(push, names)
    step = export(loaded, args.workdir, args.out, args.step, args.dtype, adapters=args.adapters, names=names)
    print(f"step {step} of {args.workdir}: {', '.join(str(path) for path in sorted(args.out.iterdir()))}", flush=True)
    if push is not None:
        try:
            for role, repository in names.items():
                print(hub.push(push, args.out / role, repository, step, public=args.public), flush=True)
        except UserError as error:
            raise UserError(f"{error}; the export in {args.out} is complete, give another --out to try again") from None


def export(
    loaded: Any,
    workdir: pathlib.Path,
    out: pathlib.Path,
    step: str | int | None,
    dtype: str,
    *,
    adapters: bool = False,
    names: Mapping[str, str] | None = None,
) -> int:
    """Write all models of the config at a step; `out` appears when it is complete. Returns the step.

    `adapters`: of models that have some those alone. `names`: under which their cards name them; their folders'.
    """
    from rag_jax import hf, pair
    from rag_jax.training import setup

    opened = pair.open_pair(loaded, workdir)
    names = names or {role: role for role in opened.sources}
    adapted = {role for role, source in opened.sources.items() if source.model_config.computing.lora is not None}
    if adapters and not adapted:
        raise UserError(
            f"--adapters: the run in {workdir} has none (retriever.lora.rank, generator.lora.rank); leave it out"
        )
    found, params = setup.saved_params(opened, workdir, step)
    if "retriever" in adapted:
        print(moved(opened, params, found), flush=True)
    out = out.resolve()  # a link to an empty folder stays one
    out.parent.mkdir(parents=True, exist_ok=True)
    with _told(out), files.folder_at_once(out) as made:
        for role, source in opened.sources.items():
            folder = made / role
            folder.mkdir()
            pooling = pair.pooling(loaded, source) if role == "retriever" else None
            alone = adapters and role in adapted
            if alone:
                base = hf.base_of(loaded[role].path, f"{role}.path")
                trained = setup.trained_of_base(opened, role)
                hf.save_adapter(source, params[role], folder, base, trained, pooling)
            else:
                hf.save_model(source, params[role], folder, dtype, pooling)
            facts = card_facts(opened, role, workdir, found, folder)
            card = cards.card(loaded, role, facts, names, adapter=alone)
            (folder / "README.md").write_text(card, encoding="utf-8")
        changes = NO_ROWS | {f"{role}.path": role for role in opened.sources}
        for role in opened.sources:  # a folder of adapters brings its own, and merged weights are whole
            changes |= {f"{role}.lora.rank": 0, f"{role}.lora.path": None}
            if not (adapters and role in adapted):
                changes[f"{role}.base_dtype"] = "float32"
        files.write_whole(made / "config.json", config.to_json(config.build(config.flat(loaded), changes)))
    return found


def card_facts(opened: Any, role: str, workdir: pathlib.Path, step: int, folder: pathlib.Path) -> cards.Facts:
    """What the card of an exported model tells; a second tokenizer is put beside the first where it takes one."""
    from rag_jax import hf, pair
    from rag_jax.data import segments
    from rag_jax.models import flops, projection

    source = opened.sources[role]
    facts = cards.of_run(workdir, step, flops.parameters(source.model_config))
    if role == "retriever":
        how = pair.pooling(opened.config, source)
        return dataclasses.replace(
            facts,
            width=how.truncate_dim
            or projection.width_of(how.projection, hf.pooled_width(how.mode, source.model_config.width)),
            max_len=how.max_len or 0,
            pooling=how.mode,
            similarity=how.similarity,
            prefixes=(how.query_prefix, how.passage_prefix),
            is_plain=not (how.projection or how.truncate_dim or how.lower_case),
        )
    reading_on = segments.reading_on(source.tokenizer)
    if apart := reading_on is not source.tokenizer:
        reading_on.save_pretrained(folder / cards.SUBFOLDER)
    return dataclasses.replace(facts, bos=bool(segments.bos_ids(source.tokenizer)), reading_on=apart)


def moved(opened: Any, params: Any, step: int) -> str:
    """How far adapters have moved the embeddings of some passages from those that the base makes of them."""
    import numpy as np

    from rag_jax import data
    from rag_jax.data import rows
    from rag_jax.inference.trained import Trained
    from rag_jax.models.adapters import without_effect

    source, columns, texts = opened.config.data.train, data.columns_of(opened.config.data, "data.train"), []
    if pathlib.Path(source).expanduser().exists():  # nothing is fetched for this
        with contextlib.suppress(UserError):
            found = rows.read_rows(source, "data.train", columns, with_answers=False).passages
            texts = list(dict.fromkeys(text for several in found for text in several if text.strip()))[:SAMPLE]
    if not texts:
        return "moved      not known: data.train cannot be read, whose passages tell how far embeddings have moved"
    base = params | {"retriever": without_effect(params["retriever"])}
    before, after = (Trained(opened, each, step).embed_passages(texts) for each in (base, params))
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    cosine = np.sum(before * after, axis=1) / np.maximum(norms, 1e-12)
    if np.array_equal(before, after):
        return f"moved      nothing: the adapters leave the embeddings of {len(texts)} passages as the base makes them"
    spread = f"{cosine.mean():.3f} on average ({cosine.min():.3f} to {cosine.max():.3f})"
    hardly = "; that is hardly at all: train longer, or at a higher rate" if cosine.mean() > HARDLY else ""
    return f"moved      {len(texts)} passages of data.train: cosine with the base's embeddings {spread}{hardly}"


@contextlib.contextmanager
def _told(out: pathlib.Path) -> Iterator[None]:
    """One line for what goes wrong in writing."""
    import safetensors

    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise UserError(f"--out={out}: {error.strerror}, while the export was made; give a new folder") from None
        reason = " ".join(str(error).split())
        raise UserError(f"--out={out}: cannot be written ({reason}); nothing of it is left there") from error


if __name__ == "__main__":
    cli.run(main)
