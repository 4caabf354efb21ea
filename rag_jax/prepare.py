"""Prepare: a folder of documents in, a file of passages out. The same command again goes on where it stopped.

    python -m rag_jax.prepare --documents=DIR --out=DIR [--config=FILE.py]
    python -m rag_jax.prepare --documents=DIR --out=DIR --config=FILE.py --questions=2

Reads Markdown, text, reStructuredText, HTML, PDF, DOCX, EPUB and source code; needs pip install -e '.[documents]'.
Passages are cut along headings and paragraphs to what the config's retriever reads. With --questions the config's
generator, an instruction model, writes questions with answers; those that hold become rows to train on.
"""

import collections
import dataclasses
import importlib.util
import os
import time
from typing import Any

from rag_jax import cli, config
from rag_jax.errors import UserError
from rag_jax.objectives import ROLES

# Of the extra `documents`.
NEEDED = ("bs4", "lxml", "markdownify", "mammoth", "pypdf", "semantic_text_splitter")
DEFAULT_TOKENS = 200
# What the command itself writes to its folder.
WRITTEN = {"passages.parquet", "unread.jsonl", "parts", "rows.parquet", "questions.parquet"}


def main() -> None:
    flags = cli.parser("prepare", __doc__)
    flags.add_argument("--documents", required=True, type=cli.path, metavar="DIR", help="a folder, or one file")
    flags.add_argument("--out", required=True, type=cli.path, metavar="DIR", help="where passages.parquet goes")
    flags.add_argument("--config", metavar="FILE.py", help="whose retriever's tokens count, up to data.passage_len")
    flags.add_argument(
        "--tokens", type=int, metavar="N", help=f"of a passage at most; without --config {DEFAULT_TOKENS}, roughly"
    )
    flags.add_argument("--code", action="store_true", help="source code too")
    flags.add_argument("--questions", type=int, default=0, metavar="N", help="written of each passage, with answers")
    flags.add_argument("--instruction", type=cli.path, metavar="FILE", help="how they are asked for, with {passage}")
    flags.add_argument("--temperature", type=float, default=0.7, metavar="T", help="of the writing; 0: the likeliest")
    flags.add_argument("--top-p", type=float, default=0.9, metavar="P", help="sample among the likeliest that reach P")
    flags.add_argument("--seed", type=int, default=0, help="of the writing")
    flags.add_argument(
        "--found-within", type=int, default=10, metavar="K", help="keep questions whose passage is among the K nearest"
    )
    flags.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="one for each core")
    args, overrides = cli.parse(flags)
    if not args.documents.exists():
        raise UserError(f"--documents={args.documents}: no such folder; fix the path")
    for name, least in (("tokens", 1), ("processes", 1), ("found_within", 1), ("questions", 0), ("seed", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')}={getattr(args, name)}: must be at least {least}")
    if args.seed >= 2**32:
        raise UserError(f"--seed={args.seed}: must be less than 2**32")
    writing = writing_of(args, overrides) if args.questions else None
    others = [path.name for path in args.out.iterdir()] if args.out.is_dir() else []
    if args.out.exists() and (not args.out.is_dir() or not set(others) <= WRITTEN):
        raise UserError(
            f"--out={args.out}: holds something else; give a new folder, or that of an earlier such command"
        )
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"prepare needs {', '.join(missing)}; pip install -e '.[documents]'")

    from rag_jax.documents import build

    started = time.perf_counter()
    settings = dataclasses.replace(settings_of(args.config, overrides, args.tokens), code=args.code)
    result = build.build(args.documents, args.out, settings, args.processes)
    seconds = time.perf_counter() - started
    print(
        f"{result.read:,} of {result.documents:,} documents read, {result.read / seconds:,.0f} a second; "
        f"{result.passages:,} passages of at most {settings.most} tokens, {result.copies:,} copies left out"
    )
    if result.code:
        print(f"  left alone: {result.code:,} of source code; --code reads them")
    for reason, number in sorted(result.unread.items()):
        print(f"  not read: {number:,} {reason}")
    if result.unread:
        print(f"  which they are: {args.out / build.UNREAD}")
    print(
        f"passages   {args.out / build.PASSAGES}; next: python -m rag_jax.main ... "
        f"--config.data.passages={args.out / build.PASSAGES}"
    )
    if writing is not None:
        write_questions(args.out, config.load(args.config, overrides), writing, args.found_within)


def writing_of(args: Any, overrides: dict[str, str]) -> dict[str, Any]:
    """How questions are asked for. UserError for what cannot be."""
    if args.config is None:
        raise UserError(f"--questions={args.questions}: takes --config=FILE.py, whose generator writes them")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature={args.temperature}: must be a number from 0 on; 0 takes the likeliest")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p={args.top_p}: must be above 0 and at most 1")
    loaded = config.load(args.config, overrides)
    for role in ROLES:
        config.require(loaded, f"{role}.path")
    writing = {"num": args.questions, "temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    if args.instruction is not None:
        if not args.instruction.is_file():
            raise UserError(f"--instruction={args.instruction}: no such file; fix the path")
        text = args.instruction.read_text(encoding="utf-8", errors="replace").strip()
        if text.count("{passage}") != 1:
            raise UserError(f"--instruction={args.instruction}: must hold {{passage}} once, where the passage stands")
        writing |= {"instruction": text, "openings": ("",)}
    return writing


def write_questions(out: Any, loaded: Any, writing: dict[str, Any], found_within: int) -> None:
    """Rows to train on from the passages that lie in `out`."""
    from rag_jax import pair
    from rag_jax.distributed import compile_cache
    from rag_jax.documents import build
    from rag_jax.inference import questions
    from rag_jax.inference.trained import Trained

    compile_cache.keep_compiled()
    opened = pair.open_pair(loaded)
    trained = Trained(opened, pair.pretrained_params(opened), 0)
    if opened.prompt is not None and opened.prompt.tokenizer.chat_template is None:
        print(f"generator.path={loaded.generator.path!r} has no chat template: it is asked in plain text")
    passages = build.read_passages(out)
    texts = [passage["passage"] for passage in passages]
    started = time.perf_counter()
    asked = questions.Writing(**writing)
    written = questions.write(trained, texts, asked, out / build.PARTS)
    seconds = time.perf_counter() - started
    every = questions.checked(trained, texts, written, found_within)
    dropped = collections.Counter(one.dropped for one in every)
    kept = dropped.pop("", 0)
    build.write_rows(out, passages, [dataclasses.asdict(one) for one in every])
    print(
        f"{asked.num} question{'s'[: asked.num > 1]} of each of {len(texts):,} passages: {len(every):,} written, "
        f"{len(every) / seconds:.1f} a second; {kept:,} kept"
    )
    for reason, number in dropped.most_common():
        print(f"  dropped: {number:,} {reason}")
    print(f"  which they are, with ranks and gains: {out / build.QUESTIONS}")
    if not kept:
        raise UserError(f"--questions={asked.num}: none is kept; a larger generator writes better ones")
    print(
        f"rows       {out / build.ROWS}; next: python -m rag_jax.main ... --config.data.train={out / build.ROWS} "
        f"--config.data.passages={out / build.PASSAGES}"
    )


def settings_of(file: str | None, overrides: dict[str, str], most: int | None) -> Any:
    """Tokens of a passage, and by which tokenizer."""
    from rag_jax.documents import build

    if file is None:
        if overrides:
            raise UserError(f"--config.{next(iter(overrides))}: goes with --config=FILE.py")
        return build.Settings(most or DEFAULT_TOKENS, None)
    loaded = config.load(file, overrides)
    path = config.require(loaded, "retriever.path")

    from rag_jax import data, hf, pair

    source = hf.open_model(path, "retriever.path", "retriever")
    text = pair.retriever_text(loaded, {"retriever": source})
    assert text is not None
    # What stands before and around a passage takes its share.
    around, _ = data.retriever_tokens(text.tokenizer, [""], text.passage_prefix, text.passage_len)
    room = text.passage_len - int(around.lengths[0])
    if most is not None and most > room:
        raise UserError(f"--tokens={most}: data.passage_len={text.passage_len} leaves {room} for a passage")
    if not (source.folder / "tokenizer.json").is_file():
        raise UserError(f"retriever.path={path!r}: has no tokenizer.json to count by; leave --config out")
    return build.Settings(most or room, str(source.folder / "tokenizer.json"))


if __name__ == "__main__":
    cli.run(main)
