"""Pretrained MiniLM and SmolLM2 on real rows against PyTorch: gradients, objectives by brute force, export."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from rag_jax import config, data, hf, pair, quickstart, rag

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

NUM_ROWS = 2
TEMPERATURE, MARGINAL_TEMPERATURE = 0.3, 0.2  # so high that both passages count


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Real rows, those with the shortest passages first."""
    import csv

    folder = quickstart.make_rows(tmp_path_factory.mktemp("real") / "rows")
    with open(folder / "train.csv", newline="", encoding="utf-8") as file:
        every = [(r["Question"], r["Abstract"], r["Answer"]) for r in csv.DictReader(file)]
    return folder, sorted(every, key=lambda row: len(row[1]))


@pytest.fixture(scope="module")
def few_rows(rows, tmp_path_factory):
    _, every = rows
    path = tmp_path_factory.mktemp("few") / "rows.csv"
    quickstart.write_csv(path, quickstart.COLUMNS, every[: NUM_ROWS - 1] + every[200:201])  # ragged lengths
    return path, every[: NUM_ROWS - 1] + every[200:201]


@pytest.fixture(scope="module")
def torch_models(real_models):
    """In float64: on some processors PyTorch's own float32 gradients are off by more than what is allowed to ours."""
    kind = {"dtype": torch.float64, "attn_implementation": "eager"}
    retriever = transformers.AutoModel.from_pretrained(real_models / "minilm", **kind).eval()
    generator = transformers.AutoModelForCausalLM.from_pretrained(real_models / "smollm2-135m", **kind).eval()
    return retriever, generator


def opened_run(real_models, file, num_rows=NUM_ROWS, **objective):
    values = config.flat(config.load("configs/quickstart.py"))
    values |= {
        "data.train": str(file),
        "retriever.path": str(real_models / "minilm"),
        "generator.path": str(real_models / "smollm2-135m"),
        "batch_size": num_rows,
        "group_size": num_rows,
        "data.prompt_passage_len": 256,
        "data.passage_len": 256,
        "objective.temperature": TEMPERATURE,
        "objective.marginal_temperature": MARGINAL_TEMPERATURE,
        "objective.candidates": num_rows,
    }
    return pair.open_pair(config.build(values, {f"objective.{name}": value for name, value in objective.items()}))


def batch_of(opened):
    examples, report = data.load_examples(
        opened.config.data.train,
        key="data.train",
        columns=opened.config.data.columns.to_dict(),
        bad_rows="refuse",
        retriever=opened.retriever_text,
        prompt=opened.prompt if opened.whole_string is None else None,
        whole_string=opened.whole_string,
    )
    assert not any(report.cut.values()), report
    num_rows = len(examples)
    batching = data.Batching(data.buckets(examples, num_rows, 1)[-1:], num_rows)
    return jax.tree.map(jnp.asarray, data.collate(examples, np.arange(num_rows), batching))


@pytest.fixture(scope="module")
def params(real_models):
    sources = {
        "retriever": hf.open_model(str(real_models / "minilm"), "retriever.path", "retriever"),
        "generator": hf.open_model(str(real_models / "smollm2-135m"), "generator.path", "generator"),
    }
    return {
        r: jax.tree.map(jnp.asarray, hf.load_params(s.folder, s.model_type, s.model_config)) for r, s in sources.items()
    }


tokenizer_of = functools.cache(transformers.AutoTokenizer.from_pretrained)  # read once a folder: it takes seconds


def embed(model, folder, texts):
    tokenizer = tokenizer_of(folder)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][:, :, None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def token_log_probs(model, folder, query, passage, answer):
    """(T,) of the answer's tokens and the end of sequence, one full sequence, all logits."""
    return suffix_log_probs(model, folder, query, passage, answer)[1]


def suffix_log_probs(model, folder, query, passage, answer):
    """Of the question's tokens but the first, and of the answer's."""
    tokenizer = tokenizer_of(folder)
    plain = functools.partial(tokenizer.encode, add_special_tokens=False)
    target = plain(f" {answer}") + [tokenizer.eos_token_id]
    before, question = [tokenizer.bos_token_id] + plain(passage), plain(f"\n\nQuestion: {query}\nAnswer:")
    ids = before + question + target
    log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
    positions = torch.arange(len(before) + 1, len(ids))
    each = log_probs[positions - 1, torch.tensor(ids)[positions]]
    return each[: len(question) - 1], each[len(question) - 1 :]


def brute_force(torch_models, real_models, rows):
    """The losses from every (query, passage) pair as its own full sequence."""
    retriever, generator = torch_models
    queries, passages, _ = zip(*rows, strict=True)
    folder = real_models / "minilm"
    cosine = embed(retriever, folder, list(queries)) @ embed(retriever, folder, list(passages)).T
    prior = torch.log_softmax(cosine / MARGINAL_TEMPERATURE, dim=-1)
    token, sequence, count = torch.zeros(()), torch.zeros(()), 0
    for i, (query, _, answer) in enumerate(rows):
        pairs = [token_log_probs(generator, real_models / "smollm2-135m", query, p, answer) for p in passages]
        log_probs = torch.stack(pairs)  # (K, T)
        count += log_probs.shape[1]
        sequence = sequence - torch.logsumexp(prior[i] + log_probs.sum(1), 0)
        token = token - torch.logsumexp(prior[i][:, None] + log_probs, 0).sum()
    scores = cosine / TEMPERATURE
    diagonal = torch.arange(len(rows))
    contrastive = sum(torch.nn.functional.cross_entropy(s, diagonal) for s in (scores, scores.T)) / 2
    return {"contrastive": contrastive, "token": token / count, "sequence": sequence / count}


def gradients_of(torch_models, real_models, tmp_path):
    """PyTorch's gradients as trees of ours, by the same tables as weights."""
    import safetensors.torch

    trees = {}
    for role, model, name in zip(pair.ROLES, torch_models, ("minilm", "smollm2-135m"), strict=False):
        folder = tmp_path / role
        folder.mkdir()
        grads = {n: p.grad.float().contiguous() for n, p in model.named_parameters() if p.grad is not None}
        safetensors.torch.save_file(grads, folder / "model.safetensors")
        source = hf.open_model(str(real_models / name), "path", role)
        trees[role] = hf.load_params(folder, source.model_type, source.model_config)
    return trees


def test_marginals_and_gradients_equal_brute_force(real_models, torch_models, params, few_rows, tmp_path):
    """Of the sum of both objectives' losses, which share their forward passes and so cost those of one."""
    weights = {"token": 1.0, "sequence": 0.0}  # of the contrastive loss: once is enough
    opened = {n: opened_run(real_models, few_rows[0], name=n, contrastive_weight=w) for n, w in weights.items()}
    batch = batch_of(opened["token"])

    def both(params):
        totals = {name: rag.loss(one.model, params, batch, None) for name, one in opened.items()}
        return sum(total for total, _ in totals.values()), {name: metrics for name, (_, metrics) in totals.items()}

    (total, metrics), grads = jax.jit(jax.value_and_grad(both, has_aux=True))(params)
    by_hand = brute_force(torch_models, real_models, few_rows[1])
    whole = by_hand["contrastive"] + by_hand["token"] + by_hand["sequence"]
    whole.backward()
    for name in opened:
        np.testing.assert_allclose(metrics[name]["loss/marginal"], by_hand[name].item(), rtol=1e-4)
    np.testing.assert_allclose(metrics["token"]["loss/contrastive"], by_hand["contrastive"].item(), rtol=1e-4)
    np.testing.assert_allclose(total, whole.item(), rtol=1e-4)
    assert_gradients_close(grads, gradients_of(torch_models, real_models, tmp_path), 5e-5)  # half: two marginals


def assert_gradients_close(grads, expected, tolerance):
    for role in expected:
        whole = float(np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(expected[role]))))
        for (where, ours), theirs in zip(
            jax.tree_util.tree_leaves_with_path(grads[role]), jax.tree.leaves(expected[role]), strict=True
        ):
            error = np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-2 * whole)
            assert error < tolerance, (role, jax.tree_util.keystr(where), error)


LISTWISE = {"pdist": "both", "replug": "answer", "emdr2": "question"}
EVIDENCE_TEMPERATURE, LABEL_SHARE = 0.5, 0.3


def listwise_by_hand(torch_models, real_models, rows):
    """The three losses of evidence, and the generator's own on the right passages, all by full sequences."""
    retriever, generator = torch_models
    queries, passages, _ = zip(*rows, strict=True)
    folder = real_models / "minilm"
    cosine = embed(retriever, folder, list(queries)) @ embed(retriever, folder, list(passages)).T
    p = torch.softmax(cosine / MARGINAL_TEMPERATURE, dim=-1)
    found, own, count = dict.fromkeys(LISTWISE, 0.0), 0.0, 0
    for i, (query, _, answer) in enumerate(rows):
        read = [suffix_log_probs(generator, real_models / "smollm2-135m", query, p, answer) for p in passages]
        question, answers = (torch.stack(each) for each in zip(*read, strict=True))
        own, count = own - answers[i].sum(), count + answers.shape[1]
        label = torch.nn.functional.one_hot(torch.tensor(i), len(rows)).to(p.dtype)
        for name in LISTWISE:
            parts = {"both": [question, answers], "answer": [answers], "question": [question]}[LISTWISE[name]]
            said = torch.cat([part.detach() for part in parts], 1).mean(1) / EVIDENCE_TEMPERATURE
            target = LABEL_SHARE * label + (1 - LABEL_SHARE) * torch.softmax(said, 0)
            nats = {
                "pdist": (target * (target.log() - p[i].log())).sum(),
                "replug": (p[i] * (p[i].log() - target.log())).sum(),
                "emdr2": -(1 - LABEL_SHARE)
                * (p[i] * torch.exp(sum(part.detach().sum(1) for part in parts))).sum().log()
                - LABEL_SHARE * p[i, i].log(),
            }
            found[name] = found[name] + nats[name] / len(rows)
    return found, own / count


@pytest.mark.soak
def test_listwise_objectives_and_gradients_equal_brute_force(real_models, torch_models, params, few_rows, tmp_path):
    opened = {
        name: opened_run(
            real_models, few_rows[0], name=name, contrastive_weight=0.0, evidence=evidence, label_share=LABEL_SHARE,
            evidence_temperature=EVIDENCE_TEMPERATURE,
        )
        for name, evidence in LISTWISE.items()
    }  # fmt: skip
    batch = batch_of(opened["pdist"])

    def all_three(params):
        totals = {name: rag.loss(one.model, params, batch, None) for name, one in opened.items()}
        return sum(total for total, _ in totals.values()), {name: metrics for name, (_, metrics) in totals.items()}

    for model in torch_models:
        model.zero_grad()
    (total, metrics), grads = jax.jit(jax.value_and_grad(all_three, has_aux=True))(params)
    by_hand, own = listwise_by_hand(torch_models, real_models, few_rows[1])
    (sum(by_hand.values()) + len(by_hand) * own).backward()
    for name in opened:
        np.testing.assert_allclose(metrics[name]["loss/evidence"], by_hand[name].item(), rtol=1e-4)
        np.testing.assert_allclose(metrics[name]["loss/marginal"], own.item(), rtol=1e-4)
    np.testing.assert_allclose(total, (sum(by_hand.values()) + len(by_hand) * own).item(), rtol=1e-4)
    assert_gradients_close(grads, gradients_of(torch_models, real_models, tmp_path), 1e-4)


MARGIN = 0.2  # nats a token


def corrected_by_hand(cosine, read, none):
    """What is right and what is no negative after the evidence (B, P), and their contrastive and document losses.

    Rows are labelled with their own passage; the first two and the others are of one document each.
    """
    scores = torch.exp(cosine / TEMPERATURE)
    right, out, document = [], [], torch.zeros(())
    for i, row in enumerate(read.tolist()):
        explains = {k for k, said in enumerate(row) if said >= row[i] and said >= none[i] + MARGIN}
        better = any(row[k] >= row[i] + MARGIN for k in explains - {i})
        right.append(sorted(explains if better else explains | {i}))
        out.append({i} | explains | {k for k, said in enumerate(row) if said > row[i] - MARGIN})
        within = [0, 1] if i < 2 else list(range(2, len(read)))
        document = document - torch.log(scores[i, within].sum() / scores[i].sum()) / len(read)
    total = torch.zeros(())
    for i, own in enumerate(right):
        wrong = [k for k in range(len(read)) if k not in out[i]]
        total = total - torch.log(scores[i, own].sum() / scores[i, own + wrong].sum())
        for k in own:
            askers = [i, *(j for j in range(len(read)) if k not in out[j])]
            total = total - torch.log(scores[i, k] / scores[askers, k].sum()) / len(own)
    return right, out, total / (2 * len(read)), document


@pytest.mark.soak
def test_corrected_labels_and_documents_equal_brute_force(real_models, torch_models, params, rows, tmp_path):
    """Two rows have each other's passages. Evidence by full sequences of PyTorch; the retriever's gradients."""
    path, chosen = tmp_path / "rows.csv", rows[1][:6]
    (q0, p0, a0), (q1, p1, a1) = chosen[:2]
    chosen = [(q0, p1, a0), (q1, p0, a1), *chosen[2:]]
    quickstart.write_csv(path, quickstart.COLUMNS, chosen)
    opened = opened_run(
        real_models, path, num_rows=6, name="pdist", evidence_temperature=EVIDENCE_TEMPERATURE, marginal_weight=0.0,
        label_noise=MARGIN, document_weight=0.7, kept_evidence="auto",
    )  # fmt: skip
    retriever, generator = torch_models
    queries, passages, _ = zip(*chosen, strict=True)
    with torch.no_grad():
        of_pair = functools.partial(token_log_probs, generator, real_models / "smollm2-135m")
        read = torch.stack([torch.stack([of_pair(q, p, a).mean() for p in passages]) for q, _, a in chosen])
        none = [of_pair(q, "", a).mean().item() for q, _, a in chosen]
    retriever.zero_grad()
    folder = real_models / "minilm"
    cosine = embed(retriever, folder, list(queries)) @ embed(retriever, folder, list(passages)).T
    right, out, contrastive, document = corrected_by_hand(cosine, read, none)
    assert any(of_row != [i] for i, of_row in enumerate(right)), "no label was corrected"
    assert any(len(of_row) > 1 for of_row in out), "nothing was left out"
    p, q = (torch.softmax(a, -1) for a in (cosine / MARGINAL_TEMPERATURE, read / EVIDENCE_TEMPERATURE))
    evidence = (q * (q.log() - p.log())).sum(-1).mean()
    total = contrastive + 0.7 * document + evidence
    total.backward()

    of_document = jnp.asarray([0, 0, 1, 1, 1, 1])
    batch = batch_of(opened)
    batch = batch._replace(
        evidence=jnp.asarray(read / EVIDENCE_TEMPERATURE, jnp.float32),
        evidence_none=jnp.asarray(none, jnp.float32) / EVIDENCE_TEMPERATURE,
        document=of_document,
        pool=batch.pool._replace(document=of_document.reshape(batch.pool.key.shape)),
    )
    model = dataclasses.replace(opened.model, generator=None)
    loss = functools.partial(rag.loss, model, batch=batch, key=None)
    (ours, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))({"retriever": params["retriever"]})
    expected = {"contrastive": contrastive, "document": document, "evidence": evidence, "total": total}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[f"loss/{name}"], value.item(), rtol=1e-4)
    np.testing.assert_allclose(ours, total.item(), rtol=1e-4)
    assert_gradients_close(grads, gradients_of((retriever,), real_models, tmp_path), 1e-4)


def dalm_by_hand(torch_models, real_models, rows, max_len):
    """The predecessor's formula, string by string."""
    retriever, generator = torch_models
    tokenizer = tokenizer_of(real_models / "smollm2-135m")
    query_emb = embed(retriever, real_models / "minilm", [f"#query# {q}" for q, _, _ in rows])
    passage_emb = embed(retriever, real_models / "minilm", [f"#passage# {p}" for _, p, _ in rows])
    cross_entropy = -torch.log_softmax(100 * query_emb @ passage_emb.T, dim=-1).diagonal()
    nll, answers, scored = torch.zeros(()), torch.zeros(()), 0
    for i, (query, passage, answer) in enumerate(rows):
        head = f"#query# #query# {query} #passage# #passage# {passage} #answer#"
        ids = tokenizer(f"{head} {answer}").input_ids[:max_len]
        log_probs = torch.log_softmax(generator(torch.tensor([ids])).logits[0, :-1], dim=-1)
        nll = nll - log_probs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum()
        first = len(tokenizer(head).input_ids) - 1
        answers = answers + max(0, len(ids) - 1 - first) * cross_entropy[i]
        scored += len(ids) - 1
    return (nll + answers) / scored


def test_dalm_equals_its_formula(real_models, torch_models, params, few_rows):
    path, texts = few_rows
    opened = opened_run(real_models, path, name="dalm", contrastive_weight=0.0)
    with torch.no_grad():
        expected = dalm_by_hand(torch_models, real_models, texts, pair.string_len(opened.config)).item()
    got = jax.jit(lambda p: rag.loss(opened.model, p, batch_of(opened), None)[0])(params)
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def command(module, *flags):
    one_device = os.environ | {"XLA_FLAGS": ""}
    process = subprocess.run([sys.executable, "-m", module, *flags], capture_output=True, text=True, env=one_device)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.soak
def test_the_marginal_alone_teaches_retrieval(real_models, rows, tmp_path):
    """Contrastive weight 0: whatever the retriever learns, it learns from the generator's evidence."""
    folder, _ = rows
    common = {
        "data.train": folder / "train.csv",
        "data.eval": folder / "eval.csv",
        "data.passages": folder / "passages.csv",
        "data.prompt_passage_len": 64,
    }
    training = {
        "generator.path": real_models / "smollm2-135m",
        "objective.contrastive_weight": 0.0,
        "objective.candidates": 4,
        "optimizer.rate_rules": "(('^generator/', 0.0), ('.*', 1.0))",
        "total_steps": 10,
        "eval.every_steps": 0,
        "checkpoint.every_steps": 10,
    }

    def told(program, retriever, values, *flags):
        given = common | {"retriever.path": retriever} | values
        overrides = [f"--config.{name}={value}" for name, value in given.items()]
        return command(program, "--config=configs/quickstart.py", *flags, *overrides)

    def recall(retriever):
        values = {"generator.path": None, "objective.name": "none", "eval.rows": 0}
        printed = told("rag_jax.evaluate", retriever, values, "--json")
        return json.loads(printed.splitlines()[-1])["eval/recall@1"]

    workdir, exported = tmp_path / "run", tmp_path / "exported"
    told("rag_jax.main", real_models / "minilm", training, f"--workdir={workdir}")
    command("rag_jax.export", f"--workdir={workdir}", f"--out={exported}")
    assert recall(exported / "retriever") > recall(real_models / "minilm") + 0.05


def test_export_equals_ours(real_models, params, tmp_path):
    """Changed weights, so that nothing of the originals could be read by mistake."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    changed = jax.tree.map(lambda a: a * 1.01, params)
    texts = ["what does the linter say?", "an unused import costs time\nand more"]
    for role, name in zip(pair.ROLES, ("minilm", "smollm2-135m"), strict=True):
        source = hf.open_model(str(real_models / name), "path", role)
        folder = tmp_path / role
        folder.mkdir()
        pooling = hf.Pooling("mean", "query: ", "", 64) if role == "retriever" else None
        hf.save_model(source, changed[role], folder, "float32", pooling)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "retriever"), device="cpu")
    source = hf.open_model(str(tmp_path / "retriever"), "path", "retriever")
    model = pair.composite(_config(), {"retriever": source}).model("retriever", changed)
    tokens, _ = data.retriever_tokens(source.tokenizer, texts, source.pooling.query_prefix, 64)
    ids, mask = data.pad(tokens, np.arange(2), int(tokens.lengths.max()))
    ours = rag.encode(model, jnp.asarray(ids), jnp.asarray(mask), "mean")
    np.testing.assert_allclose(ours, theirs.encode(texts, prompt_name="query"), atol=1e-5)
    generator = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "generator").eval()
    ids = tokenizer_of(tmp_path / "generator")(texts[1], return_tensors="pt").input_ids
    source = hf.open_model(str(tmp_path / "generator"), "path", "generator")
    model = pair.composite(_config(), {"generator": source}).model("generator", changed)
    logits = model.logits(model(jnp.asarray(ids.numpy(), jnp.int32), jnp.ones(ids.shape, bool)))
    with torch.no_grad():
        expected = generator(ids).logits.numpy()
    assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 1e-5


def _config() -> ConfigDict:
    return config.load("configs/quickstart.py")
