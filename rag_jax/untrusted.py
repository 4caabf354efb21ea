"""What comes from outside: paths and JSON read within bounds, texts shown without secrets and without markup."""

import json
import os
import pathlib
import re
from typing import Any

from rag_jax.errors import UserError

# No file of settings is larger; tokenizers, which may be, are read by their own library.
JSON_BYTES = 64 * 2**20
HIDDEN = "***"
LFS = b"version https://git-lfs"
MOST_SHOWN = 10_000
# What secrets look like; the groups around them stay.
SECRETS = re.compile(
    r"(?P<before>\b[a-z][a-z0-9+.-]*://)[^\s/@'\"]+(?P<after>@)"  # user:password@host
    r"|(?P<query>[?&](?:token|access_token|api_?key|key|secret|password|sig|signature|x-amz-signature|x-amz-credential)=)"
    r"[^&\s'\"]+"
    r"|(?P<bearer>\bbearer\s+)[\w.~+/=-]{8,}"
    r"|\b(?:hf_|gh[oprsu]_|github_pat_|glpat-|sk-|xox[abprs]-|api_org_)[\w-]{16,}"
    r"|\bAKIA[0-9A-Z]{16}\b",
    re.IGNORECASE,
)
SECRET_NAMES = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|SECRET_KEY|ACCESS_KEY|PRIVATE_KEY)$")
SECRET_CHARS = 12  # shorter values occur in ordinary texts
# Would end a code span, a table cell or a line of Markdown, or is the escape character itself.
MARKUP = re.compile("[\x00-\x1f\x7f-\x9f`|\\\\\u2028\u2029\ud800-\udfff]")


def redact(text: str) -> str:
    """The text without passwords, tokens and keys: those of the environment, and whatever looks like one."""
    for name, value in os.environ.items():
        if len(value) >= SECRET_CHARS and SECRET_NAMES.search(name.upper()):
            text = text.replace(value, HIDDEN)

    def hide(found: re.Match[str]) -> str:
        kept = found.groupdict(default="")
        return f"{kept['before']}{kept['query']}{kept['bearer']}{HIDDEN}{kept['after']}"

    return SECRETS.sub(hide, text)


def holds_secret(text: str) -> bool:
    """Whether a text looks as if it holds a password, a token or a key."""
    return SECRETS.search(text) is not None


def code(text: str) -> str:
    """A text for a code span in a Markdown table: what has a meaning there is escaped."""

    def escape(found: re.Match[str]) -> str:
        character = found.group()
        short = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}
        return short.get(character, f"\\u{ord(character):04x}")

    return MARKUP.sub(escape, text) or " "


def shown(text: str) -> str:
    """A message for a terminal: one line, no secrets, nothing that would move the cursor or turn the text around."""
    line = " ".join(redact(text).split())
    if len(line) > MOST_SHOWN:
        line = f"{line[:MOST_SHOWN]} ... ({len(line) - MOST_SHOWN} more characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def short(value: Any, most: int = 160) -> str:
    """A value's repr, truncated, so that a long value does not hide the other problems."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text) - most} more characters)"


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode the text; not where it holds a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_line(error: BaseException, most: int = 200) -> str:
    """An error's message on one line, or its kind where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def path(text: str, where: str) -> pathlib.Path:
    """The path with `~` expanded. UserError, beginning with `where`, for what no file system can hold."""
    try:
        expanded = pathlib.Path(text).expanduser()
        expanded.stat()
    except FileNotFoundError:
        pass
    except RuntimeError:
        raise UserError(f"{where}: there is no such user's folder; write the full path") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise UserError(f"{where}: {reason}; give another path or fix it") from None
    return expanded


def refuse_pointer(path: pathlib.Path, where: str) -> None:
    """UserError, beginning with `where`, for what Git LFS leaves in the place of a large file it did not fetch."""
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise UserError(
                f"{where} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull` in "
                f"{path.parent.absolute()}, or download it from the hub"
            )


def read_json(path: pathlib.Path, where: str) -> Any:
    """The content of a JSON file; UserError, beginning with `where`, for a file that is not JSON or absurdly large."""
    try:
        if path.stat().st_size > JSON_BYTES:
            raise UserError(f"{where} is larger than {JSON_BYTES >> 20} MiB; fetch it again")
        refuse_pointer(path, where)
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read (not a valid JSON file: {one_line(error)}); fetch it again") from None
