"""Requests to the Hub: timeouts, the size and time of an answer, retries with growing pauses."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from typing import Any

import httpx2
from huggingface_hub import constants, get_session, get_token, set_client_factory
from huggingface_hub import logging as client_log
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import parse_ratelimit_headers

from hfsft.errors import HfsftError, first_line, printable

TIMEOUT = 30.0  # seconds without progress after which a request fails; the client has no limit


# seconds of pauses between the attempts at one push, as long as the Hub's rate-limit windows
PATIENCE = 300.0


CHECK_PATIENCE = 5.0  # the same, while a user waits for training to start


QUIET = 5.0  # seconds of pauses after which the user is told that a request is repeated


LONGEST_PAUSE = 60.0  # seconds


LONGEST_ANSWER = 60.0  # seconds that the body of an answer may take, other than a file's


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
    """An answer of the Hub whose body is too large or takes too long."""


def bound_answers(seconds: float = TIMEOUT) -> None:
    """Bound every request of the Hub's client, and the time and size of every answer's body.

    Args:
        seconds: to connect, send or receive something.
    """
    session = get_session()
    hooks = {"request": session.event_hooks["request"], "response": [_bound_body]}
    if session.event_hooks["response"] == [_bound_body] and session.timeout.read == seconds:
        return  # a new client would cut off the requests of other threads
    set_client_factory(
        lambda: httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=seconds)
    )


class _BoundBody(httpx2.SyncByteStream):
    """The body of an answer, which may not go on for ever: a timeout counts each part anew."""

    def __init__(self, stream: Any):
        self.stream, self.began = stream, time.monotonic()

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self.stream:
            yield part
            size += len(part)
            if size > LARGEST_ANSWER:
                raise EndlessAnswer(f"the Hub's answer is larger than {LARGEST_ANSWER:,} bytes")
            if time.monotonic() - self.began > LONGEST_ANSWER:
                raise EndlessAnswer(f"the Hub's answer takes longer than {LONGEST_ANSWER:g} s")

    def close(self) -> None:
        """Close the connection."""
        self.stream.close()


def _bound_body(response: httpx2.Response) -> None:
    """Bound the body of whatever is not a file that is downloaded."""
    if response.request.method != "GET" or "/api/" in response.request.url.path:
        response.stream = _BoundBody(response.stream)


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
