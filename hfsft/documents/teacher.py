"""A teacher: a model behind an OpenAI-compatible endpoint, asked with bounds and retries."""

import json
import time
from dataclasses import dataclass
from typing import Any

import httpx2
from huggingface_hub.errors import HfHubHTTPError

from hfsft.documents.prompts import Messages
from hfsft.errors import HfsftError, first_line, printable, quoted
from hfsft.hub.client import CHECK_PATIENCE, PATIENCE, insist

LARGEST = 2**22  # bytes of a response: 4 MiB

STALLS = 2  # attempts at a request that the server does not answer in time

# statuses that no other request would change, and the fix
HOPELESS = {
    401: "set the key in the environment, or name its variable with --api_key_env",
    403: "the key has no access to this model",
    404: "check --endpoint and --model",
    405: "check --endpoint",
}


class NoAnswer(Exception):
    """A request without a usable answer; its message is the reason."""


@dataclass(frozen=True)
class Answer:
    """What the teacher wrote.

    Args:
        text: its text.
        cut_off: whether it reached `max_tokens`.
    """

    text: str
    cut_off: bool


class Teacher:
    """A model behind an endpoint."""

    def __init__(
        self,
        endpoint: str,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        patience: float = PATIENCE,
    ):
        """Reach the server.

        Args:
            endpoint: its address, such as http://localhost:8080/v1.
            model: the model's name; None: the first one that the server lists.
            api_key: sent as a bearer token; None: no key is sent.
            timeout: seconds that one answer may take in all.
            patience: seconds of pauses between attempts at one request.

        Raises:
            HfsftError: if the address is none, or nothing answers there.
        """
        self.timeout, self.patience, self.api_key = timeout, patience, api_key
        self.url = _base_url(endpoint)
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise HfsftError("the API key contains an invalid character")  # which no error shows
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.client = httpx2.Client(headers=headers, timeout=timeout)
        listed = self._listed_models()
        if model is None and not listed:
            raise HfsftError(f"{self.url} lists no model; name one with --model")
        self.model = model or listed[0]

    def ask(self, body: dict[str, Any]) -> Answer:
        """Ask for one answer, retrying what is temporary: no connection, 429 and 5xx.

        Args:
            body: the request, as `request_body` makes it.

        Raises:
            NoAnswer: if the server has none, or what it sends is no answer.
            HfsftError: if no other request would have one either.
        """
        stalls = 0

        def attempt() -> bytes:
            nonlocal stalls
            try:
                return self._send("POST", "/chat/completions", body)
            except httpx2.TimeoutException:
                stalls += 1
                if stalls < STALLS:
                    raise
                raise NoAnswer(f"no answer within {self.timeout:g} s") from None

        try:
            return _read_answer(insist(attempt, self.patience))
        except HfHubHTTPError as error:
            if error.response.status_code in HOPELESS:
                raise self._hopeless(error) from None
            raise NoAnswer(self._shown(error)) from None
        except (httpx2.HTTPError, OSError) as error:
            raise NoAnswer(self._shown(error)) from None

    def _listed_models(self) -> list[str]:
        """The models that the server lists; none if it has no such list."""
        try:
            held = json.loads(insist(lambda: self._send("GET", "/models"), CHECK_PATIENCE))
            return [str(one["id"]) for one in held["data"]]
        except HfHubHTTPError as error:
            if error.response.status_code == 401:
                raise self._hopeless(error) from None
            return []
        except (ValueError, KeyError, TypeError, NoAnswer):
            return []
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise HfsftError(f"cannot reach {self.url}: {self._shown(error)}") from None

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        """One request; its response within the bounds of time and size."""
        deadline = time.monotonic() + self.timeout
        received = b""
        with self.client.stream(method, self.url + path, json=body) as response:
            for part in response.iter_bytes():
                received += part
                if len(received) > LARGEST:
                    raise NoAnswer(f"a response of more than {LARGEST >> 20} MiB")
                if time.monotonic() > deadline:  # the client's own timeout is between two parts
                    raise httpx2.ReadTimeout("too slow")
        if response.status_code != 200:
            said = _error_text(received) or response.reason_phrase
            raise HfHubHTTPError(f"{response.status_code} {said}", response=response)
        return received

    def _hopeless(self, error: HfHubHTTPError) -> HfsftError:
        fix = HOPELESS[error.response.status_code]
        return HfsftError(f"{self.url} answers {self._shown(error)}\n  {fix}")

    def _shown(self, error: Exception) -> str:
        """An error in one line without the key, which a server may have sent back."""
        line = first_line(error)
        return line.replace(self.api_key, "(key)") if self.api_key else line


def request_body(
    model: str, messages: Messages, seed: int, request: dict[str, Any]
) -> dict[str, Any]:
    """The body of a request for a chat completion.

    Args:
        model: its name.
        messages: the conversation so far.
        seed: of the sampling.
        request: further fields, which come last; None leaves out a field.
    """
    body = {"model": model, "messages": messages, "seed": seed} | request
    return {key: value for key, value in body.items() if value is not None}


def _base_url(endpoint: str) -> str:
    """`http://localhost:8080`, with /v1 or with /v1/chat/completions, up to /v1."""
    url = endpoint.strip().rstrip("/").removesuffix("/chat/completions")
    scheme, separator, rest = url.partition("://")
    if scheme not in ("http", "https") or not separator or not rest:
        raise HfsftError(
            f"--endpoint: {quoted(endpoint)} is no address such as http://localhost:8080/v1"
        )
    return url if "/" in rest else f"{url}/v1"


def _read_answer(received: bytes) -> Answer:
    try:
        choice = json.loads(received)["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        shown = quoted(received.decode("utf-8", "replace"))
        raise NoAnswer(f"not a chat completion: {shown}") from None
    if not isinstance(text, str):
        raise NoAnswer("a chat completion without text")
    # JSON can hold half a surrogate pair, which no file can
    return Answer(printable(text.encode("utf-8", "replace").decode()), reason == "length")


def _error_text(received: bytes) -> str:
    """What an error response says, in one line."""
    try:
        error = json.loads(received)["error"]
        said = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        said = received.decode("utf-8", "replace")
    return printable(" ".join(said.split()))[:200]
