"""Who is let in: hosts (DNS rebinding), origins (other web pages), keys."""

import httpx2
import pytest
from serving import Running, serving

from hfsft.serve.app import load_page

BODY = {"messages": [{"role": "user", "content": "Hi!"}], "max_tokens": 2}
CHAT = "/v1/chat/completions"


def status(server: Running, path: str = CHAT, **headers: str) -> int:
    """The status of a request, and that a refusal has OpenAI's error object."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    method = "POST" if path == CHAT else "GET"
    body = BODY if method == "POST" else None
    response = httpx2.request(method, server.url + path, json=body, headers=names)
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.status_code


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", CHAT])
def test_hosts(server, path):
    own = ("localhost", "127.0.0.1:9000", "[::1]:80", "LOCALHOST")
    others = ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[")
    assert [status(server, path, host=host) for host in own] == [200] * 4
    assert [status(server, path, host=host) for host in others] == [403] * 5


def test_origins(server):
    host = f"127.0.0.1:{server.port}"
    assert status(server, origin=f"http://{host}") == 200
    for other in ("http://evil.example", "null", "http://127.0.0.1:1", f"http://{host}.evil", ""):
        assert status(server, origin=other) == 403
        assert status(server, "/v1/models", origin=other) == 403
    options = httpx2.options(server.url + CHAT, headers={"origin": "http://evil.example"})
    assert not any("access-control" in name for name in options.headers)


def test_an_allowed_origin(folders):
    allowed = "https://app.example"
    with serving(folders("llama"), allow_origins=(allowed,), allow_hosts=("me.example",)) as it:
        assert status(it, origin=allowed) == 200
        assert status(it, origin="http://evil.example") == 403
        assert status(it, host="me.example:8000") == 200
        asked = {"origin": allowed, "access-control-request-method": "POST"}
        preflight = httpx2.options(it.url + CHAT, headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == allowed
        assert "access-control-allow-credentials" not in preflight.headers
        asked["access-control-request-headers"] = "authorization, x-stainless-lang"  # OpenAI's
        assert httpx2.options(it.url + CHAT, headers=asked).status_code == 200


def test_keys(folders):
    with serving(folders("llama"), api_key="s3cret", host="0.0.0.0") as it:
        for wrong in ("", "Bearer", "Bearer wrong", "Bearer s3cret2", "Basic s3cret", "Bearer é"):
            given = {"authorization": wrong.encode()}
            response = httpx2.post(it.url + CHAT, json=BODY, headers=given)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert status(it) == 401 == status(it, "/metrics") == status(it, "/v1/models")
        assert status(it, authorization="Bearer s3cret") == 200
        assert status(it, authorization="bearer s3cret") == 200
        assert status(it, "/health") == status(it, "/") == 200
        # an address is no name that could be rebound
        assert status(it, "/health", host="10.0.0.1:8000") == 200
        assert status(it, "/health", host="evil.example") == 403


def test_the_page_allows_its_own_script_alone(server):
    response = httpx2.get(server.url)
    policy = response.headers["content-security-policy"]
    assert policy == load_page()[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "src=" not in response.text and "https://" not in response.text.replace("https?:", "")
