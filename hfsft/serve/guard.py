"""What is checked of every request before it is answered, and what every response says."""

import hmac
import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hfsft.serve.replies import error_response

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/", "/health")  # without the API key: the page asks for it
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses requests with a wrong Host (DNS rebinding), Origin (other web pages) or key."""

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        api_key: str | None = None,
        allow_hosts: tuple[str, ...] = (),
        allow_origins: tuple[str, ...] = (),
    ):
        """Wrap an application.

        Args:
            app: answers what is not refused.
            host: the address that the server listens at.
            api_key: clients send it as a bearer token; None: they need none.
            allow_hosts: names it is reached by, beside its own.
            allow_origins: of other web pages that may use it, or "*".
        """
        self.app, self.api_key, self.allow_origins = app, api_key, allow_origins
        self.is_local = is_loopback(host)
        own = () if self.is_local else (host, socket.gethostname(), socket.getfqdn())
        self.hosts = {name.lower() for name in (*LOOPBACK, *own, *allow_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        answer: Any = self.refusal(headers, scope["path"]) or self.app
        await answer(scope, receive, send_with_headers)

    def refusal(self, headers: Headers, path: str) -> Response | None:
        """The response to a request that is refused."""
        host = headers.get("host", "")
        if not self._is_own(host):
            message = f"the Host {host!r} is not this server's; --allow_host adds a name"
            return error_response(message, 403, code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and not self._is_allowed(origin, host):
            message = f"pages of {origin!r} may not use this server; --allow_origin adds one"
            return error_response(message, 403, code="wrong_origin")
        if self.api_key is None or path in OPEN_PATHS:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if scheme.lower() == "bearer" else b""
        if hmac.compare_digest(given, self.api_key.encode()):
            return None
        message = "wrong or missing API key; send it as `Authorization: Bearer KEY`"
        bearer = {"WWW-Authenticate": "Bearer"}
        return error_response(message, 401, code="invalid_api_key", headers=bearer)

    def _is_own(self, host: str) -> bool:
        """Whether a Host header names this server; the port may be a tunnel's."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        # rebinding needs a DNS name
        return name in self.hosts or (not self.is_local and _is_address(name))

    def _is_allowed(self, origin: str, host: str) -> bool:
        """Whether a page of an origin may use this server: its own page, or an allowed one."""
        if "*" in self.allow_origins or origin in self.allow_origins:
            return True
        return origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
