"""Ask: answers from a run's passages, with how likely each passage was and what share of the evidence it gave.

    python -m rag_jax.ask --workdir=DIR "a question"
    python -m rag_jax.ask --workdir=DIR                         # one question after another, typed or from a pipe
    python -m rag_jax.ask --workdir=DIR --questions=FILE        # one a line, or rows with a column of queries
    python -m rag_jax.ask --config=FILE.py --passages=FILE "a question"            # the models untrained
    python -m rag_jax.ask --config=FILE.py --models=DIR "a question"               # those of an export

The passages are those of the run's data.train, data.eval and data.passages, or of --passages. They are embedded once;
what they were embedded to is kept and found again by the same retriever.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rag_jax import cli, data
from rag_jax.data import rows, segments
from rag_jax.errors import UserError
from rag_jax.evaluation.metrics import HIGHER_IS_BETTER
from rag_jax.inference import answering
from rag_jax.objectives import OBJECTIVES
from rag_jax.workdir import checkpoint

# Questions of a file that are answered at a time.
BATCH_SIZE = 8
DEFINITIONS = {
    "probability": "p(passage | question) = softmax(cosine / objective.marginal_temperature) over the passages read",
    "evidence": "posterior share of the passage: p(passage | question, answer) for decoding=sequence; for token "
    "and top1 the mean over the answer's tokens of p(passage | question, token)",
    "log_prob": "log p(answer | question), the marginal over the passages read, nats, end-of-sequence included",
}


def main() -> None:
    flags = cli.parser("ask", __doc__)
    flags.add_argument("question", nargs="*", help="none: they are asked for")
    cli.add_choice_of_models(flags)
    flags.add_argument("--passages", metavar="FILE", help="what to answer from, by the config's column of passages")
    flags.add_argument("--questions", metavar="FILE", help="one a line, or rows by the config's column of queries")
    flags.add_argument("--candidates", type=int, metavar="K", help="passages read; objective.candidates if not given")
    flags.add_argument("--decoding", choices=("token", "sequence", "top1"), help="the objective's own if not given")
    flags.add_argument("--beams", type=int, default=1, metavar="W", help="more than 1: beam search")
    flags.add_argument("--length-penalty", type=float, default=0.0, metavar="X", help="log p / tokens ** X ranks beams")
    flags.add_argument("--temperature", type=float, default=0.0, metavar="T", help="above 0: sampled; 0: the likeliest")
    flags.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest that reach P")
    flags.add_argument("--seed", type=int, default=0, help="of sampling; the same question gets the same answer")
    flags.add_argument("--max-tokens", type=int, metavar="N", help="of an answer; data.answer_len if not given")
    flags.add_argument("--compare", action="store_true", help="the run's models before and after training")
    flags.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args, overrides = cli.parse(flags)
    loaded = cli.chosen_config(args, overrides)
    check_flags(args, loaded)
    questions = given_questions(args, loaded)
    passages = corpus(args, loaded)
    say: Callable[[str], None] = functools.partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    if (K := candidates_of(args, loaded)) > len(passages):
        say(f"K = {K} is cut to the {len(passages)} passages there are")

    pairs = open_pairs(args, loaded, passages, say)
    settings = settings_of(args, loaded, pairs, 1 if questions is None else min(BATCH_SIZE, len(questions)))
    answered = []
    for batch in batches(questions, settings.batch_size) if questions else ([q] for q in typed(say)):
        for found in ask(pairs, batch, settings):
            answered.append(found)
            if not args.json:
                print(report(found, questions is None or len(questions) > 1), flush=True)
    if not answered:
        raise UserError("no question: give one, --questions=FILE, or lines on stdin")
    if args.json:
        record = described(args, pairs, settings) | (answered[0] if args.question else {"answers": answered})
        print(json.dumps(record, ensure_ascii=False))


def batches(questions: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (questions[start : start + size] for start in range(0, len(questions), size))


def check_flags(args: argparse.Namespace, loaded: Any) -> None:
    """UserError for values that no answer can be found with."""
    if args.compare and args.workdir is None:
        raise UserError("--compare: goes with --workdir; the models of --config are untrained")
    for name, least in (("candidates", 1), ("beams", 1), ("max_tokens", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}={value}: must be at least {least}")
    if args.seed >= 2**32:
        raise UserError(f"--seed={args.seed}: must be less than 2**32")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature={args.temperature}: must be a number from 0 on; 0 takes the likeliest")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p={args.top_p}: must be above 0 and at most 1")
    if not 0 <= args.length_penalty < float("inf"):
        raise UserError(f"--length-penalty={args.length_penalty}: must be a number from 0 on")
    if args.temperature > 0 and args.beams > 1:
        raise UserError(
            f"--beams={args.beams}, --temperature={args.temperature}: beams are not sampled; give one of them"
        )
    if args.top_p < 1 and args.temperature == 0:
        raise UserError(f"--top-p={args.top_p}: goes with --temperature above 0")
    for role in ("retriever", "generator"):
        if loaded[role].path is None:
            raise UserError(f"{role}.path=None: asking takes a retriever and a generator")


def given_questions(args: argparse.Namespace, loaded: Any) -> list[str] | None:
    """The questions of the command line or of its file; None: they are typed."""
    if args.questions is None:
        return [checked(" ".join(args.question), "the question")] if args.question else None
    if args.question:
        raise UserError("give either a question or --questions=FILE, not both")
    path, where = pathlib.Path(args.questions), f"--questions={args.questions}"
    if path.is_dir() or path.suffix.lower() in rows.READERS:
        (texts,) = rows.read_columns(args.questions, "--questions", {"data.columns.query": loaded.data.columns.query})
    elif path.is_file():
        try:
            texts = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: is not UTF-8 text ({error.reason}); save it as such") from None
    else:
        raise UserError(f"{where}: no such file; mend the path")
    found = [text.strip() for text in texts if text.strip()]
    if not found:
        raise UserError(f"{where}: holds no question")
    return found


def checked(question: str, where: str) -> str:
    if not question.strip():
        raise UserError(f"{where} is empty; ask something")
    try:
        question.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half a character (a lone surrogate); mend its encoding") from None
    return question.strip()


def typed(say: Callable[[str], None]) -> Iterator[str]:
    """The lines of stdin that are questions, up to its end; what is wrong with one does not keep it from the next."""
    prompt = "\n> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError("stdin is not UTF-8 text; convert it first") from None
        if line.strip():
            try:
                yield checked(line, "the question")
            except UserError as error:
                say(str(error))


def corpus(args: argparse.Namespace, loaded: Any) -> tuple[str, ...]:
    """The distinct passages of --passages, or else of all the files that the config names."""
    sources = {"--passages": args.passages}
    if args.passages is None:
        sources = {f"data.{name}": loaded.data[name] for name in ("train", "eval", "passages")}
    column = loaded.data.columns.passage
    texts = [data.read_passages(source, column, key) for key, source in sources.items() if source is not None]
    passages = tuple(dict.fromkeys(itertools.chain(*texts)))
    if not passages:
        given = (
            f"--passages={args.passages!r} has none in column {column!r}" if texts else "--passages=FILE is not given"
        )
        raise UserError(f"no passages to answer from: {given}")
    return passages


def candidates_of(args: argparse.Namespace, loaded: Any) -> int:
    if args.decoding == "top1":
        return 1
    return loaded.objective.candidates if args.candidates is None else args.candidates


def settings_of(
    args: argparse.Namespace, loaded: Any, pairs: dict[str, answering.Answerer], batch_size: int
) -> answering.Settings:
    source = next(iter(pairs.values())).opened.sources["generator"]
    num_tokens = loaded.data.answer_len if args.max_tokens is None else args.max_tokens
    prompt_len = loaded.data.prompt_passage_len + loaded.data.prompt_query_len
    if prompt_len + num_tokens > source.model_config.max_positions:
        raise UserError(
            f"--max-tokens={num_tokens}: behind a prompt of {prompt_len} tokens, generator.path={source.path!r} has "
            f"{source.model_config.max_positions - prompt_len} positions left; lower it"
        )
    decoding = answering.Decoding(
        likelihood={"top1": "token"}.get(decoding := decoding_of(args, loaded), decoding),
        num_tokens=num_tokens,
        eos_id=segments.eos_id(source.tokenizer),
        num_beams=args.beams,
        length_penalty=args.length_penalty,
        temperature=args.temperature,
        top_p=args.top_p,
    )
    return answering.Settings(decoding, candidates_of(args, loaded), batch_size, args.seed)


def decoding_of(args: argparse.Namespace, loaded: Any) -> str:
    return args.decoding or OBJECTIVES[loaded.objective.name].likelihood


def open_pairs(
    args: argparse.Namespace, loaded: Any, passages: tuple[str, ...], say: Callable[[str], None]
) -> dict[str, answering.Answerer]:
    """The models that are asked, by what they are called; with --compare two of them."""
    from rag_jax import pair  # here: it takes seconds to load, and everything above answers at once
    from rag_jax.distributed import compile_cache

    compile_cache.keep_compiled()

    def answerer(opened: Any, params: dict, step: int) -> Any:
        began = time.monotonic()
        emb, found = answering.corpus_emb(opened, params, passages)
        if not found:
            say(f"{len(passages):,} passages embedded in {time.monotonic() - began:.1f} s")
        return answering.Answerer(opened, params, step, passages, emb)

    pairs = {}
    if args.workdir is None or args.compare:
        opened = pair.open_pair(loaded)
        pairs["untrained"] = answerer(opened, pair.pretrained_params(opened), 0)
    if args.workdir is not None:
        opened = pair.open_pair(loaded, args.workdir)
        with checkpoint.Checkpoints(args.workdir, higher_is_better=HIGHER_IS_BETTER) as checkpoints:
            step = checkpoints.find(args.step)
            params = checkpoints.restore({"params": pair.abstract_params(opened)}, step)["params"]
        pairs["trained"] = answerer(opened, params, step)
    return pairs


def ask(
    pairs: dict[str, answering.Answerer], questions: Sequence[str], settings: answering.Settings
) -> Iterable[dict[str, Any]]:
    """One record a question; of several pairs each one's under its name."""
    if len(pairs) == 1:
        (pair,) = pairs.values()
        return [
            {"question": q} | found
            for q, found in zip(questions, answering.ask(pair, questions, settings), strict=True)
        ]
    found = {name: answering.ask(pair, questions, settings) for name, pair in pairs.items()}
    return [{"question": q} | {name: found[name][i] for name in found} for i, q in enumerate(questions)]


def described(
    args: argparse.Namespace, pairs: dict[str, answering.Answerer], settings: answering.Settings
) -> dict[str, Any]:
    """What the record says of how its answers were made."""
    pair = list(pairs.values())[-1]
    how = decoding_of(args, pair.opened.config)
    decoding = {"name": how} | dataclasses.asdict(settings.decoding) | {"seed": settings.seed}
    for internal in ("likelihood", "eos_id"):
        del decoding[internal]
    return {
        "step": pair.step,
        "decoding": decoding,
        "counts": {"passages": len(pair.passages), "candidates": min(settings.candidates, len(pair.passages))},
        "definitions": DEFINITIONS,
    }


def report(found: dict[str, Any], with_question: bool) -> str:
    """A record for a terminal: answer and table of passages; two pairs side by side."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 160)
    head = [f"> {found['question']}", ""] if with_question else []
    if "answer" in found:
        return "\n".join([*head, *block(found, width), ""])
    half = (width - 3) // 2
    columns = [[name, "-" * half, *block(found[name], half)] for name in ("untrained", "trained")]
    lines = [f"{left:<{half}} | {right}" for left, right in itertools.zip_longest(*columns, fillvalue="")]
    return "\n".join([*head, *lines, ""])


def block(found: dict[str, Any], width: int) -> list[str]:
    lines = textwrap.wrap(found["answer"], width) or ["(an empty answer)"]
    lines += ["", " p(k|q)  evidence  passage"]
    for row in found["passages"]:
        passage = textwrap.shorten(row["passage"], max(width - 19, 20), placeholder=" ...")
        lines.append(f"{row['probability']:7.1%}{row['evidence']:10.1%}  {passage}")
    return lines


if __name__ == "__main__":
    cli.run(main)
