"""Documents to passages: what is read of each kind of file, how it is cut, and that nothing is lost unseen."""

import json
import os
import random
import re
import zipfile

import numpy as np
import pyarrow.parquet
import pytest
from command import call

from rag_jax import hf
from rag_jax.data import rows as row_files
from rag_jax.documents import build, convert, copies, split
from rag_jax.errors import UserError

PAGE = """<html><head><title>The mill</title><style>p {}</style></head><body>
<nav><a href="x">Everything else</a></nav><div role="banner">Site of mills</div>
<main><h1>The mill<a class="headerlink" href="#m">¶</a></h1>
<p>It has <b>three</b> floors &amp; a <code>wheel_of</code> oak.</p>
<h2>The wheel</h2><ul><li>turns</li><li>stands</li></ul><pre>a  &lt; b
  c</pre><table><tr><th>part</th><th>wood</th></tr><tr><td>axle</td><td>oak</td></tr></table>
<p>See <a href="y">the miller</a><img src="z" alt="a picture of it">.</p><script>alert(1)</script></main>
<footer role="contentinfo">Copyright</footer></body></html>"""


def docx(path):
    kinds = "http://schemas.openxmlformats.org"
    word = f'xmlns:w="{kinds}/wordprocessingml/2006/main"'
    paragraphs = (
        '<w:p><w:pPr><w:pStyle w:val="Heading1"/></w:pPr><w:r><w:t>The mill</w:t></w:r></w:p>'
        "<w:p><w:r><w:t>It has three floors.</w:t></w:r></w:p>"
    )
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("[Content_Types].xml", f'<Types xmlns="{kinds}/package/2006/content-types"/>')
        relation = (
            f'<Relationship Id="r" Type="{kinds}/officeDocument/2006/relationships/officeDocument" Target="d.xml"/>'
        )
        file.writestr(
            "_rels/.rels", f'<Relationships xmlns="{kinds}/package/2006/relationships">{relation}</Relationships>'
        )
        style = '<w:style w:type="paragraph" w:styleId="Heading1"><w:name w:val="heading 1"/></w:style>'
        file.writestr("styles.xml", f"<w:styles {word}>{style}</w:styles>")
        file.writestr("d.xml", f"<w:document {word}><w:body>{paragraphs}</w:body></w:document>")


def pdf(path):
    stream = b"BT /F1 12 Tf 72 700 Td (The mill has three flo-) Tj 0 -14 Td (ors of oak.) Tj ET"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        b"<< /Title (Of mills) >>",
    ]
    content, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, start=1):
        places.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    at = content.rfind(b"endobj") + 7
    content += b"xref\n0 7\n0000000000 65535 f \n%strailer\n<< /Size 7 /Root 1 0 R /Info 6 0 R >>\n" % table
    content += b"startxref\n%d\n%%%%EOF" % at
    path.write_bytes(content)


def epub(path):
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("META-INF/container.xml", '<c xmlns="urn:x"><rootfile full-path="in/b.opf"/></c>')
        spine = '<spine><itemref idref="two"/><itemref idref="one"/></spine>'
        items = '<manifest><item id="one" href="1.xhtml"/><item id="two" href="2.xhtml"/></manifest>'
        book.writestr("in/b.opf", f'<p xmlns="urn:y" xmlns:dc="urn:z"><dc:title>Mills</dc:title>{items}{spine}</p>')
        book.writestr("in/1.xhtml", "<html><body><p>Second it is.</p></body></html>")
        book.writestr("in/2.xhtml", "<html><body><h1>The mill</h1><p>First it is.</p></body></html>")


MARKDOWN = "# The mill\n\nIt has *three* floors."
KINDS = {
    "a.md": (f"---\ntitle: 'Of mills'\n---\n{MARKDOWN}\n", "Of mills", MARKDOWN),
    "b.md": ("# The mill\n\nIt turns.\r\n", "The mill", "# The mill\n\nIt turns."),
    "c.txt": ("It has three floors.\x00"[:-1] + "\x07", "c", "It has three floors."),
    "d.rst": (
        "The mill\n========\n\nIt turns.\n\nThe wheel\n---------\n\nOak.\n",
        "The mill",
        "# The mill\n\nIt turns.\n\n## The wheel\n\nOak.",
    ),
    "e.py": ("def mill():\n    return 3\n", "e.py", "```py\ndef mill():\n    return 3\n\n```"),
    "f.docx": (docx, "f", "# The mill\n\nIt has three floors."),
    "g.pdf": (pdf, "Of mills", "The mill has three floors of oak."),
    "h.epub": (epub, "Mills", "# The mill\n\nFirst it is.\n\nSecond it is."),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_file_as_markdown(tmp_path, name):
    content, title, text = KINDS[name]
    if callable(content):
        content(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content.encode())
    assert convert.convert(tmp_path / name) == convert.Document(title, text)


def test_of_a_web_page_its_main_text(tmp_path):
    (tmp_path / "p.html").write_text(PAGE)
    found = convert.convert(tmp_path / "p.html")
    assert found.title == "The mill"
    assert found.text.startswith(
        "# The mill\n\nIt has **three** floors & a `wheel_of` oak.\n\n## The wheel\n\n- turns\n- stands"
    )
    assert "a  < b\n  c" in found.text and "| axle | oak |" in found.text
    assert "See the millera picture of it." in found.text.replace("\n", " ")
    assert not re.search("Everything|Site of|Copyright|alert|¶|href", found.text)


def test_a_main_part_that_is_none_is_not_believed():
    page = f"<body><main>Loading</main><div><p>{'It has three floors. ' * 20}</p></div></body>"
    assert convert.of_html(page).text.count("three floors") == 20


BAD = {
    "x.pdf": (b"%PDF-1.4 broken", "damaged"),
    "x.docx": (b"PK\x03\x04", "damaged"),
    "x.epub": (b"no zip", "damaged"),
    "x.txt": (b"\x7fELF\0\0", "not a text"),
    "y.txt": (b"  \n", "without text"),
    "x.js": (b"a=1;" * 5000, "code that a program has written"),
    "x.png": (b"\x89PNG", "of an unknown kind"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_told(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(convert.Unreadable, match=message):
        convert.convert(tmp_path / name)


def test_an_xml_bomb_is_not_set_off(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.epub", "w") as book:
        book.writestr("META-INF/container.xml", '<!DOCTYPE l [<!ENTITY a "lol"><!ENTITY b "&a;&a;">]><l>&b;</l>')
    with pytest.raises(convert.Unreadable, match="entities of its own"):
        convert.convert(tmp_path / "x.epub")


def test_passages_are_cut_along_headings_and_know_them(tmp_path):
    text = "# Mills\n\n" + "Of mills in general there is much. " * 8
    text += "\n\n## Wheels\n\n### Oak\n\n" + "An oaken wheel lasts for a hundred years. " * 4
    text += "\n\n```\n# no heading\n```\n\n## Stones\n\n" + "A millstone is cut of hard stone. " * 12 + "\n\n***\n"
    found = split.passages(convert.Document("Mills", text), "m.md", split.splitter(None, 60))
    assert [one.position for one in found] == list(range(len(found)))
    assert all(one.tokens == split.words(one.passage) <= 60 and one.document == "m.md" for one in found)
    assert {one.section for one in found} == {"", "Wheels > Oak", "Stones"}
    words = lambda whole: re.findall(r"\w+", re.sub(r"^#+ .*", "", whole, flags=re.MULTILINE))  # noqa: E731
    assert sum((words(one.passage) for one in found), []) == words(text)


def test_copies_and_near_copies_are_found_and_others_are_not():
    draw = random.Random(0)
    vocabulary = [f"word{i}" for i in range(2000)]
    texts = [" ".join(draw.choices(vocabulary, k=120)) for _ in range(60)]
    changed = [text.replace(text.split()[50], "other") for text in texts[:20]]
    half = [" ".join(text.split()[:60] + draw.choices(vocabulary, k=60)) for text in texts[20:40]]
    every = [*texts, *(text.upper() + "  " for text in texts[:5]), *changed, *half]
    signatures = np.stack([copies.signature(text) for text in every])
    keep = copies.firsts(signatures, b"".join(copies.digest(text) for text in every))
    assert keep[:60].all() and not keep[60:65].any() and keep[85:].all()
    assert (~keep[65:85]).mean() >= 0.9
    shingles = [
        set(zip(*(text.split()[i:] for i in range(copies.SHINGLE)), strict=False)) for text in (texts[0], changed[0])
    ]
    alike = copies.like_any([*changed, *half, texts[40]], texts[:40])
    assert alike[:20].mean() >= 0.9 and not alike[20:].any()
    assert not copies.like_any(texts, []).any() and not len(copies.like_any([], texts))
    overlap = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
    assert (signatures[0] == signatures[65]).mean() == pytest.approx(overlap, abs=0.15)


@pytest.fixture
def documents(tmp_path):
    folder = tmp_path / "docs"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "x.md").write_text("# Not this\n\nNever read.")
    for i in range(5):
        (folder / f"{i}.md").write_text(f"# Mill {i}\n\n" + f"The mill of number {i} stands at the river {i * 7}. " * 6)
    (folder / "deep" / "page.html").write_text(PAGE)
    (folder / "deep" / "copy.html").write_text(PAGE)
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4")
    (folder / "tool.py").write_text("x = 1\n")
    (tmp_path / "outside.md").write_text("# Secret\n\nOf somebody else, and of nobody's concern.")
    (folder / "link.md").symlink_to(tmp_path / "outside.md")
    return folder


def read(out):
    return pyarrow.parquet.read_table(out / build.PASSAGES).to_pylist()


def test_a_folder_to_passages_that_a_run_can_read(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PART", 3)
    out = tmp_path / "out"
    code, printed, err = call(
        None, "prepare", f"--documents={documents}", f"--out={out}", "--processes=1", "--tokens=60"
    )
    assert code == 0, err
    rows = read(out)
    names = [row["document"] for row in rows]
    assert {"0.md", "4.md", "deep/copy.html"} <= set(names) and "deep/page.html" not in names  # of two copies the first
    assert not any("Secret" in row["passage"] or "Never read" in row["passage"] for row in rows)
    unread = {line["document"]: line["unread"] for line in map(json.loads, (out / build.UNREAD).open())}
    assert set(unread) == {"broken.pdf", "link.md"} and unread["link.md"] == "a link out of the folder"
    assert "7 of 9 documents read" in printed and "left alone: 1 of source code; --code reads them" in printed
    pairs, notes = row_files.read_corpus(
        str(out / build.PASSAGES), "data.passages", {"passage": "Abstract", "document": None}
    )
    assert [passage for passage, _ in pairs] == [row["passage"] for row in rows]
    assert [document for _, document in pairs] == names
    assert notes == ["recognised as prepared documents: passage from 'passage', document from 'document'"]


def test_what_is_done_is_not_done_again_and_what_has_changed_is(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PART", 3)
    out, settings = tmp_path / "out", build.Settings(60, None)
    build.build(documents, out, settings, 1)
    before = read(out)
    parts = {path: path.stat().st_mtime_ns for path in (out / build.PARTS).iterdir()}
    next(iter(parts)).unlink()  # as if the command had been stopped before it
    assert build.build(documents, out, settings, 2).read == 7
    again = {path: path.stat().st_mtime_ns for path in (out / build.PARTS).iterdir()}
    assert read(out) == before and again.keys() == parts.keys()
    assert sum(again[path] == parts[path] for path in parts) == len(parts) - 1
    (documents / "0.md").write_text("# New\n\n" + "Another mill has been built of stone. " * 5)
    os.utime(documents / "0.md", ns=(1, 1))
    build.build(documents, out, settings, 1)
    assert read(out)[0]["passage"].startswith("# New") and len(read(out)) <= len(before)


def test_tokens_are_those_of_the_retriever(documents, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    out = tmp_path / "out"
    code, _, err = call(
        cache, "prepare", "--config=configs/tiny.py", f"--documents={documents}", f"--out={out}", "--processes=1"
    )
    assert code == 0, err
    monkeypatch.setenv("RAG_JAX_CACHE", str(cache))
    tokenizer = hf.open_model("random:bert", "retriever.path", "retriever").tokenizer
    for row in read(out):
        assert (
            len(tokenizer(row["passage"]).input_ids) == row["tokens"] + 2 <= 64
        )  # data.passage_len, specials included


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--documents=nowhere"], "--documents=nowhere: no such folder"),
        (["--documents=docs", "--tokens=0"], "--tokens=0: must be at least 1"),
        (["--documents=docs", "--config.seed=1"], "--config.seed: goes with --config=FILE.py"),
        (["--documents=rag_jax/models"], "holds none of .md, .markdown"),
        (["--documents=docs", "--config=configs/tiny.py", "--tokens=65"], "--tokens=65: data.passage_len=64 leaves 62"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, flags, message):
    code, _, err = call(tmp_path / "cache", "prepare", *flags, f"--out={tmp_path / 'out'}")
    assert code == 2 and err.startswith("rag_jax: error: ") and message in err and err.count("\n") == 1


def test_nobodys_folder_is_overwritten(tmp_path):
    (tmp_path / "mine").write_text("mine")
    code, _, err = call(None, "prepare", "--documents=docs", f"--out={tmp_path}")
    assert code == 2 and "holds something else; give a new folder" in err
    with pytest.raises(UserError, match="holds none of"):
        build.build(tmp_path, tmp_path / "out", build.Settings(60, None), 1)
