"""The page and its endpoint, served by the real command: what `ask` prints, for many at once, and in a browser."""

import asyncio
import concurrent.futures
import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from command import ROOT, call, environment, words

pytest.importorskip("starlette")
QUESTIONS = [f"How {word} is the village well?" for word in (
    "deep", "old", "wide", "cold", "clear", "far", "full", "dry", "round", "clean", "dark", "near", "safe", "loud",
    "steep", "tall",
)]  # fmt: skip
FLAGS = ("--compare", "--max-tokens=8")


class Server:
    """The command in a process of its own."""

    def __init__(self, workdir, cache, *flags):
        self.process = subprocess.Popen(
            words("ask", f"--workdir={workdir}", "--serve=0", *flags),
            cwd=ROOT, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.printed, found = "", None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed += line
            if found := re.match(r"(http://127\.0\.0\.1:\d+) serves", line):
                break
        assert found, self.process.communicate()[1]
        self.address = found[1]

    def post(self, content, path="/ask", **headers):
        """Status and body of a request; `content` is sent as JSON, bytes as they are."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"} | headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def end(self, signum):
        self.process.send_signal(signum)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@pytest.fixture(scope="module")
def server(tiny_run):
    workdir, _, cache = tiny_run
    server = Server(workdir, cache, *FLAGS)
    yield server
    if server.process.poll() is None:
        server.process.kill()
        server.process.communicate()


def printed(tiny_run, question):
    workdir, _, cache = tiny_run
    code, out, err = call(cache, "ask", f"--workdir={workdir}", *FLAGS, "--json", question)
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def close(one, other):
    """Whether two records are equal, numbers nearly: programs of other batch sizes round otherwise."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return one == pytest.approx(other, abs=1e-4) if isinstance(one, float) else one == other


def test_sixteen_at_once_get_the_answers_of_the_command(server, tiny_run):
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda question: server.post({"question": question}), QUESTIONS))
    assert [status for status, _ in found] == [200] * 16
    records = [json.loads(body) for _, body in found]
    assert [record["question"] for record in records] == QUESTIONS
    for question, record in list(zip(QUESTIONS, records, strict=True))[::5]:
        expected = printed(tiny_run, question)
        assert close(record, {name: expected[name] for name in ("question", "untrained", "trained")})


def test_a_streamed_answer_grows_to_the_whole_one(server):
    status, body = server.post({"question": QUESTIONS[0], "stream": True})
    assert status == 200
    blocks = [block.split("\n") for block in body.strip().split("\n\n")]
    kinds = [kind.removeprefix("event: ") for kind, _ in blocks]
    records = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert kinds[-1] == "answer" and set(kinds[:-1]) == {"part"}
    whole = json.loads(server.post({"question": QUESTIONS[0]})[1])
    assert close(records[-1], whole)
    for record in records:
        for name in ("untrained", "trained"):
            if name in record:
                assert [one["passage"] for one in record[name]["passages"]] == [
                    one["passage"] for one in whole[name]["passages"]
                ]
    assert "trained" in records[0]


def test_an_answer_that_is_whole_at_once_still_has_a_part_before_it():
    """On a busy machine all of it may be told before the first of it is read."""
    from rag_jax.serving import app, engine

    async def kinds():
        told = asyncio.Queue()
        for news in [("untrained", 1), ("trained", 2), ("trained", 3), (None, None)]:
            told.put_nowait(news)
        asked = engine.Asked("Q", lambda name, known: None)
        return [each async for each in app.records("Q", asked, told, lambda question, known: dict(known))]

    whole = {"untrained": 1, "trained": 3}
    with concurrent.futures.ThreadPoolExecutor(1) as own:  # a browser's driver keeps this thread's event loop running
        assert own.submit(asyncio.run, kinds()).result() == [("part", whole), ("answer", whole)]


@pytest.mark.parametrize(
    ("content", "headers", "status", "message"),
    [
        (b"no JSON", {}, 400, "not JSON"),
        (b"[" * 50_000, {}, 400, "not JSON"),
        ({"question": "  "}, {}, 400, "is empty"),
        ({"question": 3}, {}, 400, "has no question"),
        ({"question": "a\ud800"}, {}, 400, "lone surrogate"),
        ({"question": "a", "temperature": 1}, {}, 400, "'temperature' is not known"),
        ({"question": "a", "stream": "yes"}, {}, 400, "true or false"),
        ({"question": "a" * 70_000}, {}, 413, "at most 65,536 bytes"),
        ({"question": "a"}, {"Content-Type": "text/plain"}, 415, "Content-Type: application/json"),
        ({"question": "a"}, {"Host": "elsewhere.example"}, 400, "Invalid host"),
    ],
)
def test_bad_requests(server, content, headers, status, message):
    found, body = server.post(content, **headers)
    assert (found, message in body) == (status, True), body


def test_what_it_is(server):
    with urllib.request.urlopen(server.address + "/about") as response:
        about = json.load(response)
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert (about["pairs"], about["step"], about["candidates"]) == (["untrained", "trained"], 6, 3)


def test_the_page_in_a_browser(server, page):
    page.goto(server.address)
    page.wait_for_selector("#about:has-text('passages')")
    hostile = "<img src=x onerror=alert(1)> How deep?"
    page.get_by_label("A question").fill(hostile)
    page.keyboard.press("Enter")
    page.wait_for_selector("article section:nth-child(2) .faint:has-text('log p(answer | question)')")
    page.wait_for_selector("article section:nth-child(1) .faint:has-text('log p(answer | question)')")
    assert page.locator("article h2").inner_text() == hostile
    assert page.locator("article h3").all_inner_texts() == ["untrained", "trained"]
    assert page.locator("article section li").count() == 6 and page.locator("article meter").count() == 12
    assert page.locator(".open").count() == 0
    page.locator(".passage").first.click()
    assert "short" not in page.locator(".passage").first.get_attribute("class")
    page.get_by_label("A question").fill("   ")
    page.keyboard.press("Enter")
    page.get_by_label("A question").fill("How wide?")
    page.get_by_role("button", name="Ask").click()
    page.wait_for_selector("article h2:has-text('How wide?')")
    assert page.locator("article h2").all_inner_texts() == ["How wide?", hostile]
    page.wait_for_selector("article:first-child section:nth-child(1) .faint:has-text('log p')")


def test_it_ends_well(server, page):
    """Ctrl-C, the last test of this server: it ends, and the page says so."""
    page.goto(server.address)
    page.wait_for_selector("#about:has-text('passages')")
    code, err = server.end(signal.SIGINT)
    assert (code, err) == (0, "")
    page.expected_errors = True
    page.get_by_label("A question").fill("Are you there?")
    page.keyboard.press("Enter")
    page.wait_for_selector("[role=alert]:has-text('cannot be reached')")


def test_what_cannot_be_served(tiny_run):
    workdir, _, cache = tiny_run
    for flags, message in {
        ("--serve=8000", "a question"): "leave out a question",
        ("--serve=8000", "--json"): "leave out --json",
        ("--host=0.0.0.0", "a question"): "--host=0.0.0.0: goes with --serve",
        ("--serve=99999",): "--serve=99999",
        ("--serve=0", "--host=203.0.113.7"): "give another port or host",
    }.items():
        code, out, err = call(cache, "ask", f"--workdir={workdir}", "--max-tokens=8", *flags)
        assert code == 2 and message in err and "Traceback" not in err, (flags, err)
        assert len(err.splitlines()) == 1


def test_without_its_packages(tiny_run, monkeypatch):
    workdir, _, cache = tiny_run
    monkeypatch.setitem(sys.modules, "rag_jax.serving.app", None)
    code, _, err = call(cache, "ask", f"--workdir={workdir}", "--serve")
    assert code == 2 and "pip install 'rag_jax[serve]'" in err
