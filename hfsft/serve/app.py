"""The web application: the page, OpenAI's endpoints, health and metrics."""

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from hfsft.serve.engine import Busy, Piece
from hfsft.serve.guard import Guard
from hfsft.serve.parameters import Asked, Refused, chat_request, completion_request
from hfsft.serve.replies import Reply, error_body, error_response, event
from hfsft.serve.served import ServedModel

MOST_BYTES = 2 * 2**20  # of a request's body; 100,000 characters take at most 1.2 MB
FAILURES = {
    "error": ("the model failed; the server's standard error says why", 500),
    "stopping": ("the server is shutting down", 503),
    "cancelled": ("the request was cancelled", 499),
}


def make_app(served: list[ServedModel], **guard: Any) -> Starlette:
    """The application that serves models.

    Args:
        served: the first answers requests that name none of them.
        guard: settings of `Guard`.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for model in served:
            model.engine.start(asyncio.get_running_loop().call_soon_threadsafe)
        yield
        for model in served:
            model.engine.close()
        endpoints.encoding.shutdown(wait=False, cancel_futures=True)

    endpoints = Endpoints(served)
    page, policy = load_page()

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    origins = guard.get("allow_origins", ())
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # OpenAI's own client sends a dozen; the guard checks who may ask
    )
    return Starlette(
        routes=[
            Route("/", show_page),
            Route("/health", endpoints.health),
            Route("/metrics", endpoints.metrics),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{name:path}", endpoints.model),
            Route("/load_model", endpoints.load_model, methods=["POST"]),
            Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
            Route("/v1/completions", endpoints.complete, methods=["POST"]),
        ],
        middleware=[cors, Middleware(Guard, **guard)] if origins else [Middleware(Guard, **guard)],
        exception_handlers={Refused: refuse, HTTPException: refuse, Exception: refuse},
        lifespan=lifespan,
    )


async def refuse(request: Request, error: Exception) -> Response:
    """The response to a request that raised an error."""
    if isinstance(error, Refused):
        return error_response(str(error), error.status, error.param, error.code)
    if isinstance(error, HTTPException):  # such as 404
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(message, error.status_code, headers=error.headers)
    return error_response("a bug of the server; its standard error has the traceback", 500)


def load_page() -> tuple[str, str]:
    """The page, and the Content-Security-Policy that allows its own script and style alone."""
    page = (files("hfsft.serve") / "page.html").read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    policy = (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; "
        f"style-src 'sha256-{digest('style')}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        Refused: if it is too large or no JSON object.
    """
    too_large = Refused(f"the body has more than {MOST_BYTES:,} bytes", status=413)
    stated = request.headers.get("content-length", "0")
    if not stated.isdigit() or len(stated) > 18 or int(stated) > MOST_BYTES:
        raise too_large
    data = b""
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > MOST_BYTES:
                raise too_large
    except ClientDisconnect:
        raise Refused("the client left before its request was complete", status=499) from None
    try:
        body = json.loads(data)
        json.dumps(body, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refused("the body is not a JSON object")
    return body


class Endpoints:
    """The functions behind the routes."""

    def __init__(self, served: list[ServedModel]):
        """Remember the models; the first answers requests that name none of them."""
        self.served = served
        self.requests: dict[tuple[str, str], int] = {}  # by model and outcome
        # one thread, as a fast tokenizer must not encode in two; and not the main one, where the
        # bounds of a chat template are limits of the whole process, the engines' threads included
        self.encoding = ThreadPoolExecutor(1, "hfsft-encoding")

    # --- generation ---

    async def chat(self, request: Request) -> Response:
        """Answer POST /v1/chat/completions."""
        body = await read_json(request)
        model = self._named(body)
        if not model.is_chat:
            raise Refused(
                f"{model.name} is not a chat model; use /v1/completions",
                "model",
                "not_a_chat_model",
            )
        asked = await self._encoded(
            chat_request,
            body,
            model.encode_chat,
            model.defaults,
            model.context,
            model.takes_tools,
        )
        return await self._answer(request, model, asked, is_chat=True)

    async def complete(self, request: Request) -> Response:
        """Answer POST /v1/completions."""
        body = await read_json(request)
        model = self._named(body)
        asked = await self._encoded(
            completion_request,
            body,
            model.encode_text,
            model.defaults,
            model.context,
            model.vocabulary,
        )
        return await self._answer(request, model, asked, is_chat=False)

    async def _encoded(self, check: Callable[..., Asked], *given: Any) -> Asked:
        """What a function makes of a request, in the thread that encodes prompts."""
        return await asyncio.get_running_loop().run_in_executor(self.encoding, check, *given)

    def _named(self, body: dict[str, Any]) -> ServedModel:
        """The model of that name, or else the first."""
        by_name = {model.name: model for model in self.served}
        name = body.get("model")
        return by_name.get(name if isinstance(name, str) else "", self.served[0])

    async def _answer(
        self, request: Request, model: ServedModel, asked: Asked, is_chat: bool
    ) -> Response:
        """Generate, and reply whole or as a stream; a client that leaves ends it."""
        asked = replace(asked, model=asked.model or model.name)
        reply = Reply(asked, model.engine.tokenizer, is_chat)  # no prompt is encoded with it
        pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        answers = []

        def publish(index: int, piece: Piece) -> None:
            pieces.put_nowait((index, piece))

        def leave() -> None:
            model.engine.cancel(answers)

        try:
            for index, prompt in enumerate(asked.prompts):
                answers += model.engine.answer(prompt, asked.samplings(), publish, index * asked.n)
        except Busy as error:
            leave()
            self._count(model, "refused")
            seconds = 1 + len(model.engine.waiting) // model.engine.max_batch  # one batch a second
            headers = {"Retry-After": str(min(seconds, 30))}
            return error_response(str(error), 503, code="overloaded", headers=headers)
        watch = asyncio.create_task(_when_client_leaves(request, leave))
        stream = self._events(model, reply, pieces, watch, leave)
        try:
            first = await anext(stream)  # an error before it has a status of its own
            if asked.is_streamed:
                return StreamingResponse(_after(first, stream), media_type="text/event-stream")
            async for _ in stream:
                pass
        except Refused:
            await stream.aclose()
            raise
        return JSONResponse(reply.body())

    async def _events(
        self,
        model: ServedModel,
        reply: Reply,
        pieces: "asyncio.Queue[tuple[int, Piece]]",
        watch: "asyncio.Task[None]",
        leave: Callable[[], None],
    ) -> AsyncIterator[bytes]:
        """The events of a reply, with all pieces that are there in one send."""
        try:
            data = reply.opening()
            while not reply.is_complete:
                index, piece = await pieces.get()
                while True:
                    if piece.finish in FAILURES:
                        message, status = FAILURES[piece.finish]
                        self._count(model, piece.finish)
                        raise Refused(message, status=status)
                    reply.add(index, piece)
                    if reply.asked.is_streamed:
                        data += reply.events(index, piece)
                    if pieces.empty():
                        break
                    index, piece = pieces.get_nowait()
                if reply.is_complete:
                    data += reply.closing()
                    self._count(model, "finished")
                yield data
                data = b""
        except (GeneratorExit, asyncio.CancelledError):  # the client has left the stream
            if not reply.is_complete:
                self._count(model, "cancelled")
            raise
        finally:
            watch.cancel()
            leave()

    def _count(self, model: ServedModel, outcome: str) -> None:
        key = (model.name, outcome)
        self.requests[key] = self.requests.get(key, 0) + 1

    # --- the rest ---

    async def models(self, request: Request) -> Response:
        """Answer GET /v1/models."""
        data = [model.description() for model in self.served]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """Answer GET /v1/models/NAME."""
        for model in self.served:
            if model.name == request.path_params["name"]:
                return JSONResponse(model.description())
        raise Refused("no such model is served", "model", "model_not_found", 404)

    async def load_model(self, request: Request) -> Response:
        """Answer `transformers chat`, which asks its server to load a model: it is loaded."""
        return Response(event({"status": "ready", "cached": True}), media_type="text/event-stream")

    async def health(self, request: Request) -> Response:
        """Answer GET /health: 503 once the server shuts down, or a model answers no more."""
        status = "ok"
        if any(model.engine.is_draining for model in self.served):
            status = "stopping"
        elif any(model.engine.is_failed for model in self.served):
            status = "failed"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        """Answer GET /metrics, in Prometheus' text format."""
        lines = []
        for name, (kind, text, value) in METRICS.items():
            lines += [f"# HELP hfsft_{name} {text}", f"# TYPE hfsft_{name} {kind}"]
            lines += [
                f'hfsft_{name}{{model="{_label(model.name)}"}} {value(model.engine):g}'
                for model in self.served
            ]
        lines += [
            "# HELP hfsft_requests_total Requests for answers, by outcome.",
            "# TYPE hfsft_requests_total counter",
        ]
        lines += [
            f'hfsft_requests_total{{model="{_label(name)}",outcome="{outcome}"}} {count}'
            for (name, outcome), count in sorted(self.requests.items())
        ]
        return PlainTextResponse(
            "\n".join([*lines, ""]), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


METRICS: dict[str, tuple[str, str, Callable[[Any], float]]] = {
    "answers_running": ("gauge", "Answers being generated.", lambda e: len(e.running)),
    "answers_waiting": ("gauge", "Answers in the queue.", lambda e: len(e.waiting)),
    "tokens_per_second": (
        "gauge",
        "Generated tokens per second, over ten seconds.",
        lambda e: e.tokens_per_second(),
    ),
    "generated_tokens_total": (
        "counter",
        "Generated tokens.",
        lambda e: e.generated_tokens,
    ),
    "prompt_tokens_total": ("counter", "Tokens of prompts.", lambda e: e.prompt_tokens),
}


def _label(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


async def _when_client_leaves(request: Request, leave: Callable[[], None]) -> None:
    """Call a function once the client has disconnected."""
    receive: Callable[[], Awaitable[Any]] = request.receive
    while (await receive())["type"] != "http.disconnect":
        pass
    leave()


async def _after(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A stream whose first part was taken from it; an error in it becomes its last event."""
    try:
        yield first
        async for data in rest:
            yield data
    except Refused as error:
        yield event(error_body(str(error), error.status, None, None))
    finally:
        await rest.aclose()
