"""Greedy answers, ours beside `transformers.generate`: every query with every one of its K passages.

    python -m benchmarks.decoding --rows=ROWS.csv --models=quickstart/models [--batch-size=8] [--candidates=4]

Both sides decode the same number of tokens for the same prompts, B K of them at a time (ours runs each distinct passage
once), and must find the same tokens. RAG-Token, which mixes the K passages at every token, stands beside them. The time
is that of whole answers, prompts included, after a first call that compiles; sides alternate.
"""

import argparse
import pathlib
import statistics
import time

import jax
import numpy as np
import torch
import transformers

from rag_jax import cli, config, data, pair
from rag_jax.data import segments
from rag_jax.inference import answering

ROOT = pathlib.Path(__file__).parent.parent


def main() -> None:
    cli.quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", required=True, help="a CSV with Question, Abstract, Answer")
    parser.add_argument("--models", type=pathlib.Path, required=True, help="a folder with minilm and smollm2-135m")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--passage-len", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    opened, params, prompts, candidates = open_prompts(args)
    sides = {
        "each passage, ours": of_each_passage(args, opened, params, prompts, candidates),
        "each passage, transformers": by_transformers(args, opened, prompts, candidates),
        "RAG-Token, ours": rag_token(args, opened, params, prompts, candidates),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    answers = {}
    for number in range(args.rounds + 1):
        for name, decode in sides.items():
            began = time.perf_counter()
            answers[name] = decode()
            if number:
                seconds[name].append(time.perf_counter() - began)
    B, K, T = args.batch_size, args.candidates, args.tokens
    print(f"B = {B}, K = {K}, passages of {args.passage_len} tokens, {T} new tokens; medians of {args.rounds} rounds")
    print(f"{'':<28}{'seconds':>10}{'tokens/s':>10}{'answers/s':>10}")
    for name, (each, streams) in zip(sides, ((B * K, B * K), (B * K, B * K), (B, B * K)), strict=True):
        median = statistics.median(seconds[name])
        print(f"{name:<28}{median:>10.2f}{streams * T / median:>10.0f}{each / median:>10.1f}")
    ratio = statistics.median(seconds["each passage, transformers"]) / statistics.median(seconds["each passage, ours"])
    same = np.mean(answers["each passage, ours"] == answers["each passage, transformers"])
    print(f"ours is {ratio:.2f} times as fast; {same:.1%} of the tokens are the same")


def open_prompts(args: argparse.Namespace):
    """The generator, the rows' segments, and K passages (B, K) of each row: its own and those of random other rows."""
    values = {f"{role}.path": str(args.models / name) for role, name in MODELS.items()}
    loaded = config.load(ROOT / "configs" / "quickstart.py", values | {"data.prompt_passage_len": args.passage_len})
    opened = pair.open_pair(loaded)
    assert opened.prompt is not None
    examples, _ = data.load_examples(
        args.rows, key="--rows", columns=loaded.data.columns.to_dict(), bad_rows="drop", retriever=None,
        prompt=opened.prompt,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(examples))[: args.batch_size]
    own = examples.passage_key[rows]
    others = np.stack([rng.permutation(np.delete(own, i))[: args.candidates - 1] for i in range(len(rows))])
    candidates = np.concatenate([own[:, None], others], axis=1)
    queries = examples.prompt_queries.take(examples.query_key[rows])
    return opened, pair.pretrained_params(opened), (examples.prefixes, queries), candidates


MODELS = {"retriever": "minilm", "generator": "smollm2-135m"}
# No answer ends early: all sides decode the same number of tokens.
NEVER = -1


def reading(opened, params, args, prompts, candidates):
    (prefixes, queries), (used, local) = prompts, np.unique(candidates, return_inverse=True)
    prefix = segments.pad(prefixes, used, args.passage_len)
    query = segments.pad(queries, np.arange(len(queries)), int(queries.lengths.max()))
    num_slots = args.passage_len + query[0].shape[1] + args.tokens
    local = local.reshape(candidates.shape).astype(np.int32)
    return answering._read(opened.model, params, prefix, query, local, num_slots=num_slots)


def of_each_passage(args, opened, params, prompts, candidates):
    sizes = {"num_tokens": args.tokens, "eos_id": NEVER, "num_beams": 1, "length_penalty": 0.0}

    def decode() -> np.ndarray:
        read = reading(opened, params, args, prompts, candidates)
        return np.asarray(answering._of_each_passage(opened.model, params, read, **sizes))

    return decode


def rag_token(args, opened, params, prompts, candidates):
    weights = jax.nn.log_softmax(np.zeros(candidates.shape, np.float32))
    sizes = {"num_tokens": args.tokens, "eos_id": NEVER}

    def decode() -> np.ndarray:
        read = reading(opened, params, args, prompts, candidates)
        return np.asarray(answering._one_by_one(opened.model, params, read, weights, None, **sizes)[0])

    return decode


def by_transformers(args, opened, prompts, candidates):
    prefixes, queries = prompts
    strings = [[*prefixes[p], *queries[row]] for row, of_row in enumerate(candidates) for p in of_row]
    length = max(map(len, strings))
    ids = torch.tensor([[0] * (length - len(string)) + string for string in strings])
    mask = torch.tensor([[0] * (length - len(string)) + [1] * len(string) for string in strings])
    folder = opened.sources["generator"].folder
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def decode() -> np.ndarray:
        with torch.inference_mode():
            found = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=args.tokens, pad_token_id=0
            )
        return found[:, length:].numpy().reshape(*candidates.shape, -1)

    return decode


if __name__ == "__main__":
    main()
