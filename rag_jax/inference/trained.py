"""A pair of models at work: embeddings, the nearest passages, answers, and how likely given answers are.

**n** texts, **M** passages of the corpus, **K** candidates, **E** embedding width.
"""

import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from rag_jax import data, files, losses, untrusted
from rag_jax.data import segments
from rag_jax.errors import UserError
from rag_jax.inference import answering, decoding, disk_index, evidence, likelihood, search
from rag_jax.pair import Pair
from rag_jax.progress import Counter

# Questions that are answered at a time, and tokens after which it is told how far they have come.
BATCH_SIZE = 8
TOKENS_AT_A_TIME = 4


class Retrieved(NamedTuple):
    """A passage and its cosine with the question."""

    passage: str
    score: float


class Answer(NamedTuple):
    """An answer and the passages it was read from, nearest first; `log_prob` is the marginal over them, in nats."""

    answer: str
    passages: tuple[str, ...]
    cosine: Float[np.ndarray, " K"]  # of question and passage
    doc_probs: Float[np.ndarray, " K"]  # p(k | q), before the answer is known
    evidence: Float[np.ndarray, " K"]  # each passage's share in the answer
    log_prob: float  # log p(answer | q), end-of-sequence included
    num_tokens: int


class Part(NamedTuple):
    """What is known of an answer while it is decoded: the passages that are read, and its beginning."""

    answer: str
    passages: tuple[str, ...]
    cosine: Float[np.ndarray, " K"]
    doc_probs: Float[np.ndarray, " K"]


class Score(NamedTuple):
    """How likely a given answer is: log p(answer | q) in nats, end-of-sequence included, over so many tokens."""

    log_prob: float
    num_tokens: int


class _Found(NamedTuple):
    """What is read for some questions: their nearest passages, tokenised, each distinct one once."""

    cosine: Float[np.ndarray, "n K"]
    passages: Int[np.ndarray, "n K"]  # of the corpus
    place: Int[np.ndarray, "n K"]  # of each among `prefixes`
    prefixes: data.Ragged
    queries: data.Ragged


class _Batch(NamedTuple):
    """Questions that are answered together, of a size that few programs know; the first `real` of them are asked."""

    real: int
    passages: Int[np.ndarray, "n K"]  # of the corpus
    cosine: Float[np.ndarray, "n K"]
    doc_probs: Float[np.ndarray, "n K"]
    asked: answering.Asked


class Trained:
    """A retriever and a generator as a run left them, either of which may be missing. `rag_jax.load` makes one.

    Texts are read as in training: same prefixes, prompt, pooling and lengths. What is too long is cut.
    """

    def __init__(self, opened: Pair, params: dict[str, Any], step: int):
        self.opened, self.params, self.step = opened, params, step
        self.passages: tuple[str, ...] = ()
        self._passage_emb: Any = np.zeros((0, 0), np.float32)  # (M, E), wherever it is searched

    def embed_queries(self, texts: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """Normalised embeddings of questions."""
        text = self._retriever_text()
        return self._embed(_checked(texts, "questions"), text.query_prefix, text.query_len, "questions")

    def embed_passages(self, texts: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """Normalised embeddings of passages."""
        text = self._retriever_text()
        return self._embed(_checked(texts, "passages"), text.passage_prefix, text.passage_len, "passages")

    def use(self, passages: Iterable[str]) -> bool:
        """Answer from these passages from now on, each distinct one once; whether their embeddings were kept before.

        They are kept on disk under a hash of all that they depend on.
        """
        text, model = self._retriever_text(), self.opened.model
        passages = passages if isinstance(passages, str) else list(passages)
        distinct = tuple(dict.fromkeys(_checked(passages, "passages")))

        def make() -> files.Arrays:
            tokens, _ = data.retriever_tokens(text.tokenizer, distinct, text.passage_prefix, text.passage_len)
            batch_size = min(self.opened.config.eval.batch_size, len(distinct))
            return {"emb": search.embed(model, self.params, tokens, batch_size=batch_size, label="passages")}

        architecture = repr(self.opened.sources["retriever"].model_config)
        reads = [files.tokenizer_key(text.tokenizer), text.passage_prefix, text.passage_len]
        weights = disk_index.retriever_key(model, self.params)
        key = files.content_key("embeddings", weights, architecture, reads, distinct)
        arrays, were_kept = files.cached(key, make, "embeddings of passages")
        self.passages, self._passage_emb = distinct, search.placed(arrays["emb"])
        return were_kept

    def index(
        self, passages: Sequence[str], folder: str | os.PathLike[str], dtype: str = "float32",
        sources: Mapping[str, str] | None = None,
    ) -> disk_index.Index:  # fmt: skip
        """An index of these passages in a folder; one that was begun there goes on. `sources`: where they come from.

        UserError for a folder that holds something else.
        """
        text, path = self._retriever_text(), pathlib.Path(folder)
        distinct = list(dict.fromkeys(_checked(passages, "passages")))
        tokens, _ = data.retriever_tokens(text.tokenizer, distinct, text.passage_prefix, text.passage_len)
        batch_size = min(self.opened.config.eval.batch_size, len(distinct))
        made = disk_index.build(path, self.opened.model, self.params, tokens, batch_size=batch_size, dtype=dtype)
        disk_index.write_passages(path, distinct, sources or {})
        return made

    def use_index(self, index: disk_index.Index | str | os.PathLike[str]) -> None:
        """Answer from the passages of an index from now on. UserError unless this retriever made it."""
        if not isinstance(index, disk_index.Index):
            index = disk_index.opened(pathlib.Path(index))
        if index.facts.get("retriever") != disk_index.retriever_key(self.opened.model, self.params):
            raise UserError(f"{index.folder}: was made by another retriever, or at another step; make it again")
        self.passages, self._passage_emb = index.passages, index

    def retrieve(self, questions: Sequence[str], k: int = 5, *, rerank: int = 0) -> list[list[Retrieved]]:
        """The k passages of highest cosine to each question, best first.

        `rerank`: of so many, the k behind which the generator finds the question most likely, the likeliest first.
        """
        self._check_in_use()
        if not 1 <= k <= len(self.passages):
            raise UserError(f"k={k}: must be from 1 to the number of passages in use, {len(self.passages)}")
        cosine, nearest = self._nearest(_checked(questions, "questions"), k, rerank)
        return [
            [Retrieved(self.passages[i], float(score)) for i, score in zip(*row, strict=True)]
            for row in zip(nearest, cosine, strict=True)
        ]

    def answer(self, questions: Sequence[str]) -> list[Answer]:
        """The likeliest answers, each from the objective's K nearest passages, or all where there are fewer.

        Greedy and with the objective's own likelihood, as the command `ask` without further flags.
        """
        return list(self.answers(questions))

    def answers(
        self,
        questions: Sequence[str],
        how: answering.Decoding | None = None,
        *,
        candidates: int | None = None,
        seed: int = 0,
        rerank: int = 0,
    ) -> Iterator[Answer]:
        """`answer`, one after the other as they are found; `how`, from how many `candidates`, and the seed of sampling.

        `rerank` as in `retrieve`.

        All shapes are of the config or even shares of those: few programs, whatever is asked.
        """
        for batch in self._batches(questions, how, candidates, seed, rerank):
            decoded = answering.answers(self.opened.model, self.params, batch.asked)
            yield from (self._answer(batch, decoded, i) for i in range(batch.real))

    def stream(
        self,
        questions: Sequence[str],
        how: answering.Decoding | None = None,
        *,
        candidates: int | None = None,
        seed: int = 0,
        rerank: int = 0,
    ) -> Iterator[tuple[int, Part | Answer]]:
        """`answers` while they are found: the number of a question and what is known so far, at last its `Answer`.

        Beams and RAG-Sequence compare whole answers: of those the passages are told at once, the text at the end.
        """
        tokenizer, start = self._prompt().tokenizer, 0
        for batch in self._batches(questions, how, candidates, seed, rerank):
            said: list[str | None] = [None] * batch.real
            told: Any = np.zeros((batch.real, 0), np.int32)
            parts = answering.stream(self.opened.model, self.params, batch.asked, at_a_time=TOKENS_AT_A_TIME)
            while not isinstance(told, answering.Answers):
                for i, before in enumerate(said):
                    text = decoding.text(tokenizer, told[i])
                    # A character of several tokens is shown when it is whole.
                    if text != before and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                        said[i] = text
                        yield start + i, Part(text, self._read_by(batch, i), batch.cosine[i], batch.doc_probs[i])
                told = next(parts)
            yield from ((start + i, self._answer(batch, told, i)) for i in range(batch.real))
            start += batch.real

    def score(self, questions: Sequence[str], answers: Sequence[str]) -> list[Score]:
        """How likely each answer is to the question beside it, from the question's own K nearest passages."""
        self._check_in_use()
        prompt, model = self._prompt(), self.opened.model
        asked, given = _checked(questions, "questions"), _checked(answers, "answers")
        if len(asked) != len(given):
            raise UserError(f"{len(asked)} questions and {len(given)} answers; give one answer a question")
        tokens = data.answer_segments(prompt, given)
        if (longest := int(tokens.lengths.max())) > prompt.answer_len:
            text = untrusted.short(given[int(tokens.lengths.argmax())])
            raise UserError(f"the answer {text} has {longest} tokens, more than data.answer_len={prompt.answer_len}")
        found = self._find(asked, model.objective.candidates)
        num_read = found.cosine.shape[1]
        row = np.repeat(np.arange(len(asked)), num_read)
        pairs = likelihood.Pairs(found.prefixes, found.queries, tokens, found.place.ravel(), row, row)
        at_a_time = min(self.opened.config.eval.batch_size, len(asked)) * num_read
        with Counter("answers", len(pairs), active=jax.process_index() == 0) as counter:
            by_pair = likelihood.answer_log_probs(model, self.params, pairs, at_a_time=at_a_time, counter=counter)
        token_log_probs = jnp.asarray(by_pair.reshape(*found.cosine.shape, -1))
        mask = jnp.arange(token_log_probs.shape[-1]) < tokens.lengths[:, None]
        doc_log_probs = model.objective.doc_log_probs(found.cosine)
        log_probs = losses.log_marginal(model.objective.formula.likelihood, doc_log_probs, token_log_probs, mask)
        return [Score(float(value), int(num)) for value, num in zip(log_probs, tokens.lengths, strict=True)]

    def _batches(
        self, questions: Sequence[str], how: answering.Decoding | None, candidates: int | None, seed: int, rerank: int
    ) -> Iterator[_Batch]:
        self._check_in_use()
        config, prompt, model = self.opened.config, self._prompt(), self.opened.model
        own = model.objective.formula.likelihood
        how = how or answering.Decoding(own, config.data.answer_len, segments.eos_id(prompt.tokenizer))
        asked = _checked(questions, "questions")
        size = min(BATCH_SIZE, 1 << (len(asked) - 1).bit_length())
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            filled = [*part, *part[:1] * (size - len(part))]
            found = self._find(filled, candidates or config.objective.candidates, rerank)
            most = search.size_for(len(found.prefixes), found.place.size)
            prefix_len = search.size_for(int(found.prefixes.lengths.max()), prompt.passage_len)
            query_len = search.size_for(int(found.queries.lengths.max()), prompt.query_len)
            doc_log_probs = np.asarray(model.objective.doc_log_probs(found.cosine))
            reads = answering.Asked(
                segments.pad(found.prefixes, np.arange(most) % len(found.prefixes), prefix_len),
                segments.pad(found.queries, np.arange(size), query_len),
                found.place,
                doc_log_probs,
                how,
                answering.question_keys(seed, filled),
                prompt.passage_len + prompt.query_len + how.num_tokens,
            )
            yield _Batch(len(part), found.passages, found.cosine, np.exp(doc_log_probs), reads)

    def _read_by(self, batch: _Batch, i: int) -> tuple[str, ...]:
        """The passages that question i of a batch reads."""
        return tuple(self.passages[passage] for passage in batch.passages[i])

    def _answer(self, batch: _Batch, decoded: answering.Answers, i: int) -> Answer:
        return Answer(
            decoding.text(self._prompt().tokenizer, decoded.ids[i]),
            self._read_by(batch, i),
            batch.cosine[i],
            batch.doc_probs[i],
            decoded.evidence[i],
            float(decoded.log_probs[i]),
            int(decoded.mask[i].sum()),
        )

    def _nearest(
        self, asked: list[str], k: int, rerank: int
    ) -> tuple[Float[np.ndarray, "n K"], Int[np.ndarray, "n K"]]:
        """Cosines and indices of the passages to read, the best first; see `retrieve`."""
        cosine, nearest = disk_index.top_k(self.embed_queries(asked), self._passage_emb, max(k, rerank))
        if rerank:
            used, place = np.unique(nearest, return_inverse=True)
            (prefixes, _), (queries, _) = data.prompt_segments(self._prompt(), [self.passages[i] for i in used], asked)
            at_a_time = self.opened.config.eval.batch_size * k
            places = place.reshape(nearest.shape)
            order = evidence.by_question(self.opened.model, self.params, prefixes, queries, places, at_a_time)
            cosine, nearest = (np.take_along_axis(a, order[:, :k], axis=1) for a in (cosine, nearest))
        return cosine, nearest

    def _find(self, asked: list[str], k: int, rerank: int = 0) -> _Found:
        cosine, nearest = self._nearest(asked, k, rerank)
        used, place = np.unique(nearest, return_inverse=True)
        texts = [self.passages[i] for i in used]
        (prefixes, _), (queries, _) = data.prompt_segments(self._prompt(), texts, asked)
        self._check_tokens("generator", asked, queries)
        return _Found(cosine, nearest, place.reshape(nearest.shape).astype(np.int32), prefixes, queries)

    def _embed(self, texts: list[str], prefix: str, longest: int, what: str) -> Float[np.ndarray, "n E"]:
        batch_size = self.opened.config.eval.batch_size
        # A power of two of them: whatever is asked, few shapes are compiled.
        filled = min(1 << (len(texts) - 1).bit_length(), max(batch_size, len(texts)))
        many = [*texts, *texts[:1] * (filled - len(texts))]
        tokens, _ = data.retriever_tokens(self._retriever_text().tokenizer, many, prefix, longest)
        self._check_tokens("retriever", many, tokens)
        size = {"batch_size": batch_size, "longest": longest}
        return search.embed(self.opened.model, self.params, tokens, label=what, **size)[: len(texts)]

    def _check_tokens(self, role: str, texts: Sequence[str], tokens: data.Ragged) -> None:
        if not tokens.lengths.all():
            text, path = texts[int(tokens.lengths.argmin())], self.opened.config[role].path
            raise UserError(f"{untrusted.short(text)} has no tokens for {role}.path={path!r}; leave it out")

    def _check_in_use(self) -> None:
        self._retriever_text()
        if not self.passages:
            raise UserError("no passages in use; call use(passages) first")

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
