"""Sampling, beams and RAG-Sequence against enumeration of every answer, numpy's distributions and `transformers`."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_decoding import CONFIGS, EOS, LP, LQ, TORCH, from_torch, padded, texts

from rag_jax import losses, models, rag
from rag_jax.inference import answering, decoding, programs

# Few enough answers to try all of them: of tokens 0, 1 (the end), 2 and 3, at most three.
FEW, SHORT = 4, 3
TINY = models.LlamaConfig(
    FEW, 2, 4, 2, 8, 32, 48, 64, 1e-5, 1e4, None, "silu", False, False, False, False, False, None, 0.0
)
ALL = [
    answer + end
    for n in range(SHORT)
    for answer in itertools.product((0, 2, 3), repeat=n)
    for end in ([(EOS,)] if n < SHORT - 1 else [(token,) for token in range(FEW)])
]


def lively(config, seed):
    """A random model whose distributions are far from flat, as (Rag, params, its plain forward pass)."""
    graphdef, state = nnx.split(config.build(nnx.Rngs(seed)))
    params = jax.tree.map(lambda a: a * 4 if a.ndim > 1 else a, nnx.to_pure_dict(state))
    module = nnx.merge(graphdef, params)
    forward = jax.jit(lambda ids, mask: jax.nn.log_softmax(module.logits(module(ids, mask))))
    model = rag.Rag(rag.Objective("token", 1, 1.0, 1.0, 0.0, 1.0), None, graphdef, "mean", 1)
    return model, {"generator": params}, forward


class Case:
    """Two queries that read three passages each; what every passage says to every answer, one string at a time."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.model, self.params, forward = lively(TINY, seed)
        draw = rng.integers
        self.passages = [draw(0, FEW, draw(3, LP + 1)).tolist() for _ in range(4)]
        self.queries = [draw(0, FEW, draw(1, LQ + 1)).tolist() for _ in range(2)]
        self.candidates = np.stack([rng.permutation(4)[:3] for _ in self.queries]).astype(np.int32)
        self.doc = np.asarray(jax.nn.log_softmax(rng.normal(size=(2, 3)).astype(np.float32)))
        self.token_log_probs = np.zeros((2, len(ALL), 3, SHORT))  # (B, answers, K, T), 0 behind the end
        for b, k in np.ndindex(2, 3):
            prompt = self.passages[self.candidates[b, k]] + self.queries[b]
            strings = [prompt + list(answer) for answer in ALL]
            found = np.asarray(forward(*padded(strings, LP + LQ + SHORT)), np.float64)
            for i, answer in enumerate(ALL):
                for t, token in enumerate(answer):
                    self.token_log_probs[b, i, k, t] = found[i, len(prompt) + t - 1, token]
        self.length = np.array([len(answer) for answer in ALL])
        self.mask = np.arange(SHORT) < self.length[:, None]
        doc = self.doc.astype(np.float64)
        mixed = np.log(np.einsum("bk,bakt->bat", np.exp(doc), np.exp(self.token_log_probs)))
        whole = np.exp(self.token_log_probs.sum(axis=-1))
        self.log_probs = {
            "token": np.where(self.mask, mixed, 0).sum(axis=-1),
            "sequence": np.log(np.einsum("bk,bak->ba", np.exp(doc), whole)),
        }

    def asked(self, decoding, rows=(0, 1), **options):
        rows = list(rows)
        prefix, query = padded(self.passages, LP), padded([self.queries[b] for b in rows], LQ)
        return answering.Asked(prefix, query, self.candidates[rows], self.doc[rows], decoding, **options)

    def answers(self, decoding, rows=(0, 1), **options):
        return answering.answers(self.model, self.params, self.asked(decoding, rows, **options))


@pytest.fixture(scope="module")
def case():
    return Case(7)


def beams_of(generator, passages, queries, candidates, doc, **options):
    """`generate.beam` from texts, in numpy."""
    prefix, query = padded(passages, LP), padded(queries, LQ)
    candidates = jnp.asarray(candidates, jnp.int32)

    @jax.jit
    def found(doc):
        reading = decoding.read(generator, prefix, query, candidates, num_slots=LP + LQ + options["num_tokens"])
        return decoding.beam(generator, reading, doc, **{"eos_id": EOS, **options})

    return map(np.asarray, found(jnp.asarray(doc)))


def strategy(name, **options):
    return answering.Decoding(name, SHORT, EOS, **options)


def upto_eos(ids, eos_id=EOS):
    ids = ids.tolist()
    return tuple(ids[: ids.index(eos_id) + 1] if eos_id in ids else ids)


def test_the_answers_are_all_there_are(case):
    for name in ("token", "sequence"):
        np.testing.assert_allclose(np.exp(case.log_probs[name]).sum(axis=1), 1.0, atol=1e-5)
    best = {name: case.log_probs[name].argmax(axis=1) for name in ("token", "sequence")}
    alone = case.token_log_probs.sum(axis=-1).argmax(axis=1)  # (B, K)
    assert (best["token"] != best["sequence"]).any(), "the case tells token from sequence"
    assert (alone != best["sequence"][:, None]).any(axis=1).all(), "and the mixture from its passages"


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_wide_beams_find_the_best_of_all_answers_in_their_order(case, length_penalty):
    W = 16  # the nine beginnings of two tokens all go on
    generator = case.model.model("generator", case.params)
    options = {"num_beams": W, "length_penalty": length_penalty, "num_tokens": SHORT}
    found, scores = beams_of(generator, case.passages, case.queries, case.candidates, case.doc, **options)
    expected = case.log_probs["token"] / case.length**length_penalty
    for b in range(2):
        order = np.argsort(-expected[b])[:W]
        assert [upto_eos(ids) for ids in found[b]] == [ALL[i] for i in order]
        np.testing.assert_allclose(scores[b], expected[b][order], atol=1e-4)


@pytest.mark.parametrize("name", ["token", "sequence"])
def test_the_best_answer_its_likelihood_and_its_evidence(case, name):
    """By beams so wide that nothing is missed."""
    found = case.answers(strategy(name, num_beams=40))
    for b in range(2):
        best = int(case.log_probs[name][b].argmax())
        assert upto_eos(found.ids[b]) == ALL[best]
        np.testing.assert_allclose(found.log_probs[b], case.log_probs[name][b, best], atol=1e-4)
        joint = case.doc[b][:, None] + case.token_log_probs[b, best][:, case.mask[best]]  # (K, T)
        if name == "sequence":
            joint = joint.sum(axis=1, keepdims=True) - (case.length[best] - 1) * case.doc[b][:, None]
        share = np.exp(joint) / np.exp(joint).sum(axis=0)
        np.testing.assert_allclose(found.evidence[b], share.mean(axis=1), atol=1e-4)


@pytest.mark.parametrize("W", [1, 2])
def test_few_beams_of_every_passage_and_the_best_of_their_union(case, W):
    found = case.answers(strategy("sequence", num_beams=W))
    generator = case.model.model("generator", case.params)
    pairs = [(case.passages[passage], b) for b in range(2) for passage in case.candidates[b]]
    alone, _ = beams_of(
        generator, [p for p, _ in pairs], [case.queries[b] for _, b in pairs], np.arange(6)[:, None], np.zeros((6, 1)),
        num_beams=W, length_penalty=0.0, num_tokens=SHORT,
    )  # fmt: skip
    for b in range(2):
        union = {upto_eos(ids) for ids in alone[3 * b : 3 * b + 3].reshape(-1, SHORT)}
        scores = {answer: case.log_probs["sequence"][b, ALL.index(answer)] for answer in union}
        assert upto_eos(found.ids[b]) == max(scores, key=scores.__getitem__)
        np.testing.assert_allclose(found.log_probs[b], max(scores.values()), atol=1e-4)


@pytest.mark.parametrize(("name", "length_penalty"), [("llama", 1.0), ("gpt2", 0.0)])
def test_one_passage_is_beam_search_of_transformers(name, length_penalty):
    torch = pytest.importorskip("torch")
    torch.manual_seed(3)
    theirs, W, T = TORCH[name]().eval(), 3, 9
    config = CONFIGS[name]
    graphdef, _ = models.abstract(config)
    generator = nnx.merge(graphdef, from_torch(name, theirs.state_dict()))
    rng = np.random.default_rng(0)
    passages, queries = texts(rng, 3, LP, 4), texts(rng, 1, LQ, 6)
    candidates = rng.integers(0, 4, (6, 1)).astype(np.int32)
    prompts = [torch.tensor([passages[c] + query]) for (c,), query in zip(candidates, queries, strict=True)]
    with torch.no_grad():  # an end that is met: what is likeliest behind some of the prompts
        eos_id = int(theirs(prompts[0]).logits[0, -1].argmax())
    ids, scores = beams_of(
        generator, passages, queries, candidates, np.zeros((6, 1)), num_beams=W, length_penalty=length_penalty,
        num_tokens=T, eos_id=eos_id,
    )  # fmt: skip
    ended = 0
    for row, prompt in enumerate(prompts):
        found = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=T, num_beams=W,
            num_return_sequences=W, length_penalty=length_penalty, early_stopping="never", eos_token_id=eos_id,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        expected = [upto_eos(sequence, eos_id) for sequence in found.sequences[:, prompt.shape[1] :]]
        assert [upto_eos(sequence, eos_id) for sequence in ids[row]] == expected
        np.testing.assert_allclose(scores[row], found.sequences_scores.numpy(), atol=1e-4)
        ended += sum(sequence[-1] == eos_id for sequence in expected)
    assert 0 < ended < 6 * W, "some ended, some did not"


@pytest.mark.parametrize(
    ("name", "how"), [("llama", "greedy"), ("llama", "sequence"), ("gpt2", "sampled"), ("mistral", "beams")]
)
def test_training_scores_an_answer_as_decoding_did(name, how):
    """With `rag.answer_log_probs` and the losses, by shared prefixes, without a cache."""
    T, K = 6, 3
    model, params, _ = lively(CONFIGS[name], 1)
    rng = np.random.default_rng(1)
    passages, queries = texts(rng, 3, LP, 4), texts(rng, 1, LQ, 3)
    candidates = np.stack([rng.permutation(4)[:K] for _ in queries]).astype(np.int32)
    doc = np.asarray(jax.nn.log_softmax(rng.normal(size=(3, K)).astype(np.float32)))
    options = {"greedy": {}, "sampled": {"temperature": 1.0}, "beams": {"num_beams": 2}, "sequence": {"num_beams": 2}}
    objective = "sequence" if how == "sequence" else "token"
    asked = answering.Asked(
        padded(passages, LP), padded(queries, LQ), candidates, doc,
        answering.Decoding(objective, T, EOS, **options[how]), jax.random.split(jax.random.key(0), 3),
    )  # fmt: skip
    found = answering.answers(model, params, asked)
    suffixes = [
        query + ids[: mask.sum()].tolist() for query, ids, mask in zip(queries, found.ids, found.mask, strict=True)
    ]
    suffix = padded(suffixes, LQ + T)
    start = jnp.asarray([len(query) for query in queries])

    @jax.jit
    def scored(params):
        generator = model.model("generator", params)
        hidden = generator.forward_shared_prefix(padded(passages, LP), suffix, jnp.asarray(candidates))
        return rag.answer_log_probs(generator, hidden, suffix[0], start, jnp.ones(found.ids.shape, bool))

    log_probs = scored(params)
    mask = found.mask[:, None, :]
    np.testing.assert_allclose(np.where(mask, found.token_log_probs, 0), np.where(mask, log_probs, 0), atol=2e-4)
    nll = -losses.log_marginal(objective, jnp.asarray(doc), log_probs, jnp.asarray(found.mask)).sum()
    np.testing.assert_allclose(-found.log_probs.sum(), nll, rtol=1e-4)


def test_evidence_is_what_the_gradient_of_the_likelihood_says():
    """d log p(y | q) / d score_k = r_k - p_k for the sequence, sum_t (r_tk - p_k) for tokens."""
    rng = np.random.default_rng(0)
    scores = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    log_probs = jnp.asarray(rng.normal(size=(3, 4, 5)) * 2, jnp.float32)
    mask = jnp.arange(5) < jnp.asarray([[5], [2], [1]])
    for name in ("token", "sequence"):
        slope = jax.grad(lambda s, n=name: losses.log_marginal(n, losses.doc_log_probs(s), log_probs, mask).sum())(
            scores
        )
        share = losses.evidence(name, losses.doc_log_probs(scores), log_probs, mask)
        per = mask.sum(axis=1, keepdims=True) if name == "token" else 1
        np.testing.assert_allclose(share, slope / per + jax.nn.softmax(scores), atol=1e-5)
        np.testing.assert_allclose(share.sum(axis=1), 1, atol=1e-6)


def chi_square(counts, probs):
    """How many of its standard deviations the statistic lies above its mean."""
    expected = counts.sum() * probs[probs > 0]
    assert (counts[probs == 0] == 0).all()
    freedom = len(expected) - 1
    return (np.sum((counts[probs > 0] - expected) ** 2 / expected) - freedom) / np.sqrt(2 * freedom)


def tempered(probs, temperature, top_p):
    """The fewest likeliest tokens that reach top_p, of the distribution at that temperature, one by one."""
    weights = probs ** (1 / temperature) / np.sum(probs ** (1 / temperature))
    kept, total = np.zeros_like(weights), 0.0
    for token in np.argsort(-weights):
        if total >= top_p:
            break
        kept[token], total = weights[token], total + weights[token]
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.8), (1.7, 0.6)])
def test_draws_follow_temperature_and_nucleus(temperature, top_p):
    probs = np.array([0.05, 0.35, 0.02, 0.2, 0.08, 0.3])
    rows = 4000
    noise = decoding.Noise(jax.random.split(jax.random.key(1), rows), jnp.float32(temperature), jnp.float32(top_p))
    scores = jnp.broadcast_to(jnp.asarray(np.log(probs), jnp.float32), (rows, 6))
    tokens = np.asarray(jax.jit(decoding.choose)(scores, noise, 3))
    counts = np.bincount(tokens, minlength=6)
    assert abs(chi_square(counts, tempered(probs, temperature, top_p))) < 5
    assert abs(chi_square(counts, tempered(probs, temperature * 1.3, 1.0))) > 5 or top_p < 1, "it tells the difference"


def test_the_nucleus_keeps_just_enough():
    rng = np.random.default_rng(0)
    for top_p in (1e-6, 0.3, 0.9, 0.999, 1.0):
        scores = rng.normal(size=(20, 50)).astype(np.float32) * 3
        probs = np.exp(scores.astype(np.float64)) / np.exp(scores.astype(np.float64)).sum(axis=1, keepdims=True)
        kept = np.asarray(decoding.nucleus(jnp.asarray(scores), top_p))
        for row, k in zip(probs, kept, strict=True):
            assert k.sum() == 50 if top_p == 1 else row[k].sum() >= top_p - 1e-6
            assert top_p == 1 or row[k].sum() - row[k].min() < top_p + 1e-6
            assert (~k).sum() == 0 or row[~k].max() < row[k].min()


@pytest.mark.parametrize("name", ["token", "sequence"])
def test_sampled_answers_follow_the_marginal(case, name):
    """RAG-Sequence too: a passage, then an answer from it."""
    rows = 1500
    found = case.answers(
        strategy(name, temperature=1.0), rows=[1] * rows, keys=jax.random.split(jax.random.key(2), rows)
    )
    places = [ALL.index(upto_eos(ids)) for ids in found.ids]
    counts = np.bincount(places, minlength=len(ALL))
    probs = {n: np.exp(case.log_probs[n][1]) for n in ("token", "sequence")}

    def grouped(values, by):  # answers too rare for the statistic are counted as one
        rare = by * rows < 8
        return np.append(values[~rare], values[rare].sum())

    other = "sequence" if name == "token" else "token"
    assert abs(chi_square(grouped(counts, probs[name]), grouped(probs[name], probs[name]))) < 5
    assert chi_square(grouped(counts, probs[other]), grouped(probs[other], probs[other])) > 5
    np.testing.assert_allclose(found.log_probs, case.log_probs[name][1][places], atol=1e-4)


def test_little_heat_is_none(case):
    keys = jax.random.split(jax.random.key(0), 2)
    greedy = case.answers(strategy("token"))
    for options in ({"temperature": 1e-4}, {"temperature": 3.0, "top_p": 1e-6}):
        np.testing.assert_array_equal(case.answers(strategy("token", **options), keys=keys).ids, greedy.ids)
    assert (case.answers(strategy("token", temperature=3.0), keys=keys).ids != greedy.ids).any()


@pytest.mark.parametrize("name", ["token", "sequence"])
def test_what_a_row_draws_does_not_depend_on_the_others(case, name):
    keys = jax.random.split(jax.random.key(7), 12).reshape(6, 2)
    hot = strategy(name, temperature=2.0)
    first = [case.answers(hot, rows=(0, 1), keys=pair) for pair in keys]
    beside = [case.answers(hot, rows=(1, 0), keys=jnp.stack([keys[0, 0], pair[0]])) for pair in keys]
    draws = [upto_eos(found.ids[0]) for found in first]
    assert [upto_eos(found.ids[1]) for found in beside] == draws
    assert len(set(draws)) > 1, "one query, several draws"


def test_other_lengths_share_the_programs_that_decode(case):
    slots = LP + LQ + SHORT + 5
    case.answers(strategy("token"), num_slots=slots)
    where, sizes = programs.placement(case.params, "generator"), {"num_tokens": strategy("token").num_tokens}
    decode = programs.compiled(decoding.one_by_one, case.model, where, eos_id=strategy("token").eos_id, **sizes)
    known = decode._cache_size()
    assert known
    longer = padded(case.passages, LP + 3)
    asked = case.asked(strategy("token"), num_slots=slots)
    asked = dataclasses.replace(asked, prefix=longer, query=padded(case.queries, LQ + 2))
    again = answering.answers(case.model, case.params, asked)
    assert decode._cache_size() == known
    np.testing.assert_array_equal(again.ids, case.answers(strategy("token")).ids)


def test_sampled_beams_are_refused(case):
    with pytest.raises(ValueError, match="a key for each row and one beam"):
        case.answers(strategy("token", temperature=1.0, num_beams=2), keys=jax.random.split(jax.random.key(0), 2))


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}, {"num_beams": 2}], ids=["the likeliest", "sampled", "beams"])
def test_what_is_told_while_it_is_decoded_begins_the_answers(case, how):
    keys = answering.question_keys(3, ["first", "second"])
    options = {"keys": keys} if "temperature" in how else {}
    expected = case.answers(strategy("token", **how), **options)
    asked = case.asked(strategy("token", **how), **options)
    *told, found = answering.stream(case.model, case.params, asked, at_a_time=1)
    assert isinstance(found, answering.Answers)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    longest = max(len(upto_eos(ids)) for ids in found.ids)
    assert [part.shape for part in told] == ([] if "num_beams" in how else [(2, t + 1) for t in range(longest - 1)])
    assert all((part == found.ids[:, : part.shape[1]]).all() for part in told)
