"""What is on disk after writing, after a crash and after going on."""

import io
import json
import sys

import jax
import pytest

from rag_jax.errors import UserError
from rag_jax.training import writer as writers
from rag_jax.training.writer import open_writer


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def scalars(workdir, as_list=False):
    """{tag: {step: value}} as TensorBoard shows them, or {tag: [(step, value), ...]}."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(workdir / "tensorboard")).Reload()
    kind = list if as_list else dict
    return {tag: kind((e.step, e.value) for e in events.Scalars(tag)) for tag in events.Tags()["scalars"]}


def test_lines_are_on_disk_at_once_with_the_names_given(tmp_path):
    writer = open_writer(tmp_path / "run")
    writer.write(1, {"loss/total": jax.numpy.float32(0.5), "optim/learning_rate": 1e-4})
    assert lines(tmp_path / "run") == [{"step": 1, "loss/total": 0.5, "optim/learning_rate": 1e-4}]
    writer.write(1, {"eval/recall@1": 0.25, "eval/em": None})
    assert lines(tmp_path / "run")[1] == {"step": 1, "eval/recall@1": 0.25}
    writer.close()
    assert scalars(tmp_path / "run")["eval/recall@1"] == {1: 0.25}


def test_going_on_takes_out_what_was_written_about_later_steps(tmp_path):
    with open_writer(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss/total": step})
        writer.write(3, {"eval/mrr@10": 0.3})
        writer.write(5, {"eval/mrr@10": 0.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss/to')
    with open_writer(tmp_path, start_step=3) as writer:
        for step in range(4, 7):
            writer.write(step, {"loss/total": 10 + step})
    train = [(line["step"], line["loss/total"]) for line in lines(tmp_path) if "loss/total" in line]
    assert train == [(1, 1), (2, 2), (3, 3), (4, 14), (5, 15), (6, 16)]
    assert [line["step"] for line in lines(tmp_path) if "eval/mrr@10" in line] == [3]
    board = scalars(tmp_path)
    assert board["loss/total"] == {1: 1, 2: 2, 3: 3, 4: 14, 5: 15, 6: 16}
    assert board["eval/mrr@10"] == {3: pytest.approx(0.3)}


def test_every_step_stands_there_once_after_any_number_of_kills(tmp_path, monkeypatch):
    """Nothing is closed or flushed, the last line is torn, and the clock of each start is behind the one before."""
    killed, resumed = [], 0
    for start, clock in enumerate([2e9, 1.9e9, 1.9e9, 1.8e9]):
        monkeypatch.setattr(writers.time, "time", lambda clock=clock: clock)
        writer = open_writer(tmp_path, start_step=resumed)
        for step in range(resumed + 1, resumed + 6):
            writer.write(step, {"loss/total": 100 * start + step})
        killed.append(writer)
        resumed += 3
        with open(tmp_path / "metrics.jsonl", "ab") as file, open(killed[-1].sinks[1]._file.name, "ab") as board:
            file.write(b'{"step": 3, "lo\xff')
            board.write(b"\x18\x00\x00")
    expected = {1: 1, 2: 2, 3: 3, 4: 104, 5: 105, 6: 106, 7: 207, 8: 208, 9: 209}
    expected |= {step: 300 + step for step in range(10, 15)}
    open_writer(tmp_path, start_step=14).close()
    assert {line["step"]: line["loss/total"] for line in lines(tmp_path)} == expected
    assert len(lines(tmp_path)) == len(expected)
    assert scalars(tmp_path, as_list=True)["loss/total"] == list(expected.items())


def test_what_a_full_disk_does_not_take_is_one_clear_line(tmp_path, monkeypatch):
    writer = open_writer(tmp_path)
    writer.sinks[0].close()
    with open("/dev/full", "wb", buffering=0) as full:
        writer.sinks[0]._file = full
        with pytest.raises(UserError, match="/dev/full: No space left on device"):
            writer.write(1, {"loss/total": 1.0})


def test_a_run_that_begins_anew_keeps_nothing_of_the_one_before(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.write(0, {"eval/mrr@10": 0.1})
        writer.write(1, {"loss/total": 1})
    with open_writer(tmp_path) as writer:
        writer.write(0, {"eval/mrr@10": 0.2})
    assert lines(tmp_path) == [{"step": 0, "eval/mrr@10": 0.2}]
    assert scalars(tmp_path)["eval/mrr@10"] == {0: pytest.approx(0.2)}
    assert not scalars(tmp_path).get("loss/total"), (
        "TensorBoard keeps an emptied tag when the file is of another second"
    )


def test_a_loss_that_is_no_number_leaves_valid_json(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.write(1, {"loss/total": float("nan"), "optim/grad_norm": float("inf")})

    def refuse(name):
        raise ValueError(name)

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "loss/total": None, "optim/grad_norm": None}


def test_a_tracker_is_a_class_and_a_row(tmp_path, monkeypatch):
    told = []

    class Dummy:
        def __init__(self, workdir, start_step):
            told.append((workdir, start_step))

        def write(self, step, scalars):
            told.append((step, scalars))

        def close(self):
            told.append("closed")

    monkeypatch.setattr(writers, "SINKS", (*writers.SINKS, Dummy))
    with open_writer(tmp_path, start_step=4) as writer:
        writer.write(5, {"loss/total": jax.numpy.float32(0.5), "eval/em": None})
    assert told == [(tmp_path, 4), (5, {"loss/total": 0.5}), "closed"]
    assert lines(tmp_path) == [{"step": 5, "loss/total": 0.5}]


def test_other_processes_write_nothing(tmp_path):
    with open_writer(tmp_path / "run", active=False) as writer:
        writer.write(1, {"loss/total": 1.0})
    assert not (tmp_path / "run").exists()


def test_evaluated_rows_on_the_board(tmp_path):
    """As text, of which nothing is markup, and the scores of right and other passages as histograms."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = [
        {
            "row": i, "query": f"**who** {i}?", "answer": "me", "generated": "you\nand I",
            "retrieved": [
                {"score": 0.9 - i / 100, "relevant": i % 2 == 0, "passage": "# one"},
                {"score": 0.5, "relevant": i % 2 == 1, "passage": "two"},
            ],
        }
        for i in range(12)
    ]  # fmt: skip
    with open_writer(tmp_path) as writer:
        writer.write_rows(3, rows)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"), {"tensors": 0, "histograms": 0})
    events.Reload()
    tags = [f"rows/{i + 1}" for i in range(writers.TEXTS)]
    assert sorted(tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]) == tags
    (shown,) = events.Tensors(events.Tags()["tensors"][0])
    said = shown.tensor_proto.string_val[0].decode().splitlines()
    assert said[:3] == ["    question: **who** 0?", "    right answer: me", "    answer: you and I"]
    assert all(line.startswith("    ") for line in said), "code, in which nothing is read as Markdown"
    found = {tag: events.Histograms(tag)[0].histogram_value for tag in events.Tags()["histograms"]}
    assert {tag: value.num for tag, value in found.items()} == {"scores/right": 12, "scores/others": 12}
    assert found["scores/right"].sum == pytest.approx(sum(0.9 - i / 100 for i in range(0, 12, 2)) + 6 * 0.5)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_plots_of_evaluated_rows_on_the_board(tmp_path, monkeypatch):
    """Those of the report, from the files of the evaluations up to the step; none without matplotlib."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    image = pytest.importorskip("PIL.Image")
    objective = {"marginal_temperature": 0.1, "candidates": 2}
    (tmp_path / "config.json").write_text(json.dumps({"objective": objective}))
    (tmp_path / "eval").mkdir()

    def evaluate(step: int) -> None:
        rows = [
            {
                "row": i, "gold": "one", "plane": [step + i, -i, i, step],
                "retrieved": [
                    {"score": 0.9 - i / 100, "relevant": i % 2 == 0, "passage": "one"},
                    {"score": 0.5, "relevant": i % 2 == 1, "passage": f"{step} or {i}"},
                ],
            }
            for i in range(12)
        ]  # fmt: skip
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "eval" / f"step_{step}.rows.jsonl").write_text(lines)
        (tmp_path / "eval" / f"step_{step}.json").write_text(json.dumps({"step": step, "counts": {"queries": 12}}))
        writer.write_rows(step, rows)

    with open_writer(tmp_path) as writer:
        for step in (0, 3, 6):
            evaluate(step)
        (tmp_path / "eval" / "step_3.json").write_text("{")
        evaluate(9)  # a file that cannot be read costs the pictures, not the run
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        (tmp_path / "eval" / "step_3.json").unlink()
        evaluate(12)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0}).Reload()
    steps = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    beside = [3, 6]  # what compares two evaluations
    assert steps == {
        "report/weight_and_right": [0, 3, 6], "report/neighbours_kept": beside, "report/plane": beside
    }  # fmt: skip
    plane = events.Images("report/plane")[-1]
    drawn = image.open(io.BytesIO(plane.encoded_image_string))
    assert drawn.size == (plane.width, plane.height) == (840, 420)
    seen = {color[:3] for _, color in drawn.getcolors(2**20)}
    assert {(11, 98, 168), (194, 87, 12)} <= seen, "queries and passages, each in its colour"
