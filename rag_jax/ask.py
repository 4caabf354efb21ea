"""Ask: answers from a run's passages, with how likely each passage was and what share of the evidence it gave.

    python -m rag_jax.ask --workdir=DIR "a question"
    python -m rag_jax.ask --workdir=DIR                         # one question after another, typed or from a pipe
    python -m rag_jax.ask --workdir=DIR --questions=FILE        # one a line, or rows with a column of queries
    python -m rag_jax.ask --config=FILE.py --passages=FILE "a question"            # the models untrained
    python -m rag_jax.ask --config=FILE.py --models=DIR "a question"               # those of an export
    python -m rag_jax.ask --workdir=DIR --serve                 # a page to ask on, and its JSON endpoint

The passages are those of the run's data.train, data.eval and data.passages, or of --passages. They are embedded once;
the embeddings are kept on disk and reused by the same retriever.
"""

import argparse
import collections
import dataclasses
import functools
import importlib
import itertools
import json
import pathlib
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rag_jax import cli, untrusted
from rag_jax.data import rows, segments, tables
from rag_jax.errors import UserError
from rag_jax.objectives import OBJECTIVES, ROLES

if TYPE_CHECKING:
    from rag_jax.inference.answering import Decoding
    from rag_jax.inference.disk_index import Index
    from rag_jax.inference.trained import Answer, Part, Trained

PORT = 8000
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
    flags.add_argument("--index", type=cli.path, metavar="DIR", help="what rag_jax.index made, in their place")
    flags.add_argument("--questions", metavar="FILE", help="one a line, or rows by the config's column of queries")
    flags.add_argument("--candidates", type=int, metavar="K", help="passages read; objective.candidates if not given")
    flags.add_argument(
        "--rerank", type=int, default=0, metavar="N", help="read the best of the N nearest by log p(question | passage)"
    )
    flags.add_argument("--decoding", choices=("token", "sequence", "top1"), help="the objective's own if not given")
    flags.add_argument("--beams", type=int, default=1, metavar="W", help="more than 1: beam search")
    flags.add_argument("--length-penalty", type=float, default=0.0, metavar="X", help="log p / tokens ** X ranks beams")
    flags.add_argument("--temperature", type=float, default=0.0, metavar="T", help="above 0: sampled; 0: the likeliest")
    flags.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest that reach P")
    flags.add_argument("--seed", type=int, default=0, help="of sampling; the same question gets the same answer")
    flags.add_argument("--max-tokens", type=int, metavar="N", help="of an answer; data.answer_len if not given")
    flags.add_argument("--compare", action="store_true", help="the run's models before and after training")
    flags.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    flags.add_argument(
        "--serve", type=int, nargs="?", const=PORT, metavar="PORT", help=f"a page to ask on; port {PORT} if not given"
    )
    flags.add_argument("--host", metavar="HOST", help="of --serve; 127.0.0.1, this machine alone, if not given")
    args, overrides = cli.parse(flags)
    loaded = cli.chosen_config(args, overrides)
    check_flags(args, loaded)
    questions = given_questions(args, loaded)
    index = None if args.index is None else opened_index(args)
    passages, sources = (index.passages, index.sources) if index else cli.corpus(args.passages, loaded)
    say: Callable[[str], None] = functools.partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    decoding = args.decoding or OBJECTIVES[loaded.objective.name].likelihood
    K = 1 if decoding == "top1" else args.candidates or loaded.objective.candidates
    if K > len(passages):
        say(f"K = {K} is cut to the {len(passages)} passages there are")

    pairs = open_pairs(args, loaded, index or passages, say)
    how = how_to_decode(args, loaded, decoding, pairs)
    if args.serve is not None:
        serve(args, how, min(K, len(passages)), pairs, sources, say)
        return
    answered = []
    for asked in [questions] if questions else ([question] for question in typed(say)):
        answers = (
            pair.answers(asked, how, candidates=K, seed=args.seed, rerank=args.rerank) for pair in pairs.values()
        )
        for question, *of_pairs in zip(asked, *answers, strict=True):
            records = {name: record(answer, sources) for name, answer in zip(pairs, of_pairs, strict=True)}
            answered.append({"question": question} | (records if args.compare else records.popitem()[1]))
            if not args.json:
                print(report(answered[-1], questions is None or len(questions) > 1), flush=True)
    if not answered:
        raise UserError("no question: give one, --questions=FILE, or lines on stdin")
    if args.json:
        internal = ("likelihood", "eos_id")
        named = {name: value for name, value in dataclasses.asdict(how).items() if name not in internal}
        content = {
            "step": list(pairs.values())[-1].step,
            "decoding": {"name": decoding, **named, "seed": args.seed},
            "counts": {"passages": len(passages), "candidates": min(K, len(passages))},
            "definitions": DEFINITIONS,
        }
        print(json.dumps(content | (answered[0] if args.question else {"answers": answered}), ensure_ascii=False))


def check_flags(args: argparse.Namespace, loaded: Any) -> None:
    """UserError for values that no answer can be found with."""
    if args.serve is not None:
        for name in ("question", "questions", "json"):
            if getattr(args, name):
                shown = "a question" if name == "question" else f"--{name}"
                raise UserError(f"--serve={args.serve}: is asked by its page; leave out {shown}")
        try:
            importlib.import_module("rag_jax.serving.app")
        except ImportError as error:
            raise UserError(f"--serve: takes the package {error.name}; pip install 'rag_jax[serve]'") from None
    elif args.host is not None:
        raise UserError(f"--host={args.host}: goes with --serve")
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
    cli.check_rerank(args.rerank, loaded)
    for role in ROLES:
        if loaded[role].path is None:
            raise UserError(f"{role}.path=None: asking takes a retriever and a generator")


def given_questions(args: argparse.Namespace, loaded: Any) -> list[str] | None:
    """The questions of the command line or of its file; None: they are typed."""
    if args.questions is None:
        return [checked(" ".join(args.question), "the question")] if args.question else None
    if args.question:
        raise UserError("give either a question or --questions=FILE, not both")
    path, where = pathlib.Path(args.questions), f"--questions={args.questions}"
    if path.is_dir() or tables.kind_of(path) is not None:
        texts = rows.read_queries(args.questions, "--questions", loaded.data.columns.to_dict())
    elif path.is_file():
        try:
            texts = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: is not UTF-8 text ({error.reason}); save it as such") from None
    else:
        raise UserError(f"{where}: no such file; fix the path")
    found = [text.strip() for text in texts if text.strip()]
    if not found:
        raise UserError(f"{where}: holds no question")
    return found


def checked(question: str, where: str) -> str:
    if not question.strip():
        raise UserError(f"{where} is empty; ask something")
    if not untrusted.is_unicode(question):
        raise UserError(f"{where} holds half a character (a lone surrogate); fix its encoding")
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


def how_to_decode(args: argparse.Namespace, loaded: Any, decoding: str, pairs: "dict[str, Trained]") -> "Decoding":
    from rag_jax.inference.answering import Decoding

    source = next(iter(pairs.values())).opened.sources["generator"]
    num_tokens = loaded.data.answer_len if args.max_tokens is None else args.max_tokens
    prompt_len = loaded.data.prompt_passage_len + loaded.data.prompt_query_len
    if prompt_len + num_tokens > source.model_config.max_positions:
        raise UserError(
            f"--max-tokens={num_tokens}: behind a prompt of {prompt_len} tokens, generator.path={source.path!r} has "
            f"{source.model_config.max_positions - prompt_len} positions left; lower it"
        )
    return Decoding(
        likelihood="token" if decoding == "top1" else decoding,
        num_tokens=num_tokens,
        eos_id=segments.eos_id(source.tokenizer),
        num_beams=args.beams,
        length_penalty=args.length_penalty,
        temperature=args.temperature,
        top_p=args.top_p,
    )


def opened_index(args: argparse.Namespace) -> "Index":
    """That of --index; UserError where it cannot be asked from."""
    from rag_jax.inference import disk_index

    for name, reason in {"passages": "an index has its own", "compare": "it is of one retriever"}.items():
        if getattr(args, name):
            raise UserError(f"--index={args.index}: leave out --{name}, {reason}")
    return disk_index.opened(args.index)


def open_pairs(
    args: argparse.Namespace, loaded: Any, passages: "tuple[str, ...] | Index", say: Callable[[str], None]
) -> "dict[str, Trained]":
    """The models that are asked, by what they are called; with --compare two of them."""
    from rag_jax import pair  # here: it takes seconds to load, and everything above answers at once
    from rag_jax.distributed import compile_cache
    from rag_jax.inference.trained import Trained
    from rag_jax.training import setup

    compile_cache.keep_compiled()
    pairs = {}
    if args.workdir is None or args.compare:
        opened = pair.open_pair(loaded)
        pairs["untrained"] = Trained(opened, pair.pretrained_params(opened), 0)
    if args.workdir is not None:
        opened = pair.open_pair(loaded, args.workdir)
        step, params = setup.saved_params(opened, args.workdir, args.step)
        pairs["trained"] = Trained(opened, params, step)
    for trained in pairs.values():
        began = time.monotonic()
        if not isinstance(passages, tuple):
            trained.use_index(passages)
        elif not trained.use(passages):
            say(f"{len(passages):,} passages embedded in {time.monotonic() - began:.1f} s")
    return pairs


def record(answer: "Answer | Part", sources: dict[str, str]) -> dict[str, Any]:
    """An answer for --json, or what is known of one; a passage's source where it is known."""
    from rag_jax.inference.trained import Answer

    columns = {"cosine": answer.cosine, "probability": answer.doc_probs}
    whole = {}
    if isinstance(answer, Answer):
        columns["evidence"] = answer.evidence
        whole = {"log_prob": answer.log_prob, "tokens": answer.num_tokens}
    return {
        "answer": answer.answer,
        **whole,
        "passages": [
            {"passage": passage}
            | ({"source": sources[passage]} if passage in sources else {})
            | {name: float(values[k]) for name, values in columns.items()}
            for k, passage in enumerate(answer.passages)
        ],
    }


def serve(
    args: argparse.Namespace, how: "Decoding", K: int, pairs: "dict[str, Trained]", sources: dict[str, str],
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """The page and its endpoint, until a signal to stop."""
    from rag_jax.inference import trained
    from rag_jax.serving import app, engine

    def show(question: str, known: Mapping[str, Any]) -> dict[str, Any]:
        records = {name: record(answer, sources) for name, answer in known.items()}
        return {"question": question} | (records if args.compare else next(iter(records.values())))

    def answering(pair: "Trained") -> engine.Answering:
        def stream(questions: Sequence[str]) -> Iterator[tuple[int, Any]]:
            return pair.stream(questions, how, candidates=K, seed=args.seed, rerank=args.rerank)

        return stream

    last = list(pairs.values())[-1]
    sections = (last.opened.config[role].path for role in ROLES)
    about = {
        "models": [pathlib.PurePath(path).name for path in sections],
        "step": last.step,
        "pairs": list(pairs) if args.compare else [],
        "passages": len(last.passages),
        "candidates": K,
        "definitions": DEFINITIONS,
    }
    where = app.bind(args.host or "127.0.0.1", args.serve)
    streams = {name: answering(pair) for name, pair in reversed(pairs.items())}  # the trained pair's answer comes first
    for stream in streams.values():  # what is compiled now, nobody waits for
        collections.deque(stream(["What is this about?"]), maxlen=0)
    running = engine.Engine(streams, trained.BATCH_SIZE)
    say(f"{app.address(where)} serves; Ctrl-C ends it")
    app.run(app.make(running, show, about, args.host or "127.0.0.1"), where)
    running.close()


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
        short = functools.partial(textwrap.shorten, width=max(width - 19, 20), placeholder=" ...")
        lines.append(f"{row['probability']:7.1%}{row['evidence']:10.1%}  {short(row['passage'])}")
        lines += [f"{'':19}{short(row['source'])}"] if "source" in row else []
    return lines


if __name__ == "__main__":
    cli.run(main)
