"""Start the server: the port, the key, the models, signals."""

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from hfsft.errors import ServingError, first_line, printable
from hfsft.serve.app import make_app
from hfsft.serve.guard import is_loopback
from hfsft.serve.served import ServedModel, load_served
from hfsft.terminal import say

KEY_VARIABLE = "HFSFT_API_KEY"
GRACE = 60  # seconds that running answers get after SIGTERM


def serve(
    models: list[str],
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    api_key_file: Path | None = None,
    allow_hosts: tuple[str, ...] = (),
    allow_origins: tuple[str, ...] = (),
    max_batch: int = 16,
    max_queue: int = 1024,
) -> None:
    """Serve models until a signal comes.

    Args:
        models: folders or Hub ids, one or two.
        host: the address to listen at.
        port: of TCP; 0: a free one.
        api_key: see `Guard`; by default that of the file or the environment.
        api_key_file: its first line is the key.
        allow_hosts: see `Guard`.
        allow_origins: see `Guard`.
        max_batch: see `Engine`.
        max_queue: see `Engine`.

    Raises:
        ServingError: if the port is in use, others could reach the server without a key, or more
            than two models are given.
        ModelError: if a model cannot be served.
    """
    if len(models) > 2:
        raise ServingError(f"{len(models)} models are given; give one, or two to compare them")
    key = the_key(api_key, api_key_file)
    if key is None and not is_loopback(host):
        raise ServingError(
            f"--host {host} lets other machines in, so it needs a key\n"
            f"  Pass --api_key KEY, --api_key_file FILE, or set {KEY_VARIABLE}"
        )
    listener = open_port(host, port)
    if "OMP_NUM_THREADS" not in os.environ:
        # a core for the event loop, which would wait for OpenMP threads that spin on every core
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    served = load_served(models, max_batch, max_queue)
    listen(listener, host, port)
    app = make_app(
        served, host=host, api_key=key, allow_hosts=allow_hosts, allow_origins=allow_origins
    )
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # nothing of what is said, or by whom, is logged
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=GRACE,
    )
    print_address(served, listener, key is not None)
    for model in served:
        if model.engine.max_batch < max_batch:
            say(f"{model.name} answers one request at a time: a batch would change its answers")
    Server(config, served).run(sockets=[listener])


class Server(uvicorn.Server):
    """Uvicorn's server, which tells the engines that it shuts down."""

    def __init__(self, config: uvicorn.Config, served: list[ServedModel]):
        """Remember the models."""
        super().__init__(config)
        self.served = served

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish what runs; a second SIGINT ends at once."""
        for model in self.served:
            model.engine.is_draining = True  # no lock: this thread may hold it
        super().handle_exit(sig, frame)


def the_key(api_key: str | None, api_key_file: Path | None) -> str | None:
    """The API key of the command line, a file or the environment.

    Raises:
        ServingError: if it is empty, or the file cannot be read.
    """
    if api_key is not None:
        source, key = "--api_key", api_key
    elif api_key_file is not None:
        try:
            source, key = str(api_key_file), api_key_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ServingError(f"--api_key_file {api_key_file}: {first_line(error)}") from None
    elif KEY_VARIABLE in os.environ:
        source, key = KEY_VARIABLE, os.environ[KEY_VARIABLE]
    else:
        return None
    key = key.partition("\n")[0].strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ServingError(f"{source}: a key is one line of printable ASCII characters")
    return key


def open_port(host: str, port: int) -> socket.socket:
    """A socket bound to an address, before the models load.

    Raises:
        ServingError: if the address does not exist, or the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise port_error(error, host, port) from None
    return listener


def listen(listener: socket.socket, host: str, port: int) -> None:
    """Take connections, as many as there may be open files: the usual limit is 1,024.

    Raises:
        ServingError: if another socket listens there.
    """
    try:
        listener.listen(2048)
    except OSError as error:
        raise port_error(error, host, port) from None
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # macOS refuses its own "unlimited"
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def port_error(error: Exception, host: str, port: int) -> ServingError:
    """The error of an address that cannot be listened at."""
    code = getattr(error, "errno", None)
    if code == errno.EADDRINUSE:
        return ServingError(f"port {port} of {host} is in use\n  Pass another: --port {port + 1}")
    if code == errno.EACCES:
        return ServingError(f"port {port} needs more rights\n  Pass one above 1023: --port 8000")
    return ServingError(f"cannot listen at {host}, port {port}: {first_line(error)}")


def print_address(served: list[ServedModel], listener: socket.socket, has_key: bool) -> None:
    """Say where the page and the endpoint are."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    names = " and ".join(printable(model.name) for model in served)
    needs = ", with the API key" if has_key else ""
    say(f"{names}: talk to it at {url}")
    say(f"OpenAI-compatible endpoint: {url}/v1{needs}. Ctrl-C stops the server.")
