"""The page and its endpoints.

GET  /        the page
GET  /about   which models, how many passages, what the numbers mean
POST /ask     {"question": "..."} gives what `rag_jax.ask --json` prints; with "stream": true, server-sent events:
              `part` while an answer is decoded, then `answer`, or `error`
"""

import asyncio
import contextlib
import json
import pathlib
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rag_jax import untrusted
from rag_jax.errors import UserError
from rag_jax.serving.engine import Asked, Busy, Engine

HERE = pathlib.Path(__file__).parent
FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
# Of a request.
MOST_BYTES = 2**16
LOOPBACK = ("127.0.0.1", "localhost", "::1")

# What is known of an answer, by the names of the pairs, as it is sent.
Show = Callable[[str, Mapping[str, Any]], dict[str, Any]]


class Refused(Exception):
    """A request that is answered by one line that says why."""

    def __init__(self, status: int, reason: str):
        self.status, self.reason = status, reason


def make(engine: Engine, show: Show, about: Mapping[str, Any], host: str) -> Starlette:
    """The application; `show(question, known)` makes of what is known the record that is sent."""

    async def file(request: Request) -> Response:
        name, kind = FILES[request.url.path]
        return Response((HERE / name).read_bytes(), media_type=kind, headers=HEADERS)

    async def tell_about(_: Request) -> Response:
        return JSONResponse(dict(about), headers=HEADERS)

    async def ask(request: Request) -> Response:
        try:
            question, is_stream = await read(request)
            asked, told = put(engine, question)
        except Refused as refused:
            headers = HEADERS | ({"Retry-After": "5"} if refused.status == 503 else {})
            return JSONResponse({"error": refused.reason}, refused.status, headers=headers)
        if is_stream:
            return StreamingResponse(
                events(question, asked, told, show), media_type="text/event-stream", headers=HEADERS
            )
        kind, content = [each async for each in records(question, asked, told, show)][-1]
        return JSONResponse(content, {"error": 400, "failed": 500}.get(kind, 200), headers=HEADERS)

    routes = [Route(path, file) for path in FILES] + [Route("/about", tell_about), Route("/ask", ask, methods=["POST"])]
    # Whoever names another host came by a name that was made to point here.
    allowed = [*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed)])


async def read(request: Request) -> tuple[str, bool]:
    """The question of a request, and whether its answer is to be streamed."""
    # Other sites may send forms here, but not JSON.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refused(415, "send JSON, with the header Content-Type: application/json")
    body = b""
    with contextlib.suppress(ClientDisconnect):
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST_BYTES:
                raise Refused(413, f"a request has at most {MOST_BYTES:,} bytes")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, 'the request is not JSON; send {"question": "..."}') from None
    if not isinstance(content, dict) or not isinstance(content.get("question"), str):
        raise Refused(400, 'the request has no question; send {"question": "..."}')
    question, is_stream = content["question"].strip(), content.get("stream", False)
    if not question:
        raise Refused(400, "the question is empty; ask something")
    if not untrusted.is_unicode(question):
        raise Refused(400, "the question holds half a character (a lone surrogate); fix its encoding")
    if unknown := [name for name in content if name not in ("question", "stream")]:
        raise Refused(400, f"{untrusted.short(unknown[0])} is not known; send question and, if you like, stream")
    if not isinstance(is_stream, bool):
        raise Refused(400, "stream is true or false")
    return question, is_stream


def put(engine: Engine, question: str) -> tuple[Asked, asyncio.Queue]:
    """The question in the engine, and the queue in which its thread puts what it tells."""
    told: asyncio.Queue = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def tell(name: str | None, known: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(told.put_nowait, (name, known))

    try:
        return engine.ask(question, tell), told
    except Busy:
        raise Refused(503, "too many questions wait; come again in some seconds") from None


async def records(
    question: str, asked: Asked, told: asyncio.Queue, show: Show
) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """(kind, record), as the engine tells them: `part`s, and last one `answer`, `error` or `failed`."""
    known: dict[str, Any] = {}
    name: str | None = ""
    try:
        while name is not None:
            name, what = await told.get()
            has_part = name is not None
            while name is not None:
                known[name] = what
                if told.empty():
                    break
                name, what = told.get_nowait()  # a slow reader gets the newest
            if has_part:  # however slow: no answer comes without a part before it
                yield "part", show(question, known)
        if what is None:
            yield "answer", show(question, known)
        elif isinstance(what, UserError):
            yield "error", {"error": str(what)}
        else:
            yield "failed", {"error": f"the answer failed ({type(what).__name__}); see what the server printed"}
    finally:
        asked.left = True


async def events(question: str, asked: Asked, told: asyncio.Queue, show: Show) -> AsyncIterator[str]:
    async for kind, content in records(question, asked, told, show):
        yield f"event: {'error' if kind == 'failed' else kind}\ndata: {json.dumps(content)}\n\n"


def bind(host: str, port: int) -> socket.socket:
    """The socket that is served; UserError for a port that is taken or a host that is not this machine's."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--serve={port}, --host={host}: {reason}; give another port or host") from None


def run(app: Starlette, where: socket.socket) -> None:
    """Serve until a signal to stop."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[where])


def address(where: socket.socket) -> str:
    host, port = where.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
