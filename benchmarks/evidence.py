"""What the generator's evidence tells the retriever that the label does not, in random and in mined groups.

    python -m benchmarks.evidence --rows=ROWS.csv --models=quickstart/models

Of each row and K passages of its group: how sure the retriever is of the row's own passage before the answer is read
(prior) and after (posterior p(k | q, y), RAG-Sequence), how often each model would choose another passage, and the
gradients that the losses at weight 1 send to embeddings: their lengths, and cosines with that of the contrastive loss.
Training changes nothing here: the pair is measured as it lies in --models.

With --kept=FOLDER, what `benchmarks.labels` has kept is judged by the labels that its runs did not see: of rows whose
candidates hold the labelled passage, how often that is the likeliest, and what share of a target it gets.
"""

import argparse
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from rag_jax import cli, config, data, losses, pair, rag
from rag_jax.inference import evidence as kept_evidence
from rag_jax.inference import search
from rag_jax.training import mining

ROOT = pathlib.Path(__file__).parent.parent
MEASURED = (
    "prior of the own passage",
    "posterior of the own passage",
    "rows whose retriever prefers another passage",
    "rows whose generator prefers another passage",
    "gradient of the contrastive loss",
    "gradient of the marginal, token",
    "cosine of token's with the contrastive loss's",
    "gradient of the marginal, sequence",
    "cosine of sequence's with the contrastive loss's",
)


def main() -> None:
    cli.quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", required=True, help="a CSV with Question, Abstract, Answer")
    parser.add_argument("--models", type=pathlib.Path, required=True, help="a folder with minilm and smollm2-135m")
    parser.add_argument("--batches", type=int, default=25, help="groups of each kind")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--prompt-passage-len", type=int, default=160, help="tokens of a passage the generator reads")
    parser.add_argument("--kept", type=pathlib.Path, help="a folder of kept evidence, of one generator")
    args = parser.parse_args()
    values = {
        "data.train": args.rows,
        "data.query_len": 32,
        "data.prompt_passage_len": args.prompt_passage_len,
        "data.prompt_query_len": 32,
        "data.answer_len": 24,
        "batch_size": args.group_size,
        "group_size": args.group_size,
        "objective.candidates": args.candidates,
        "mining.every_steps": args.batches,
        "retriever.path": str(args.models / "minilm"),
        "generator.path": str(args.models / "smollm2-135m"),
    }
    opened = pair.open_pair(config.load(ROOT / "configs" / "minilm_smollm2.py", values))
    examples, _ = data.load_examples(
        args.rows,
        key="--rows",
        columns=opened.config.data.columns.to_dict(),
        bad_rows="drop",
        retriever=opened.retriever_text,
        prompt=opened.prompt,
    )
    params = pair.pretrained_params(opened)
    if args.kept is not None:
        judge(opened, params, examples, kept_evidence.Kept(args.kept))
        return
    plan, _ = mining.mine(opened.model, params, examples, np.zeros(len(examples), np.int32), opened.config, 0)
    objective = opened.config.objective
    print(
        f"{args.batches} groups of {args.group_size} rows, K = {args.candidates}, passages of at most "
        f"{args.prompt_passage_len} tokens read; temperatures: contrastive {objective.temperature}, marginal "
        f"{objective.marginal_temperature}"
    )
    found = {}
    for kind, planned in (("random groups", None), ("mined groups", plan.rows)):
        found[kind] = measure(opened, params, examples, args.batches, planned)
    print(f"{'':<58}" + "".join(f"{kind:>16}" for kind in found))
    for name in MEASURED:
        print(f"{name:<58}" + "".join(f"{of_kind[name]:>16.3f}" for of_kind in found.values()))


def judge(opened: pair.Pair, params: dict, examples: data.Examples, kept: kept_evidence.Kept) -> None:
    """Prints how the evidence that is kept of rows, and the untrained retriever, judge the same candidates."""
    texts = examples.retriever_queries, examples.retriever_passages
    assert texts[0] is not None and texts[1] is not None
    query_emb, passage_emb = (
        search.embed(opened.model, params, tokens, batch_size=32, label=label)
        for tokens, label in zip(texts, ("queries", "passages"), strict=True)
    )
    every, judged = np.arange(len(examples.passages)), []
    known = 0
    for row in range(len(examples)):
        sums = kept.sums(kept_evidence.pair_names(examples, np.full(len(every), row), every))
        candidates = np.flatnonzero(~np.isnan(sums).all(axis=1))
        known += len(candidates) > 0
        query = examples.query_key[row]
        right = np.isin(candidates, examples.right_key[query])
        if right.any() and not right.all():
            lengths = kept_evidence.part_lengths(examples, np.array([row]))[0]
            cosine = passage_emb[candidates] @ query_emb[query]
            judged.append((right, cosine, sums[candidates], lengths))
    print(
        f"{known:,} rows with kept evidence, {len(judged):,} of them with the labelled passage among others; "
        f"{np.mean([len(right) for right, *_ in judged]):.1f} candidates each"
    )
    temperatures = (0.05, 0.1, 0.2, 0.4)
    print(f"{'likeliest is right':>38}  share of the right one at a temperature of")
    print(f"{'':<40}" + "".join(f"{temperature:>8}" for temperature in temperatures))
    says = {"the retriever, untrained": lambda cosine, sums, lengths: cosine}
    for name, parts in (("answer", [0]), ("question", [1]), ("both", [0, 1])):
        says[f"evidence of {name}"] = lambda cosine, sums, lengths, of=parts: sums[:, of].sum(1) / lengths[of].sum()
    for name, say in says.items():
        said = [(right, say(*rest)) for right, *rest in judged]
        said = [(right, values) for right, values in said if not np.isnan(values).any()]
        first = np.mean([right[values.argmax()] for right, values in said]) if said else np.nan
        shares = [
            np.mean([np.exp(values / t - np.logaddexp.reduce(values / t))[right].sum() for right, values in said])
            for t in temperatures
        ]
        print(f"{name:<28}{first:>10.3f}  " + "".join(f"{share:>8.3f}" for share in shares))


def measure(opened: pair.Pair, params: dict, examples: data.Examples, num_batches: int, planned) -> dict[str, float]:
    """Means over all rows, and over all batches, by what they are."""
    settings = opened.config
    shapes = data.buckets(examples, settings.batch_size, settings.objective.candidates, 0)
    batches = data.iterate(
        examples,
        data.Batching(shapes, settings.group_size),
        batch_size=settings.batch_size,
        seed=settings.seed,
        start_step=0,
        total_steps=num_batches,
        planned=planned,
    )
    of_batch = jax.jit(functools.partial(evidence, opened.model))
    found = np.mean([jax.device_get(of_batch(params, batch)) for batch in batches], axis=0)
    return dict(zip(MEASURED, found.tolist(), strict=True))


def evidence(model: rag.Rag, params: dict, batch: data.Batch) -> jax.Array:
    """Of one group, which is the whole batch: what MEASURED names, means over its rows."""
    generator = model.model("generator", params)
    embs = rag.embed(model, params, batch, None)

    def log_probs(embs):
        return rag.block_log_probs(model, generator, *jax.tree.map(lambda a: a[None], (batch, embs)), None)

    (prior_bK, token_log_probs_bKT), to_embs = jax.vjp(log_probs, embs)
    answer_bK = jnp.sum(jnp.where(batch.answer_mask[:, None], token_log_probs_bKT, 0.0), axis=-1)
    posterior_bK = jax.nn.softmax(prior_bK + answer_bK, axis=-1)
    by_label = along_sphere(
        jax.grad(lambda embs: jnp.mean(rag.contrastive_term(model, batch, embs).nats_B))(embs), embs
    )
    # The row's own passage is its first candidate.
    measured = [
        jnp.mean(jnp.exp(prior_bK[:, 0])),
        jnp.mean(posterior_bK[:, 0]),
        jnp.mean(jnp.argmax(prior_bK, axis=-1) != 0),
        jnp.mean(jnp.argmax(answer_bK, axis=-1) != 0),
        jnp.linalg.norm(by_label),
    ]
    for name in ("token", "sequence"):

        def mean_nll(prior_bK, name=name):
            summed = -losses.log_marginal(name, prior_bK, token_log_probs_bKT, batch.answer_mask).sum()
            return summed / jnp.sum(batch.answer_mask)

        (grads,) = to_embs((jax.grad(mean_nll)(prior_bK), jnp.zeros_like(token_log_probs_bKT)))
        by_evidence = along_sphere(grads, embs)
        length = jnp.linalg.norm(by_evidence)
        measured += [length, jnp.vdot(by_label, by_evidence) / (jnp.linalg.norm(by_label) * length)]
    return jnp.stack(measured)


def along_sphere(grads: rag.Embs, embs: rag.Embs) -> jax.Array:
    """All gradients as one vector, without what normalisation takes away again."""
    pairs = zip(grads, embs, strict=True)
    return jnp.concatenate([(grad - jnp.sum(grad * emb, axis=-1, keepdims=True) * emb).ravel() for grad, emb in pairs])


if __name__ == "__main__":
    main()
