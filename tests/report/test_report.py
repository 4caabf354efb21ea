"""The report: its numbers are those of the run's files, and no text of the rows is anything but text."""

import json
import re

import command
import numpy as np
import pytest

from rag_jax.errors import UserError
from rag_jax.report import collect, tables, write

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!-- a comment that never ends",
    "نص من اليمين إلى اليسار \u202e abc",
    "emoji 👩‍🔬 and a lone \ud800 surrogate",
    "a\0NUL and \u2028 a line separator",
    "x" * 1_000_000,
]


def data_of(path):
    """What the page's script reads."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def retrieved(*passages, right=0, score=0.9):
    return [{"score": score - i / 10, "relevant": i + 1 == right, "passage": text} for i, text in enumerate(passages)]


@pytest.fixture
def workdir(tmp_path):
    """`workdir(name, rows)`: a run's files by hand; rows are (query, before, after)."""

    def make(name, rows, recalls=(0.25, 0.5), **config):
        folder = tmp_path / name
        (folder / "eval").mkdir(parents=True)
        values = {"objective": {"name": "token", "candidates": 2, "marginal_temperature": 0.1}, "seed": 0} | config
        (folder / "config.json").write_text(json.dumps(values))
        lines = [{"step": n, "loss/total": 5.0 - n / 10, "time/step_s": 0.5, "time/compile_s": 1.0} for n in (1, 2, 3)]
        lines[1]["loss/spike"] = 12.5
        lines.append({"step": 4, "loss/total": None})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
        for step, recall in zip((0, 4), recalls, strict=True):
            record = {
                "step": step, "eval/recall@1": recall, "eval/answer_nll": 3.0 - recall, "counts": {"queries": 8},
                "intervals": {"eval/recall@1": [recall - 0.1, recall + 0.1]}, "definitions": {"eval/recall@1": "share"},
            }  # fmt: skip
            (folder / "eval" / f"step_{step}.json").write_text(json.dumps(record))
            of_step = [
                {"row": i, "query": query} | (after if step else before)
                for i, (query, before, after) in enumerate(rows)
            ]
            text = "".join(json.dumps(line) + "\n" for line in of_step)
            (folder / "eval" / f"step_{step}.rows.jsonl").write_text(text)
        return folder

    return make


def row(query="who?", right=(2, 1), nll=(3.0, 2.0), passages=("one", "two", "three")):
    sides = [
        {"answer": "me", "gold": "one", "answer_nll": n, "mrr@10": 1 / r, "retrieved": retrieved(*passages, right=r)}
        for r, n in zip(right, nll, strict=True)
    ]
    return query, *sides


def test_a_real_run_ends_with_a_report_of_its_numbers(tiny_run):
    workdir, printed, _ = tiny_run
    found = data_of(workdir / "report.html")
    assert printed.splitlines()[-1].startswith("report ") and printed.splitlines()[-1].endswith("/report.html")
    (run,) = found["runs"]
    for evaluation in run["evaluations"]:
        record = json.loads((workdir / "eval" / f"step_{evaluation['step']}.json").read_text())
        numbers = {name: value for name, value in record.items() if name.startswith("eval/") and value is not None}
        assert {f"eval/{name}": value for name, value in evaluation["metrics"].items()} == numbers
        assert {f"eval/{name}": value for name, value in evaluation["intervals"].items()} == record["intervals"]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [[line["step"], line["loss/total"]] for line in lines if "loss/total" in line]
    assert [step for step, _ in found["curves"]["loss/total"]] == [step for step, _ in losses]
    assert [v for _, v in found["curves"]["loss/total"]] == pytest.approx([v for _, v in losses], rel=1e-4)
    rows = (workdir / "eval" / f"step_{run['evaluations'][-1]['step']}.rows.jsonl").read_text().splitlines()
    assert len(found["rows"]) == len(rows)
    assert {one["query"] for one in found["rows"]} == {json.loads(line)["query"] for line in rows}
    assert found["read"]["data.train"].startswith("29 rows") and len(found["plane"]["row"]) == len(rows)
    assert found["changed"]["file"] == "tiny.py"
    assert found["changed"]["changed"]["total_steps"] == [20, command.TINY_STEPS]
    assert any("what is measured is memory" in text for text in found["warnings"])
    for line in map(json.loads, rows):
        shares = [one["evidence"] for one in line["retrieved"] if "evidence" in one]
        assert len(shares) == 3 and sum(shares) == pytest.approx(1, abs=1e-3)


def test_what_is_told_of_rows(workdir):
    found = collect.page([collect.read(workdir("run", [row(), row("what?", (1, 3), (2.0, 2.5))]))])
    assert [(one["before"]["rank"], one["after"]["rank"]) for one in found["rows"]] == [(2, 1), (1, 3)]
    assert found["rows"][0]["after"]["found"][0] == [found["passages"].index("one"), 0.9, 1]
    assert len(found["passages"]) == 3, "a passage stands once, whatever names it"
    assert found["kept_neighbours"] == {"mean": 1.0, "histogram": [0] * 10 + [2]}
    # The nearest of two candidates at scores 0.9 and 0.8, temperature 0.1: weight e / (e + 1).
    assert found["calibration"]["after"] == [[pytest.approx(0.73106), 0.5, 2]]
    assert found["warnings"][:2] == [
        "Steps whose loss rose far above its usual value: 1, most at step 2 "
        "(12.5 times the median of the steps before).",
        "Steps whose loss was not finite: 1, first step 4.",
    ]
    assert found["time"] == {"steps": 1.5, "compiling": 3.0}


def test_one_evaluation_is_beside_nothing(workdir):
    """Nothing is said to have moved, or to be kept, and its weights stand under its step."""
    folder = workdir("run", [row(), row("what?", (1, 3), (2.0, 2.5))])
    *_, last = sorted((folder / "eval").glob("step_*.json"))
    for path in (last, last.with_suffix(".rows.jsonl")):
        path.unlink()
    found = collect.page([collect.read(folder)])
    assert (found["kept_neighbours"], found["plane"]) == (None, {})
    assert list(found["calibration"]) == ["step 0"]


def test_what_became_of_the_rows_is_told(workdir):
    folder = workdir("run", [row()])
    (folder / "rows.json").write_text(json.dumps({
        "data.train": {"summary": "90 rows", "read": 100, "rows": 90, "dropped": {"an empty query": 7, "no answer": 3}},
        "data.eval": {"summary": "8 rows", "read": 8, "rows": 8, "dropped": {}},
        "shared queries": {"of": 8, "same": 1, "alike": 2}, "shared passages": {"of": 8, "same": 0, "alike": 0},
    }))  # fmt: skip
    found = collect.page([collect.read(folder)])
    assert found["read"] == {"data.train": "90 rows", "data.eval": "8 rows"}
    said = [text for text in found["warnings"] if "dropped" in text or "partly memory" in text]
    assert said == [
        "Rows that were dropped: 10 of 100 (7 with an empty query, 3 with no answer).",
        "Held-out queries that training rows have too, or have but for case and punctuation: 3 of 8. "
        "What is measured on them is partly memory.",
    ]


def test_the_first_plane_is_turned_onto_the_second(workdir):
    """Points that are only turned and mirrored have not moved; a real move stays."""
    points = np.random.default_rng(0).normal(size=(20, 4)).round(4)
    after = points.copy()
    after[0, :2] += 3
    for mirror in (1, -1):
        turn = np.array([[np.cos(2), -np.sin(2)], [np.sin(2), np.cos(2)]]) @ np.diag([1, mirror])
        before = (points.reshape(-1, 2) @ turn).reshape(-1, 4)
        sides = [[{"row": i, "plane": plane.tolist()} for i, plane in enumerate(side)] for side in (before, points)]
        found = collect.plane(sides)
        np.testing.assert_allclose(found["before"], points, atol=1e-3)
        sides[1] = [{"row": i, "plane": plane.tolist()} for i, plane in enumerate(after)]
        moved = np.abs(np.subtract(collect.plane(sides)["before"], after)).reshape(20, 2, 2).max(axis=2)
        assert moved[0, 0] > 2 and moved.max() == moved[0, 0]
    assert collect.plane([sides[0], []]) == collect.plane([sides[0]]) == {}


def test_the_page_in_a_browser(workdir, page):
    """Nothing of hostile rows runs, and searching, filtering, sorting and opening rows do what they say."""
    texts = [row(text, passages=(text + "1", text + "2", "three")) for text in HOSTILE]
    texts += [row(f"question {i}", (1 + i % 3, 1 + (i + 1) % 3), (3.0, 2.0 + i)) for i in range(60)]
    folder, other = workdir("run", texts), workdir("other", [row()], (0.25, 0.75), seed=1)
    for step in (0, 4):
        path = folder / "eval" / f"step_{step}.rows.jsonl"
        lines = [json.loads(line) | {"plane": [step, 1.0, 0.5, i / 9]} for i, line in enumerate(open(path))]
        lines[2]["retrieved"][0]["evidence"] = 0.625
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        record = folder / "eval" / f"step_{step}.json"  # a frozen model's, the same but for the last bits
        record.write_text(json.dumps(json.loads(record.read_text()) | {"eval/answer_nll_gold": 2.0 + step * 1e-7}))
    write.write(folder / "page.html", [collect.read(folder), collect.read(other)])
    page.goto((folder / "page.html").as_uri())
    titles = page.locator("h2").all_inner_texts()
    assert page.get_by_text("null", exact=True).count() == page.get_by_text("undefined").count() == 0
    for title in ("What training changed", "Runs side by side", "Queries and their passages on a plane", "Row by row"):
        assert title in titles
    changed = [
        page.locator("tr", has_text=name).first.inner_text() for name in ("Recall@1", "NLL with the right passage")
    ]
    assert [line.split("\t")[-1] for line in changed] == ["better", "unchanged"]
    rows = page.locator("#rows tr.row")
    assert rows.count() == 50 and page.locator("text=67 of 67 rows").count() == 1
    page.get_by_role("button", name="show more").click()
    assert rows.count() == 67
    page.get_by_role("button", name="question", exact=True).click()
    shown = [cells.split("\t")[0] for cells in rows.all_inner_texts()]
    lowered = [text.lower() for text in shown]
    assert lowered[:5] == sorted(lowered)[:5] or lowered == sorted(lowered)
    page.get_by_role("button", name="NLL after").click()
    nlls = [float(cells.split("\t")[3]) for cells in rows.all_inner_texts()]
    assert nlls == sorted(nlls, reverse=True)
    page.get_by_label("which rows").select_option("lost")
    ranks = [cells.split("\t")[1:3] for cells in rows.all_inner_texts()]
    assert ranks and all(before < after for before, after in ranks)
    page.get_by_label("which rows").select_option("all")
    page.get_by_label("search").fill("<!-- a comment")
    assert rows.count() == 1 and "<!-- a comment that never ends" in rows.inner_text()
    rows.click()
    detail = page.locator("td.detail").inner_text()
    assert "right answer: me" in detail and "evidence 63 %" in detail and "<!-- a comment that never ends1" in detail
    page.locator("figure svg").first.hover()
    assert page.locator("figure .tip").first.is_visible()


def test_ten_thousand_rows_open_in_a_browser(workdir, page):
    rows = [row(f"question {i} " + "q" * 200, (1 + i % 3, 1)) for i in range(10_000)]
    folder = workdir("run", rows)
    write.write(folder / "page.html", [collect.read(folder)])
    page.goto((folder / "page.html").as_uri())
    assert page.locator("#rows tr.row").count() == 50
    page.get_by_label("search").fill("question 9999 ")
    assert page.locator("#rows tr.row").count() == 1


def test_texts_stay_texts(workdir, tmp_path):
    rows = [row(text, passages=(text + "1", text + "2", "three")) for text in HOSTILE]
    path = tmp_path / "page.html"
    write.write(path, [collect.read(workdir("</title><script>alert(2)</script>", rows))])
    text = path.read_text(encoding="utf-8")
    assert text.count("<script") == 2 and text.count("</script>") == 2
    assert "alert(1)</" not in text and "\0" not in text and "<img" not in text
    found = data_of(path)
    assert found["rows"][0]["query"] == HOSTILE[0]
    assert found["rows"][3]["query"] == HOSTILE[3]
    assert len(found["rows"][6]["query"]) == collect.EXCERPTS[0]


def test_ten_thousand_rows_fit(workdir, tmp_path):
    rows = [
        row(
            f"question {i} " + "q" * 300,
            (1 + i % 3, 1),
            passages=tuple(f"passage {3 * i + j} " + "p" * 300 for j in range(3)),
        )
        for i in range(10_000)
    ]
    path = tmp_path / "page.html"
    write.write(path, [collect.read(workdir("run", rows))])
    found = data_of(path)
    assert path.stat().st_size < 5_000_000
    assert len(found["rows"]) + found["left_out"] == 10_000
    assert all(one["before"]["rank"] != one["after"]["rank"] for one in found["rows"]), "what changed least is left out"
    assert sum(found["kept_neighbours"]["histogram"]) == 10_000, "of all rows, those left out too"


def test_tables_to_paste(workdir):
    first, second = workdir("a|b_c", [], (0.25, 0.5)), workdir("100%", [], (0.25, 0.75))
    runs = [collect.read(first), collect.read(second)]
    assert tables.markdown(runs).splitlines() == [
        "| | R@1 | NLL |",
        "|---|---:|---:|",
        "| untrained | 0.250 | 2.750 |",
        "| a\\|b_c | 0.500 | 2.500 |",
        "| 100% | **0.750** | **2.250** |",
    ]
    assert r"a|b\_c & 0.500 & 2.500 \\" in tables.latex(runs)
    assert r"100\% & \textbf{0.750} & \textbf{2.250} \\" in tables.latex(runs)
    assert collect.differences(runs) == {}
    third = collect.read(workdir("third", [], seed=1))
    assert collect.differences([runs[0], third]) == {"seed": [0, 1]}


def test_the_command(workdir, tmp_path):
    cache, first, second = tmp_path / "cache", workdir("first", [row()]), workdir("second", [row()], (0.25, 0.75))
    assert "report.html (0." in command.call(cache, "report.__main__", f"--workdir={first}")[1]
    assert [run["name"] for run in data_of(first / "report.html")["runs"]] == ["first"]
    flags = (f"--workdir={first}", "--compare", str(second))
    assert "| second | **0.750** |" in command.call(cache, "report.__main__", *flags, "--table=markdown")[1]
    assert command.call(cache, "report.__main__", *flags, f"--out={tmp_path / 'both.html'}")[0] == 0
    assert [run["name"] for run in data_of(tmp_path / "both.html")["runs"]] == ["first", "second"]
    assert command.call(cache, "report.__main__", *flags, f"--out={tmp_path / 'both.html'}")[0] == 0, "again"
    (tmp_path / "mine.html").write_text("mine")
    for bad, message in {
        f"--out={tmp_path / 'mine.html'}": "is there already and is no report",
        f"--workdir={tmp_path}": "holds no config.json of a run",
    }.items():
        code, _, err = command.call(cache, "report.__main__", *flags, bad)
        assert code == 2 and message in err and "Traceback" not in err
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_a_run_without_evaluations_has_a_report(workdir):
    folder = workdir("run", [])
    for path in (folder / "eval").iterdir():
        path.unlink()
    found = collect.page([collect.read(folder)])
    assert found["rows"] == [] and any("never evaluated" in text for text in found["warnings"])
    with pytest.raises(UserError, match="holds no config.json"):
        collect.read(folder / "eval")
