"""A server in this process, on a free port, with tiny models."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from rigged import save

from hfsft.serve.app import make_app
from hfsft.serve.served import ServedModel, load_served
from hfsft.serve.server import open_port


class Running:
    """A server that runs."""

    def __init__(self, served: list[ServedModel], port: int):
        self.served, self.url = served, f"http://127.0.0.1:{port}"
        self.host = f"127.0.0.1:{port}"

    @property
    def engine(self) -> Any:
        return self.served[0].engine


@contextmanager
def serving(*models: str, max_batch: int = 16, max_queue: int = 1024, **guard: Any) -> Iterator:
    """Serve models until the block ends."""
    served = load_served(list(models), max_batch, max_queue)
    listener = open_port("127.0.0.1", 0)
    app = make_app(served, **{"host": "127.0.0.1", **guard})
    config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield Running(served, listener.getsockname()[1])
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def folders(tmp_path_factory, make_model, tokenizer) -> Callable[[str], str]:
    """The folder of a random model of a type, made once."""
    made: dict[str, str] = {}

    def folder(model_type: str) -> str:
        if model_type not in made:
            path = tmp_path_factory.mktemp("served") / model_type
            made[model_type] = save(make_model(model_type), tokenizer, path)
        return made[model_type]

    return folder


@pytest.fixture(scope="module")
def server(folders) -> Iterator[Running]:
    """A server of one random nanochat model."""
    with serving(folders("nanochat")) as running:
        yield running
