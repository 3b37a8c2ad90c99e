"""A server of models in this process, on a free port."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from hfsft.serve.app import make_app
from hfsft.serve.engine import Engine
from hfsft.serve.served import ServedModel, load_served
from hfsft.serve.server import open_port


class Running:
    """A server that runs."""

    def __init__(self, served: list[ServedModel], port: int):
        self.served, self.port, self.url = served, port, f"http://127.0.0.1:{port}"

    @property
    def engine(self) -> Engine:
        """Of the first model."""
        return self.served[0].engine


@contextmanager
def serving(
    *models: str, max_batch: int = 16, max_queue: int = 1024, **guard: Any
) -> Iterator[Running]:
    """Serve models until the block ends; `guard` are settings of `Guard`."""
    served = load_served(list(models), max_batch, max_queue)
    listener = open_port("127.0.0.1", 0)
    listener.listen(2048)
    app = make_app(served, **{"host": "127.0.0.1", **guard})
    config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    yield Running(served, listener.getsockname()[1])
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    """Wait until a function returns true; an AssertionError if it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)
