"""Requests to the Hub: timeouts, the size and time of an answer, retries with growing pauses."""

import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from typing import Any

import httpcore2
import httpx2
from huggingface_hub import constants, get_session, get_token, set_client_factory
from huggingface_hub import logging as client_log
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import parse_ratelimit_headers

from hfsft.errors import HfsftError, first_line, printable, quoted

TIMEOUT = 30.0  # seconds without progress after which a request fails; the client has no limit


# seconds of pauses between the attempts at one push, as long as the Hub's rate-limit windows
PATIENCE = 300.0


CHECK_PATIENCE = 5.0  # the same, while a user waits for training to start


QUIET = 5.0  # seconds of pauses after which the user is told that a request is repeated


LONGEST_PAUSE = 60.0  # seconds


LONGEST_ANSWER = 60.0  # seconds that an answer may take, other than the content of a file


LARGEST_ANSWER = 1 << 26  # bytes of it; a listing of 100,000 files has some 30 MB


# what the client raises for JSON that is not what it expects
UNEXPECTED = (KeyError, TypeError, AttributeError, IndexError, RecursionError, JSONDecodeError)


def bound_requests(seconds: float = TIMEOUT) -> None:
    """Give every request of a push a timeout, and silence the client's warnings about retries.

    Args:
        seconds: to connect, send or receive something.

    Raises:
        HfsftError: if the client is in offline mode.
    """
    if constants.is_offline_mode():
        raise HfsftError("HF_HUB_OFFLINE is set: nothing can be pushed")
    bound_answers(seconds)
    client_log.set_verbosity_error()  # its warnings contain signed URLs


class EndlessAnswer(HfsftError):
    """An answer of the Hub that is too large or takes too long."""


def bound_answers(seconds: float = TIMEOUT) -> None:
    """Bound every request of the Hub's client, and the time and size of every answer.

    Args:
        seconds: to connect, send or receive something.
    """
    session = get_session()
    if session.event_hooks["response"] == [_bound_body] and session.timeout.read == seconds:
        return  # a new client would cut off the requests of other threads
    set_client_factory(lambda: _bounded_client(session.event_hooks["request"], seconds))


def _bounded_client(asked: list[Callable[..., Any]], seconds: float) -> httpx2.Client:
    """The Hub's client, with the hooks that huggingface_hub gives its requests."""
    asked = [hook for hook in asked if hook is not _ask_for_gzip]
    hooks = {"request": [*asked, _ask_for_gzip], "response": [_bound_body]}
    client = httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=seconds)
    # the only way to a transport's sockets, also to those of proxies
    for transport in filter(None, (client._transport, *client._mounts.values())):
        transport._pool._network_backend = _BoundBackend(transport._pool._network_backend)
    return client


class _BoundStream(httpcore2.NetworkStream):
    """A connection on which no answer may take for ever: a timeout counts each read anew.

    Headers, the framing of a body and the body itself count, from the end of the request on.
    """

    def __init__(self, stream: httpcore2.NetworkStream):
        self.stream, self.asked, self.is_file = stream, time.monotonic(), False

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if not self.is_file and time.monotonic() - self.asked > LONGEST_ANSWER:
            raise EndlessAnswer(f"the Hub's answer takes longer than {LONGEST_ANSWER:g} s")
        return self.stream.read(max_bytes, timeout)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.stream.write(buffer, timeout)
        self.asked, self.is_file = time.monotonic(), False

    def close(self) -> None:
        self.stream.close()

    def start_tls(self, *args: Any, **settings: Any) -> httpcore2.NetworkStream:
        return _BoundStream(self.stream.start_tls(*args, **settings))

    def get_extra_info(self, info: str) -> Any:
        return self.stream.get_extra_info(info)


class _BoundBackend(httpcore2.NetworkBackend):
    """Opens connections whose answers are bounded."""

    def __init__(self, backend: httpcore2.NetworkBackend):
        self.backend = backend

    def connect_tcp(self, *args: Any, **settings: Any) -> httpcore2.NetworkStream:
        return _BoundStream(self.backend.connect_tcp(*args, **settings))

    def connect_unix_socket(self, *args: Any, **settings: Any) -> httpcore2.NetworkStream:
        return _BoundStream(self.backend.connect_unix_socket(*args, **settings))

    def sleep(self, seconds: float) -> None:
        self.backend.sleep(seconds)


class _BoundBody(httpx2.SyncByteStream):
    """The body of an answer, which may be only so large, packed and unpacked."""

    def __init__(self, stream: Any, packed: bool):
        self.stream = stream
        self.unpack = zlib.decompressobj(zlib.MAX_WBITS | 32) if packed else None

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self.stream:
            if self.unpack:
                try:
                    part = self.unpack.decompress(part, LARGEST_ANSWER + 1 - size)
                except zlib.error as error:
                    raise httpx2.DecodingError(str(error)) from None
            size += len(part)
            if size > LARGEST_ANSWER:
                raise EndlessAnswer(f"the Hub's answer is larger than {LARGEST_ANSWER:,} bytes")
            yield part

    def close(self) -> None:
        """Close the connection."""
        self.stream.close()


def _ask_for_gzip(request: httpx2.Request) -> None:
    """Ask for no other compression: what it unpacks to is bounded here."""
    if request.headers.get("Accept-Encoding") != "identity":
        request.headers["Accept-Encoding"] = "gzip"


def _bound_body(response: httpx2.Response) -> None:
    """Bound the body of whatever is not a file that is downloaded."""
    is_api = response.request.method != "GET" or "/api/" in response.request.url.path
    connection = response.extensions.get("network_stream")
    if response.status_code in (200, 206) and not is_api:
        if isinstance(connection, _BoundStream):
            connection.is_file = True
        return
    packing = response.headers.get("Content-Encoding", "identity").strip().lower()
    if packing not in ("identity", "gzip", "x-gzip", "deflate"):
        raise EndlessAnswer(f"the Hub's answer is packed as {quoted(packing)}, not as asked for")
    if packing != "identity":
        del response.headers["Content-Encoding"]
    response.stream = _BoundBody(response.stream, packing != "identity")


def insist(request: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Make a request, retrying temporary failures, and return its result.

    Args:
        request: makes it; must be idempotent.
        patience: seconds of pauses in total, including those that the Hub asks for.

    Raises:
        Exception: the error of the last attempt.
    """
    pause, waited = 1.0, 0.0
    while True:
        try:
            return request()
        except RecursionError:  # a RuntimeError, of JSON that is too deep
            raise
        except (HTTPError, ConnectionError, TimeoutError, RuntimeError) as error:
            # the client wraps errors of uploads in a RuntimeError
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            cause = cause or error
            seconds = max(pause, _requested_pause(cause))
            if not _is_temporary(cause) or waited + seconds > patience:
                raise cause from None
            if waited < QUIET <= waited + seconds:
                reason = without_tokens(in_words(cause))
                print(
                    f"hfsft: the Hub does not take it yet ({reason}); trying again for up to "
                    f"{patience:g} s",
                    file=sys.stderr,
                    flush=True,
                )
        time.sleep(seconds)
        waited, pause = waited + seconds, min(2 * pause, LONGEST_PAUSE)


def _is_temporary(error: BaseException) -> bool:
    """Whether a request may succeed if it is made again."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        # 412: another commit was made in the meantime
        return status in (408, 412, 429) or (status >= 500 and status != 501)
    # no response at all; hf_xet raises its own errors instead of HTTPError
    return isinstance(error, (HTTPError, ConnectionError, TimeoutError, RuntimeError))


def _requested_pause(error: BaseException) -> float:
    """Seconds that the Hub asks to wait before a retry; 0 if it does not."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    seconds = headers.get("Retry-After", "").strip()
    return float(seconds) if seconds.isdigit() else 0.0


def in_words(error: BaseException) -> str:
    """An error in one line; of an answer of the Hub its status and the server's message."""
    if not isinstance(error, HfHubHTTPError):
        return first_line(error)
    server = printable(error.server_message or error.response.reason_phrase).splitlines()
    return f"{error.response.status_code} {server[0] if server else ''}".strip()


def without_tokens(text: str) -> str:
    """The text with access tokens removed: this user's, and anything that looks like one."""
    known = {os.environ.get("HF_TOKEN", "").strip(), get_token()}
    for token in filter(None, known):
        text = text.replace(token, "(token)")
    return re.sub(r"hf_[A-Za-z0-9]{20,}", "(token)", text)
