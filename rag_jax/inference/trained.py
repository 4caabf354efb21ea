"""A trained pair, asked from Python: embeddings, the nearest passages, answers, and how likely given answers are.

**n** texts, **K** candidates, **E** embedding width.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rag_jax import data, losses, untrusted
from rag_jax.data import segments
from rag_jax.errors import UserError
from rag_jax.inference import answering, likelihood, search

# Questions that are answered at a time.
BATCH_SIZE = 8


class Retrieved(NamedTuple):
    """A passage and its cosine with the question."""

    passage: str
    score: float


class Answer(NamedTuple):
    """An answer and the passages it was read from, nearest first; `log_prob` is the marginal over them, in nats."""

    answer: str
    passages: tuple[str, ...]
    doc_probs: Float[np.ndarray, " K"]  # p(k | q), before the answer is known
    evidence: Float[np.ndarray, " K"]  # each passage's share in the answer
    log_prob: float  # log p(answer | q), end-of-sequence included
    num_tokens: int


class Score(NamedTuple):
    """How likely a given answer is: log p(answer | q) in nats, end-of-sequence included, over so many tokens."""

    log_prob: float
    num_tokens: int


class Trained:
    """A retriever and a generator as a run left them, either of which may be missing. `rag_jax.load` makes one.

    Texts are read as in training: same prefixes, prompt, pooling and lengths. What is too long is cut.
    """

    def __init__(self, opened: Any, params: dict, step: int):
        self.opened, self.params, self.step = opened, params, step
        self._corpus: answering.Answerer | None = None

    def embed_queries(self, texts: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """Normalised embeddings of questions."""
        text = self._retriever_text()
        return self._embed(_checked(texts, "questions"), text.query_prefix, text.query_len, "questions")

    def embed_passages(self, texts: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """Normalised embeddings of passages."""
        text = self._retriever_text()
        return self._embed(_checked(texts, "passages"), text.passage_prefix, text.passage_len, "passages")

    def use(self, passages: Iterable[str]) -> None:
        """Answer from these passages from now on, each distinct one once. Embeddings are kept on disk and reused."""
        self._retriever_text()
        passages = passages if isinstance(passages, str) else list(passages)
        distinct = tuple(dict.fromkeys(_checked(passages, "passages")))
        emb, _ = answering.corpus_emb(self.opened, self.params, distinct)
        self._corpus = answering.Answerer(self.opened, self.params, self.step, distinct, emb)

    def retrieve(self, questions: Sequence[str], k: int = 5) -> list[list[Retrieved]]:
        """The k passages of highest cosine to each question, best first."""
        passages = self._in_use().passages
        if not 1 <= k <= len(passages):
            raise UserError(f"k={k}: must be from 1 to the number of passages in use, {len(passages)}")
        cosine, found = self._nearest(_checked(questions, "questions"), k)
        return [
            [Retrieved(passages[i], float(score)) for i, score in zip(*row, strict=True)]
            for row in zip(found, cosine, strict=True)
        ]

    def answer(self, questions: Sequence[str]) -> list[Answer]:
        """The likeliest answers, each from the objective's K nearest passages, or all where there are fewer.

        Greedy and with the objective's own likelihood, as the command `ask` without further flags.
        """
        corpus, tokenizer = self._in_use(), self._prompt().tokenizer
        asked, config = _checked(questions, "questions"), self.opened.config
        decoding = answering.Decoding(
            likelihood=self.opened.model.objective.formula.likelihood,
            num_tokens=config.data.answer_len,
            eos_id=segments.eos_id(tokenizer),
        )
        size = min(BATCH_SIZE, len(asked))
        settings = answering.Settings(decoding, config.objective.candidates, size, seed=0)
        parts = [asked[start : start + size] for start in range(0, len(asked), size)]
        return [_answer(record) for part in parts for record in answering.ask(corpus, part, settings)]

    def score(self, questions: Sequence[str], answers: Sequence[str]) -> list[Score]:
        """How likely each answer is to the question beside it, from the question's own K nearest passages."""
        corpus, prompt, model = self._in_use(), self._prompt(), self.opened.model
        asked, given = _checked(questions, "questions"), _checked(answers, "answers")
        if len(asked) != len(given):
            raise UserError(f"{len(asked)} questions and {len(given)} answers; give one answer a question")
        tokens = data.answer_segments(prompt, given)
        if (longest := int(tokens.lengths.max())) > prompt.answer_len:
            text = untrusted.short(given[int(tokens.lengths.argmax())])
            raise UserError(f"the answer {text} has {longest} tokens, more than data.answer_len={prompt.answer_len}")
        cosine, found = self._nearest(asked, model.objective.candidates)
        used, prefix = np.unique(found, return_inverse=True)
        (prefixes, _), (queries, _) = data.prompt_segments(prompt, [corpus.passages[i] for i in used], asked)
        row = np.repeat(np.arange(len(asked)), found.shape[1])
        pairs = likelihood.Pairs(prefixes, queries, tokens, prefix.ravel(), row, row)
        at_a_time = min(self.opened.config.eval.batch_size, len(asked)) * found.shape[1]
        by_pair = likelihood.answer_log_probs(model, self.params, pairs, at_a_time=at_a_time, label="answers")
        token_log_probs = jnp.asarray(by_pair.reshape(*found.shape, -1))
        mask = jnp.arange(token_log_probs.shape[-1]) < tokens.lengths[:, None]
        doc_log_probs = losses.doc_log_probs(jnp.asarray(cosine) / model.objective.marginal_temperature)
        log_probs = losses.log_marginal(model.objective.formula.likelihood, doc_log_probs, token_log_probs, mask)
        return [Score(float(value), int(num)) for value, num in zip(log_probs, tokens.lengths, strict=True)]

    def _embed(self, texts: list[str], prefix: str, longest: int, what: str) -> Float[np.ndarray, "n E"]:
        batch_size = self.opened.config.eval.batch_size
        # A power of two of them: whatever is asked, few shapes are compiled.
        filled = min(1 << (len(texts) - 1).bit_length(), max(batch_size, len(texts)))
        many = [*texts, *texts[:1] * (filled - len(texts))]
        tokens, _ = data.retriever_tokens(self._retriever_text().tokenizer, many, prefix, longest)
        if not tokens.lengths.all():
            raise UserError(f"{what}: {many[int(tokens.lengths.argmin())]!r} has no tokens for the retriever")
        size = {"batch_size": batch_size, "longest": longest}
        return search.embed(self.opened.model, self.params, tokens, label=what, **size)[: len(texts)]

    def _nearest(self, questions: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and indices (n, K) of the nearest passages."""
        return search.top_k(self.embed_queries(questions), self._in_use().passage_emb, k)

    def _in_use(self) -> answering.Answerer:
        self._retriever_text()
        if self._corpus is None:
            raise UserError("no passages in use; call use(passages) first")
        return self._corpus

    def _retriever_text(self) -> data.RetrieverText:
        if self.opened.retriever_text is None:
            raise UserError("there is no retriever (retriever.path=None); load a run that has one")
        return self.opened.retriever_text

    def _prompt(self) -> data.Prompt:
        if self.opened.prompt is None:
            raise UserError("there is no generator (generator.path=None); load a run that has one")
        return self.opened.prompt


def _checked(texts: Sequence[Any], what: str) -> list[str]:
    """The texts as a list; UserError unless there is one and all of them say something."""
    if isinstance(texts, str):
        raise UserError(f"{what}: give a list of texts, not one text")
    if not len(texts):
        raise UserError(f"{what}: the list is empty; give at least one text")
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip() or not untrusted.is_unicode(text):
            raise UserError(f"{what}: {untrusted.short(text)} (number {number}) is not a text; leave it out")
    return list(texts)


def _answer(record: dict[str, Any]) -> Answer:
    """From the record of one question."""
    read = record["passages"]
    doc_probs, evidence = (np.array([row[name] for row in read], np.float32) for name in ("probability", "evidence"))
    passages = tuple(row["passage"] for row in read)
    return Answer(record["answer"], passages, doc_probs, evidence, record["log_prob"], record["tokens"])
