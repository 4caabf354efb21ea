"""Prepare: a folder of documents in, a file of passages out. The same command again goes on where it stopped.

    python -m rag_jax.prepare --documents=DIR --out=DIR [--config=FILE.py]

Reads Markdown, text, reStructuredText, HTML, PDF, DOCX, EPUB and source code; needs pip install -e '.[documents]'.
Passages are cut along headings and paragraphs to what the config's retriever reads.
"""

import dataclasses
import importlib.util
import os
import time
from typing import Any

from rag_jax import cli, config
from rag_jax.errors import UserError

# Of the extra `documents`.
NEEDED = ("bs4", "lxml", "markdownify", "mammoth", "pypdf", "semantic_text_splitter")
DEFAULT_TOKENS = 200


def main() -> None:
    flags = cli.parser("prepare", __doc__)
    flags.add_argument("--documents", required=True, type=cli.path, metavar="DIR", help="a folder, or one file")
    flags.add_argument("--out", required=True, type=cli.path, metavar="DIR", help="where passages.parquet goes")
    flags.add_argument("--config", metavar="FILE.py", help="whose retriever's tokens count, up to data.passage_len")
    flags.add_argument(
        "--tokens", type=int, metavar="N", help=f"of a passage at most; without --config {DEFAULT_TOKENS}, roughly"
    )
    flags.add_argument("--code", action="store_true", help="source code too")
    flags.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="one for each core")
    args, overrides = cli.parse(flags)
    if not args.documents.exists():
        raise UserError(f"--documents={args.documents}: no such folder; fix the path")
    for name in ("tokens", "processes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)}: must be at least 1")
    others = [path.name for path in args.out.iterdir()] if args.out.is_dir() else []
    if args.out.exists() and (
        not args.out.is_dir() or not set(others) <= {"passages.parquet", "unread.jsonl", "parts"}
    ):
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
