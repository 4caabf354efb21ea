"""Evaluate: retrieval over all passages, answers with what is retrieved, of a run or of models as they come.

python -m rag_jax.evaluate --workdir=DIR [--step=N|best|latest]
python -m rag_jax.evaluate --config=FILE.py [--models=DIR]
"""

import json
from typing import Any

from rag_jax import cli, config


def main() -> None:
    flags = cli.parser("evaluate", __doc__)
    cli.add_choice_of_models(flags)
    flags.add_argument("--index", type=cli.path, metavar="DIR", help="keep the passages' embeddings on disk, there")
    flags.add_argument(
        "--rerank", type=int, default=0, metavar="N", help="order the N nearest by log p(question | passage); 0: do not"
    )
    flags.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args, overrides = cli.parse(flags)
    loaded = cli.chosen_config(args, overrides)
    config.require(loaded, "data.eval")
    cli.check_rerank(args.rerank, loaded)

    from rag_jax import pair
    from rag_jax.distributed import compile_cache
    from rag_jax.evaluation import evaluation
    from rag_jax.training import setup

    compile_cache.keep_compiled()
    opened = pair.open_pair(loaded, args.workdir)
    rows, report = evaluation.load_rows(loaded, opened.retriever_text, opened.prompt)
    if not args.json:
        print(f"{loaded.data.eval}: {report}", flush=True)
    if args.workdir is None:
        step, params = 0, pair.pretrained_params(opened)
    else:
        step, params = setup.saved_params(opened, args.workdir, args.step)
    result = evaluation.evaluate(opened.model, params, rows, args.index, args.rerank)
    content = evaluation.record(result, rows, opened.model, step, args.rerank)
    if args.workdir is not None and not args.rerank:  # the run's record is of what it trained alone
        evaluation.write_record(args.workdir, content, result.by_row)
    print(json.dumps(content, ensure_ascii=False) if args.json else table(content))


def table(content: dict[str, Any]) -> str:
    counts = content["counts"]
    over = f"{counts['queries']:,} queries, {counts['passages']:,} passages, K = {counts['candidates']}"
    lines = [f"step {content['step']}: {over}, {counts['answers']:,} answers"]
    shown = {name: value for name, value in content.items() if name.startswith("eval/")}
    lines += [
        f"  {name:<24}{value:>10.4f}   {content['intervals'][name][0]:.4f} to {content['intervals'][name][1]:.4f}"
        for name, value in shown.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
