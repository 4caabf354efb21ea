"""What `--dry-run` shows, against the rows it is of; and that it leaves nothing behind."""

import numpy as np
import pytest
from command import TINY, call, run_here

from rag_jax.training import dry_run

HOSTILE = "a\x1b[31m<b>\n  \\n \u202e end"


def write(path, rows):
    path.write_text(
        "Question,Abstract,Answer\n" + "".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in rows)
    )
    return path


def test_a_dry_run_shows_what_would_be_read_and_writes_nothing(tmp_path):
    rows = [[f"Question {i}?", f"Passage {i // 2} of them.", f"a{i}"] for i in range(12)]
    train = write(tmp_path / "train.csv", [*rows, rows[0], ["Where?", HOSTILE, "there"]])
    held_out = write(
        tmp_path / "eval.csv", [["question 3", rows[3][1], "x"], ["Question 4?", "New.", "y"], ["Z?", "N.", "z"]]
    )
    workdir = tmp_path / "run"
    printed = run_here(
        tmp_path / "cache", "main", f"--config={TINY}", f"--workdir={workdir}", "--dry-run",
        data__train=train, data__eval=held_out,
    )  # fmt: skip
    assert "rows       14 rows, 13 distinct queries, 7 distinct passages" in printed
    assert "queries, retriever   |" in printed and "answers, generator   |" in printed
    assert "[CLS]Question 0?[SEP]" in printed
    assert r"<|endoftext|>Passage 0 of them. ┊ \n\nQuestion: Question 0?\nAnswer: ┊ ␣a0<|endoftext|>" in printed
    assert r"[CLS]a\x1b[31m<b>\n \\n \u202e end[SEP]" in printed and "\x1b" not in printed
    assert "1 of 14 training rows repeat the query and passage of another" in printed
    assert "1 of 3 queries of held-out rows are those of training rows too, 1 more but for case" in printed
    assert "1 of 3 passages of held-out rows are those of training rows too, 0 more" in printed
    assert "weights, gradients and moments 4.1 MiB a device" in printed
    assert not workdir.exists()


def test_a_dry_run_needs_no_workdir_and_finds_what_would_stop_a_run(tmp_path):
    train = write(tmp_path / "train.csv", [["q?", "p", "a"], ["r?", "s", "b"]])
    code, _, err = call(tmp_path / "cache", "main", f"--config={TINY}", "--dry-run", data__train=train)
    assert code == 2 and "has 2 usable rows, fewer than a batch of 8" in err
    code, _, err = call(tmp_path / "cache", "main", f"--config={TINY}", data__train=train)
    assert code == 2 and "required: --workdir" in err


@pytest.mark.parametrize(
    ("lengths", "shape"), [([0, 0, 24], "|█                      ▄|"), ([100] * 3, "|                       █|")]
)
def test_histograms_on_a_line(lengths, shape):
    assert dry_run.bars(np.array(lengths), 24) == shape
