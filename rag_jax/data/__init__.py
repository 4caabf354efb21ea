"""Rows to tokenised segments to fixed-shape numpy batches, in an order that is a function of (seed, step)."""

from rag_jax.data.batches import (
    Batch,
    Batching,
    Known,
    Pool,
    collate,
    fill_slots,
    given_scores,
    iterate,
    lengths,
    order,
    padding_share,
    shape_of,
)
from rag_jax.data.examples import Examples, Gaps, Report, fingerprint, load_examples, take
from rag_jax.data.rows import Rows, columns_of, read_passages, read_rows, read_sources
from rag_jax.data.segments import (
    Prompt,
    Ragged,
    RetrieverText,
    WholeString,
    answer_segments,
    joined,
    pad,
    prompt_segments,
    retriever_tokens,
)
from rag_jax.data.shapes import TEXTS, Blocks, Lengths, Packed, buckets, longest

__all__ = [
    "Batch", "Batching", "Blocks", "Examples", "Gaps", "Known", "Lengths", "Packed", "Pool", "Prompt", "Ragged",
    "Report", "RetrieverText", "Rows", "TEXTS", "WholeString", "answer_segments", "buckets", "collate", "columns_of",
    "fill_slots", "fingerprint", "given_scores", "iterate", "joined", "lengths", "load_examples", "longest", "order",
    "pad", "padding_share", "prompt_segments", "read_passages", "read_rows", "read_sources", "retriever_tokens",
    "shape_of", "take",
]  # fmt: skip
