"""The teacher, against a real server that answers, fails, stalls and answers nonsense."""

import pytest
from teacher_server import TeacherServer, lighthouse

from hfsft.documents.teacher import LARGEST, Answer, NoAnswer, Teacher, request_body
from hfsft.errors import HfsftError

BODY = request_body(
    "expert",
    [{"role": "user", "content": f"{lighthouse('Brandvik', 1871)}\nWhen was it built?"}],
    7,
    {"temperature": 0.3, "stop": None},
)
ANSWER = Answer("The lighthouse of Brandvik was built in 1871 by local fishermen.", False)


@pytest.fixture
def server():
    with TeacherServer() as server:
        yield server


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The pauses between attempts, which take no time."""
    found: list[float] = []
    monkeypatch.setattr("hfsft.hub.bounds.time.sleep", found.append)
    return found


def test_a_request_has_the_key_the_seed_and_the_fields_of_the_prompts(server):
    assert Teacher(server.url, "expert", "sk-1").ask(BODY) == ANSWER
    assert server.headers[0]["Authorization"] == "Bearer sk-1"
    assert {key: server.bodies[0][key] for key in server.bodies[0] if key != "messages"} == {
        "model": "expert",
        "seed": 7,
        "temperature": 0.3,
    }


def test_without_a_key_none_is_sent(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    Teacher(server.url, "expert").ask(BODY)
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize("end", ["", "/", "/chat/completions"])
def test_the_endpoint_may_be_given_in_several_forms(server, end):
    assert Teacher(server.url + end).url == server.url
    assert Teacher(server.url.removesuffix("/v1")).model == "expert"


def test_temporary_failures_are_retried_after_the_pause_that_is_asked_for(server, pauses):
    server.fail(1, status=500)
    server.fail(2, status=429, headers={"Retry-After": "7"})
    server.fail(3, status=503)
    assert Teacher(server.url, "expert").ask(BODY) == ANSWER
    assert pauses == [1.0, 7.0, 4.0]


def test_patience_ends(server, pauses):
    for number in range(1, 10):
        server.fail(number, status=500, body=b'{"error": {"message": "out of\\u001b[2J order"}}')
    with pytest.raises(NoAnswer, match=r"^500 out of\ufffd\[2J order$"):
        Teacher(server.url, "expert", patience=10).ask(BODY)
    assert pauses == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("fault", [{"stall": True}, {"drip": True}])
def test_a_server_that_stalls_is_asked_twice(server, pauses, fault):
    for number in (1, 2, 3):
        server.fail(number, **fault)
    with pytest.raises(NoAnswer, match=r"^no answer within 0\.4 s$"):
        Teacher(server.url, "expert", timeout=0.4).ask(BODY)
    assert server.asked == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>nginx</html>", "not a chat completion: '<html>nginx</html>'"),
        (b"{}", "not a chat completion: '{}'"),
        (b"[" * 100_000, "not a chat completion: "),
        (b"\xff\x1b[2J", "not a chat completion: '\ufffd\\\\x1b[2J'".replace("\\\\", "\\")),
        (b'{"choices": []}', "not a chat completion: "),
        (b'{"choices": [{"message": {"content": null}}]}', "a chat completion without text"),
        (b'{"choices": [{"message": {"content": [1]}}]}', "a chat completion without text"),
        (b" " * (LARGEST + 1), "a response of more than 4 MiB"),
    ],
)
def test_nonsense_is_no_answer(server, body, message):
    server.fail(1, body=body)
    with pytest.raises(NoAnswer) as error:
        Teacher(server.url, "expert").ask(BODY)
    assert str(error.value).startswith(message)
    assert server.asked == 1


def test_text_that_no_file_or_terminal_takes_is_cleaned(server):
    server.fail(1, body=b'{"choices": [{"message": {"content": "a\\ud800b\\u001b]0;x"}}]}')
    assert Teacher(server.url, "expert").ask(BODY).text == "a?b\ufffd]0;x"


def test_a_wrong_key_ends_it_and_is_not_shown(server):
    server.fail(1, status=401, body=b'{"error": {"message": "Incorrect API key sk-secret"}}')
    with pytest.raises(HfsftError) as error:
        Teacher(server.url, "expert", "sk-secret").ask(BODY)
    assert str(error.value) == (
        f"{server.url} answers 401 Incorrect API key (key)\n"
        "  set the key in the environment, or name its variable with --api_key_env"
    )
    with pytest.raises(HfsftError, match="invalid character") as error:
        Teacher(server.url, "expert", "sk-\nsecret")
    assert "secret" not in str(error.value)


def test_a_refused_request_is_not_repeated(server):
    server.fail(1, status=400, body=b'{"error": "the prompt exceeds the context"}')
    with pytest.raises(NoAnswer, match=r"^400 the prompt exceeds the context$"):
        Teacher(server.url, "expert").ask(BODY)
    assert server.asked == 1


def test_a_server_that_is_not_there_is_an_error(server, pauses):
    with pytest.raises(HfsftError, match=r"^cannot reach http://127\.0\.0\.1:9/v1: "):
        Teacher("http://127.0.0.1:9")
    with pytest.raises(HfsftError, match="'localhost:8080' is no address such as"):
        Teacher("localhost:8080")
    server.models = {"data": []}
    with pytest.raises(HfsftError, match="lists no model; name one with --model"):
        Teacher(server.url)
