"""Pretrained SmolLM2 decodes real prompts as `transformers.generate` does, token for token: alone, mixed, by beams."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_jax import config, data, hf, pair, quickstart, rag
from rag_jax.data import segments
from rag_jax.inference import answering

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

NUM_TOKENS, PASSAGE_LEN = 16, 64


@pytest.fixture(scope="module")
def prompts(real_models, tmp_path_factory):
    """Passage segments and query segments of 50 real rows, ragged, by the shipped prompt."""
    folder = quickstart.make_rows(tmp_path_factory.mktemp("real") / "rows")
    with open(folder / "train.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:50]
    values = {"data.prompt_passage_len": PASSAGE_LEN, "generator.path": str(real_models / "smollm2-135m")}
    loaded = config.load("configs/quickstart.py", values | {"retriever.path": str(real_models / "minilm")})
    source = hf.open_model(loaded.generator.path, "generator.path", "generator")
    prompt = pair.prompt(loaded, {"generator": source})
    assert prompt is not None
    (passages, _), (queries, _) = data.prompt_segments(
        prompt, [row["Abstract"] for row in rows], [row["Question"] for row in rows]
    )
    return passages, queries, source.tokenizer.eos_token_id


@pytest.fixture(scope="module")
def ours(real_models):
    loaded = config.load("configs/quickstart.py", {"generator.path": str(real_models / "smollm2-135m")})
    source = hf.open_model(loaded.generator.path, "generator.path", "generator")
    model: rag.Rag = pair.composite(loaded, {"generator": source})
    return model, {
        "generator": jax.tree.map(jnp.asarray, hf.load_params(source.folder, source.model_type, source.model_config))
    }


@pytest.fixture(scope="module")
def theirs(real_models):
    folder = real_models / "smollm2-135m"
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def our_answers(ours, prompts, rows, candidates, doc_log_probs, **options):
    passages, queries, eos_id = prompts
    used, local = np.unique(candidates, return_inverse=True)
    prefix = segments.pad(passages, used, PASSAGE_LEN)
    query = segments.pad(queries, rows, int(queries.lengths.max()))
    decoding = answering.Decoding("token", NUM_TOKENS, eos_id, **options)
    candidates = local.reshape(candidates.shape).astype(np.int32)
    return answering.answers(*ours, answering.Asked(prefix, query, candidates, doc_log_probs, decoding))


def their_answers(theirs, strings, **options):
    """Left-padded, in one batch."""
    length = max(map(len, strings))
    ids = torch.tensor([[0] * (length - len(string)) + string for string in strings])
    mask = torch.tensor([[0] * (length - len(string)) + [1] * len(string) for string in strings])
    with torch.inference_mode():
        found = theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NUM_TOKENS, **options)
    return found[:, length:].tolist()


def strings_of(prompts, rows, candidates):
    passages, queries, _ = prompts
    return [[*passages[p], *queries[row]] for row, of_row in zip(rows, candidates, strict=True) for p in of_row]


def upto(ids, eos_id):
    ids = list(ids)
    return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids


def check(found, expected, eos_id):
    assert [upto(ids, eos_id) for ids in found.ids.tolist()] == [upto(ids, eos_id) for ids in expected]


def test_greedy_on_many_prompts(ours, theirs, prompts):
    rows = np.arange(25)
    found = our_answers(ours, prompts, rows, rows[:, None], np.zeros((25, 1), np.float32))
    check(found, their_answers(theirs, strings_of(prompts, rows, rows[:, None])), prompts[2])


def test_a_mixture_of_passages_at_every_token(ours, theirs, prompts):
    """`transformers` with a processor that gives all streams of a query their mixture."""
    rng = np.random.default_rng(0)
    B, K = 4, 4
    rows, candidates = np.arange(B), np.stack([rng.permutation(8)[:K] for _ in range(B)])
    doc = np.asarray(jax.nn.log_softmax(rng.normal(size=(B, K)).astype(np.float32)))

    class Mixture(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            log_probs = torch.log_softmax(scores, dim=-1).view(B, K, -1) + torch.tensor(doc)[:, :, None]
            return torch.logsumexp(log_probs, dim=1).repeat_interleave(K, dim=0)

    processors = transformers.LogitsProcessorList([Mixture()])
    expected = their_answers(theirs, strings_of(prompts, rows, candidates), logits_processor=processors)[::K]
    found = our_answers(ours, prompts, rows, candidates, doc)
    check(found, expected, prompts[2])
    alone = our_answers(ours, prompts, rows, candidates[:, :1], np.zeros((B, 1), np.float32))
    assert (alone.ids != found.ids).any(), "the mixture says something else than its first passage"


@pytest.mark.soak
def test_beams(ours, theirs, prompts):
    rows = np.arange(4)
    found = our_answers(ours, prompts, rows, rows[:, None], np.zeros((4, 1), np.float32), num_beams=3)
    expected = [
        their_answers(theirs, [string], num_beams=3, length_penalty=0.0, early_stopping="never")[0]
        for string in strings_of(prompts, rows, rows[:, None])
    ]
    check(found, expected, prompts[2])
