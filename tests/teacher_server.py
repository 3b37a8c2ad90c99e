"""A small OpenAI-compatible server on loopback, whose model knows lighthouses, and its documents.

with TeacherServer() as server:
    server.fail(2, status=429, headers={"Retry-After": "7"})
    Teacher(server.url).ask(...)
    assert server.asked == 3
"""

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOWNS = ("Brandvik", "Ostmark", "Felsund", "Kirkholm", "Nordaas", "Tarnby")


def lighthouse(town: str, year: int) -> str:
    """A document of some 300 characters."""
    return (
        f"The lighthouse of {town} was built in {year} by local fishermen. It stands on a granite "
        "cliff above the harbour and is forty metres tall. Its lamp burned whale oil until "
        "electric light replaced it. Visitors climb the narrow staircase every summer, and a small "
        "museum shows the old lenses.\n"
    )


def expert(prompt: str) -> str:
    """The answer of a model that does what the default prompts ask for."""
    town, year = re.search(r"lighthouse of (\w+) was built in (\d+)", prompt).groups()
    if "about a fact" in prompt:
        return f"When was the lighthouse of {town} built?"
    if "how or why" in prompt:
        return f"Question: How was the lamp of the lighthouse of {town} fuelled?"
    if "Summarize" in prompt:
        return f"The lighthouse of {town} was built in {year} and stands on a granite cliff."
    if "When was" in prompt:
        return f"The lighthouse of {town} was built in {year} by local fishermen."
    return "Its lamp burned whale oil until electric light replaced it."


class TeacherServer:
    """The server; its faults are set by the number of the chat request they hit, from 1."""

    def __init__(self, answer: Callable[[str], str] = expert):
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.faults: dict[int, dict[str, Any]] = {}
        self.models: Any = {"data": [{"id": "expert"}]}
        self.on_request: Callable[[int], None] = lambda number: None
        self.lock = threading.Lock()
        self.stopping = threading.Event()

    @property
    def asked(self) -> int:
        """Chat requests so far."""
        return len(self.bodies)

    def fail(self, number: int, **fault: Any) -> None:
        """What a chat request gets instead of an answer.

        Args:
            number: the request's, from 1.
            fault: `status`, `headers`, `body` (bytes), `stall` (nothing is sent), or `drip` (a byte
                every tenth of a second).
        """
        self.faults[number] = fault

    def __enter__(self) -> "TeacherServer":
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                owner.send(self, {"body": json.dumps(owner.models).encode()})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    owner.bodies.append(body)
                    owner.headers.append(dict(self.headers))
                    number = owner.asked
                owner.on_request(number)
                owner.send(self, owner.faults.get(number) or owner.completion(body))

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        serve = self.server.serve_forever
        threading.Thread(target=serve, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """The response to a chat request."""
        text = self.answer(body["messages"][-1]["content"])
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return {"body": json.dumps({"choices": [choice]}).encode()}

    def send(self, handler: BaseHTTPRequestHandler, response: dict[str, Any]) -> None:
        """Send a response, or stall."""
        if response.get("stall"):
            self.stopping.wait(30)
            return
        body = response.get("body", b"")
        drip = response.get("drip")
        try:
            handler.send_response(response.get("status", 200))
            for name, value in response.get("headers", {}).items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(body) if not drip else 1000))
            handler.end_headers()
            while drip and not self.stopping.is_set():
                handler.wfile.write(b" ")
                handler.wfile.flush()
                self.stopping.wait(0.1)
            handler.wfile.write(body)
        except OSError:  # the client has gone
            pass
