"""A file's text as Markdown: headings stay, navigation goes."""

import dataclasses
import io
import pathlib
import posixpath
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any
from xml.etree import ElementTree

from rag_jax import untrusted
from rag_jax.errors import UserError

# A file is read into memory whole.
MOST_BYTES = 256 * 2**20
# Of a web page: what is not its text, by element, role and link.
NO_TEXT = {"script", "style", "noscript", "template", "svg", "iframe", "form", "button", "nav", "aside"}
NAVIGATION_ROLES = {"navigation", "banner", "contentinfo", "search", "complementary", "menu", "menubar"}
PERMALINKS = {"headerlink", "permalink", "header-anchor", "doc-anchor"}
# Where a page says what its text is, in this order.
MAIN = ("main", "article", "body")
# Of the text of a whole page, that what it calls its main part must hold: else it is not believed.
LEAST_SHARE = 0.3
TITLE_CHARS = 200
AS_IT_IS: dict[str, Any] = dict.fromkeys(("escape_misc", "escape_underscores", "escape_asterisks"), False)
# Characters of a line that nobody has written by hand.
LONGEST_LINE = 5_000
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
BLANK_LINES = re.compile(r"\n{3,}")


class Unreadable(ValueError):
    """A file without a text that can be had; the message says why."""


@dataclasses.dataclass(frozen=True)
class Document:
    title: str
    text: str  # Markdown


def convert(path: pathlib.Path) -> Document:
    """The text of a file by its suffix. Unreadable for what is damaged, empty, or of no known kind."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise Unreadable("of an unknown kind")
    if path.stat().st_size > MOST_BYTES:
        raise Unreadable(f"larger than {MOST_BYTES >> 20} MiB")
    try:
        found = reader(path)
    except (Unreadable, UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # of many kinds: each format's reader has its own
        raise Unreadable(f"damaged ({untrusted.one_line(error)})") from None
    text = BLANK_LINES.sub("\n\n", _printable(found.text)).strip()
    if not text:
        raise Unreadable("without text (scanned pages need recognition first)")
    title = " ".join(_printable(found.title).split())[:TITLE_CHARS] or path.stem
    return Document(title, text)


def _printable(text: str) -> str:
    """Without what no text needs: NULs and other control characters, halves of surrogate pairs."""
    kept = "".join(c for c in text.replace("\r\n", "\n").replace("\r", "\n") if c in "\n\t" or c >= " ")
    return kept.encode("utf-8", "ignore").decode()


def _read_text(path: pathlib.Path) -> str:
    content = path.read_bytes()
    if b"\0" in content[:4096] and not content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Unreadable("not a text")
    for encoding in ("utf-8-sig", "utf-16") if content.startswith((b"\xff\xfe", b"\xfe\xff")) else ("utf-8-sig",):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    return content.decode("cp1252", "replace")  # what is left of the old ones


def _markdown(path: pathlib.Path) -> Document:
    text, title = _read_text(path), ""
    if front := FRONT_MATTER.match(text):
        text = text[front.end() :]
        named = re.search(r"^title:\s*(.+)$", front[1], re.MULTILINE)
        title = named[1].strip("\"' ") if named else ""
    heading = re.search(r"^#\s+(.+)$", text, re.MULTILINE)
    return Document(title or (heading[1] if heading else ""), text)


def _plain(path: pathlib.Path) -> Document:
    return Document("", _read_text(path))


def _rst(path: pathlib.Path) -> Document:
    """reStructuredText, its underlined headings as Markdown's."""
    lines, levels, found = _read_text(path).splitlines(), [], []
    for i, line in enumerate(lines):
        below = lines[i + 1] if i + 1 < len(lines) else ""
        is_rule = bool(re.fullmatch(r"([=\-~^\"'`#*+.:_])\1{2,}\s*", below)) and len(below.rstrip()) >= len(
            line.strip()
        )
        if line.strip() and is_rule and not re.fullmatch(r"(\W)\1+\s*", line):
            mark = below[0]
            levels += [mark] if mark not in levels else []
            found.append(f"{'#' * min(levels.index(mark) + 1, 6)} {line.strip()}")
        elif not re.fullmatch(r"([=\-~^\"'`#*+.:_])\1{2,}\s*", line):
            found.append(line)
    text = "\n".join(found)
    heading = re.search(r"^#\s+(.+)$", text, re.MULTILINE)
    return Document(heading[1] if heading else "", text)


def _code(path: pathlib.Path) -> Document:
    text = _read_text(path)
    if max(map(len, text.splitlines()), default=0) > LONGEST_LINE:
        raise Unreadable("code that a program has written")
    return Document(path.name, f"```{path.suffix[1:]}\n{text}\n```")


def _html(path: pathlib.Path) -> Document:
    return of_html(path.read_bytes())


def of_html(content: bytes | str) -> Document:
    """A page's title and its main text."""
    import bs4
    import markdownify

    page = bs4.BeautifulSoup(content, "lxml")
    title = page.title.get_text(" ", strip=True) if page.title else ""
    for element in page.find_all(_is_no_text):
        element.decompose()
    whole = len(page.get_text(" ", strip=True))
    found = (page.find(_is_main(kind)) for kind in MAIN)
    main: Any = next((e for e in found if e and len(e.get_text(" ", strip=True)) >= LEAST_SHARE * whole), page)
    for element in main.find_all(("img", "a")):
        if element.name == "a":  # the texts of links are read, their addresses are not
            element.unwrap()
        else:
            element.replace_with(str(element.get("alt") or "").strip())
    converter = markdownify.MarkdownConverter(heading_style="ATX", bullets="-", **AS_IT_IS)
    return Document(title, converter.convert_soup(main))


def _is_no_text(element: Any) -> bool:
    """Whether an element of a page is navigation, or nothing that is read."""
    if element.name in NO_TEXT or element.get("role") in NAVIGATION_ROLES:
        return True
    return element.name == "a" and bool(PERMALINKS.intersection(element.get("class") or ()))


def _is_main(kind: str) -> Callable[[Any], bool]:
    return lambda element: element.name == kind or (kind == "main" and element.get("role") == "main")


def _docx(path: pathlib.Path) -> Document:
    import mammoth

    with path.open("rb") as file:
        return of_html(mammoth.convert_to_html(file).value)


def _pdf(path: pathlib.Path) -> Document:
    import pypdf

    with path.open("rb") as file:
        reader = pypdf.PdfReader(io.BytesIO(file.read()))
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("locked by a password")
        title = str((reader.metadata or {}).get("/Title") or "")
        pages = [_unhyphenated(page.extract_text()) for page in reader.pages]
    return Document(title, "\n\n".join(pages))


def _unhyphenated(text: str) -> str:
    """Words that a line's end parted, in one piece."""
    return re.sub(r"(\w)-\n(?=[a-zß-ÿ])", r"\1", text)


def _epub(path: pathlib.Path) -> Document:
    """The pages of a book in the order of its spine."""
    with zipfile.ZipFile(path) as book:
        container = _xml(book.read("META-INF/container.xml"))
        package = next(e.get("full-path", "") for e in container.iter() if e.tag.endswith("}rootfile"))
        content = _xml(book.read(package))
        title = next((e.text or "" for e in content.iter() if e.tag.endswith("}title")), "")
        files = {e.get("id"): e.get("href", "") for e in content.iter() if e.tag.endswith("}item")}
        order = [
            files[e.get("idref")] for e in content.iter() if e.tag.endswith("}itemref") and e.get("idref") in files
        ]
        pages = [of_html(book.read(name)).text for name in _in(book, posixpath.dirname(package), order)]
    return Document(title, "\n\n".join(pages))


def _in(book: zipfile.ZipFile, folder: str, names: list[str]) -> Iterator[str]:
    total = 0
    for name in names:
        path = posixpath.normpath(posixpath.join(folder, name.split("#")[0]))
        total += book.getinfo(path).file_size
        if total > MOST_BYTES:
            raise Unreadable(f"larger than {MOST_BYTES >> 20} MiB when unpacked")
        yield path


def _xml(content: bytes) -> ElementTree.Element:
    if b"<!ENTITY" in content:  # which could name itself without end
        raise Unreadable("an XML file with entities of its own")
    return ElementTree.fromstring(content)


CODE = (
    ".py", ".js", ".ts", ".tsx", ".jsx", ".java", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".go", ".rs", ".rb", ".php",
    ".swift", ".kt", ".scala", ".sh", ".sql", ".r", ".jl", ".lua", ".pl", ".yaml", ".yml", ".toml", ".ini", ".cfg",
)  # fmt: skip
DOCUMENTS: dict[str, Callable[[pathlib.Path], Document]] = {
    ".md": _markdown,
    ".markdown": _markdown,
    ".mdx": _markdown,
    ".txt": _plain,
    ".text": _plain,
    ".rst": _rst,
    ".html": _html,
    ".htm": _html,
    ".xhtml": _html,
    ".docx": _docx,
    ".pdf": _pdf,
    ".epub": _epub,
}
READERS = DOCUMENTS | dict.fromkeys(CODE, _code)
