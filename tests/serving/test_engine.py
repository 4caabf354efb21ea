"""The engine: who waits is answered together, and one question's failure is its own."""

import threading

import pytest

from rag_jax.errors import UserError
from rag_jax.serving.engine import Busy, Engine


class Pair:
    """Answers by a rule; holds the first batch until it is let go, so that others come to wait."""

    def __init__(self):
        self.batches, self.begun, self.go = [], threading.Event(), threading.Event()

    def __call__(self, questions):
        self.batches.append(list(questions))
        self.begun.set()
        assert self.go.wait(30)
        for number, question in enumerate(questions):
            if question == "bad":
                raise UserError("bad has no tokens")
            if question == "broken":
                raise ZeroDivisionError
            yield number, question[:1]
            yield number, question.upper()


class Asker:
    def __init__(self):
        self.told, self.done = [], threading.Event()

    def __call__(self, name, known):
        self.told.append((name, known))
        if name is None:
            self.done.set()


@pytest.fixture
def pair():
    return Pair()


@pytest.fixture
def engine(pair):
    engine = Engine({"one": pair}, batch_size=4, most_waiting=6)
    yield engine
    pair.go.set()
    engine.close()


def ask(engine, question):
    asker = Asker()
    return asker, engine.ask(question, asker)


def test_those_that_wait_are_answered_together(pair, engine):
    first, _ = ask(engine, "first")
    assert pair.begun.wait(30)
    others = [ask(engine, f"other {i}") for i in range(6)]
    with pytest.raises(Busy):
        ask(engine, "one too many")
    others[1][1].left = True
    pair.go.set()
    for asker, asked in [(first, None), *others]:
        if asked is None or not asked.left:
            assert asker.done.wait(30)
    assert pair.batches == [["first"], ["other 0", "other 2", "other 3", "other 4"], ["other 5"]]
    assert first.told == [("one", "f"), ("one", "FIRST"), (None, None)]
    assert others[2][0].told == [("one", "o"), ("one", "OTHER 2"), (None, None)]
    assert others[1][0].told == [], "whoever has left is told nothing"


@pytest.mark.parametrize("word", ["bad", "broken"])
def test_a_failure_stops_neither_the_engine_nor_the_others(pair, engine, word, caplog):
    ask(engine, "first")
    assert pair.begun.wait(30)
    waiting = {question: ask(engine, question)[0] for question in ("before", word, "after")}
    pair.go.set()
    assert all(asker.done.wait(30) for asker in waiting.values())
    ends = {question: asker.told[-1][1] for question, asker in waiting.items()}
    if word == "bad":
        assert str(ends["bad"]) == "bad has no tokens" and isinstance(ends["bad"], UserError)
        assert ends["before"] is ends["after"] is None and ("one", "AFTER") in waiting["after"].told
    else:
        assert all(isinstance(end, ZeroDivisionError) for end in ends.values())
        assert "ZeroDivisionError" in caplog.text
    later, _ = ask(engine, "later")
    assert later.done.wait(30) and ("one", "LATER") in later.told
