"""What a run would read and need, before it takes hours: no weight is read, nothing is trained, nothing is written."""

import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rag_jax import data, pair, untrusted
from rag_jax.config import Config
from rag_jax.distributed import sharding
from rag_jax.documents import copies
from rag_jax.models import flops
from rag_jax.training import announce, overlap, setup
from rag_jax.training.setup import Training

SHOWN_ROWS = 5
# Of a text its beginning and its end.
HEAD, TAIL = 160, 80
BARS, BINS = " ▁▂▃▄▅▆▇█", 24
# Bytes of a float32 parameter that trains (with its gradient and two moments), and of one that does not.
TRAINED, FROZEN = 16, 4


def dry_run(config: Config, workdir: pathlib.Path) -> str:
    """The start-up lines, lengths, some rows as each model reads them, what train and eval share, and memory.

    UserError for all that would keep the run from starting but its weights.
    """
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    sharding.check_batch(mesh, config.batch_size, config.group_size)
    training = setup.build(config, workdir, mesh, 0)
    parts = {
        "": announce.summary(training, 0),
        "Tokens": "\n".join(histograms(training)),
        f"{SHOWN_ROWS} rows as the models read them": "\n".join(some_rows(training)),
        "Training and held-out rows": "\n".join(shared(training)),
        "Memory": memory(training),
    }
    return "\n\n".join(f"{title}\n{text}" if title else text for title, text in parts.items() if text)


def histograms(training: Training) -> Iterator[str]:
    """A line for each kind of text: how many tokens it has, and how many texts are cut."""
    examples, section = training.examples, training.config.data
    kinds = {
        "queries, retriever": (examples.retriever_queries, section.query_len),
        "passages, retriever": (examples.retriever_passages, section.passage_len),
        "passages, generator": (examples.prefixes, section.prompt_passage_len),
        "queries, generator": (examples.prompt_queries, section.prompt_query_len),
        "answers, generator": (examples.answers, section.answer_len),
    }
    for name, (ragged, most) in kinds.items():
        if ragged is not None and len(ragged):
            lengths = ragged.lengths
            low, middle, high, top = np.percentile(lengths, (0, 50, 95, 100)).astype(int)
            full = float((lengths >= most).mean())
            yield (
                f"  {name:<20} {bars(lengths, most)}  at least {low}, median {middle}, 95% up to {high}, at most {top} "
                f"of {most}" + (f"; {full:.1%} fill it or are cut" if full else "")
            )


def bars(lengths: np.ndarray, most: int) -> str:
    """A histogram of lengths from 0 to `most` on one line."""
    counts, _ = np.histogram(np.minimum(lengths, most), BINS, (0, most))
    heights = np.ceil(counts / max(counts.max(), 1) * (len(BARS) - 1)).astype(int)
    return f"|{''.join(BARS[height] for height in heights)}|"


def some_rows(training: Training) -> Iterator[str]:
    """Rows spread over the file, every token of them made a text again."""
    examples, opened = training.examples, training.opened
    retriever, prompt = opened.retriever_text, opened.prompt
    for row in sorted(set(np.linspace(0, len(examples) - 1, SHOWN_ROWS).astype(int).tolist())):
        query, own = int(examples.query_key[row]), int(examples.passage_key[row])
        yield f"  row {row + 1}"
        if retriever is not None and examples.retriever_queries is not None and examples.retriever_passages is not None:
            yield f"    query, retriever      {text(retriever.tokenizer, examples.retriever_queries[query])}"
            if own >= 0:
                yield f"    passage, retriever    {text(retriever.tokenizer, examples.retriever_passages[own])}"
        if own < 0:
            yield f"    passage               not known{of_document(examples, row)}"
        if prompt is not None and examples.prefixes is not None and examples.prompt_queries is not None:
            segments: list[Any] = [examples.prefixes[own]] if own >= 0 else []
            segments += [examples.prompt_queries[query]] + ([] if examples.answers is None else [examples.answers[row]])
            yield f"    prompt and answer     {' ┊ '.join(text(prompt.tokenizer, each) for each in segments)}"


def of_document(examples: data.Examples, row: int) -> str:
    key = examples.document_key[row]
    if key < 0:
        return ""
    number = examples.document_passages.lengths[key]
    return f", one of the {number} of document {shown(examples.documents[key])}"


def text(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> str:
    """Tokens as a text, special ones among them, on one line."""
    read = tokenizer.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return shown(f"␣{read[1:]}" if read.startswith(" ") else read)


def shown(whole: str) -> str:
    cut = whole if len(whole) <= HEAD + TAIL else f"{whole[:HEAD]} [...] {whole[-TAIL:]}"
    return untrusted.shown(cut.replace("\\", "\\\\").replace("\n", "\\n"))


def shared(training: Training) -> Iterator[str]:
    """What the rows of data.train and of data.eval have in common, and copies within the former."""
    examples, held_out = training.examples, training.eval_rows
    repeated = len(examples) - len(set(zip(examples.query_key.tolist(), examples.passage_key.tolist(), strict=True)))
    yield f"  {repeated:,} of {len(examples):,} training rows repeat the query and passage of another"
    if held_out is None:
        yield "  no held-out rows to compare with (data.eval, eval.every_steps)"
        return
    for what, ours, found in (
        ("queries of held-out rows are those", examples.queries, overlap.queries(examples, held_out.examples)),
        (
            "passages of held-out rows are those",
            overlap.own_passages(examples),
            overlap.passages(examples, held_out.examples),
        ),
    ):
        nearly = int(copies.like_any(found.others, sorted(set(ours))).sum())
        warning = "; what is measured on them is partly memory" if found.same + found.alike + nearly else ""
        yield (
            f"  {found.same:,} of {found.of:,} {what} of training rows too, {found.alike:,} more but for case, "
            f"punctuation and articles, {nearly:,} more nearly{warning}"
        )


def memory(training: Training) -> str:
    """Bytes a device by the formulas that choose how much is read at a time; `rag_jax.plan` asks the compiler."""
    config, devices = training.config, training.mesh.devices.size

    def count(tree: Any) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    held = TRAINED * count(training.state.params) + FROZEN * count(training.state.frozen)
    shape = training.batching.shapes[-1]
    rows = config.batch_size // devices
    slots = rows * (1 + config.objective.negatives)
    kept = 0.0
    for role, graph in (("retriever", training.opened.model.retriever), ("generator", training.opened.model.generator)):
        source = training.opened.sources.get(role)
        if graph is None or source is None:
            continue
        if role == "retriever":
            tokens = rows * shape.query + slots * shape.passage
        else:
            tokens = slots * shape.prefix + rows * config.objective.candidates * shape.suffix
        if tokens:
            kept += flops.kept_bytes(pair.model_config(config, role, source), tokens)
    return (
        f"  weights, gradients and moments {size(held / devices)} a device, and about {size(kept)} for the backward "
        "pass of a step that reads all at once; python -m rag_jax.plan compiles the step and tells all of it"
    )


def size(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
