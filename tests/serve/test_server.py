"""The command `hfsft serve`: what stops it from starting, signals, and clients of others."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from rigged import save

from hfsft.cli import _run_app
from hfsft.errors import ModelError, ServingError
from hfsft.process import run_main
from hfsft.serve.served import load_served, model_name
from hfsft.serve.server import KEY_VARIABLE, listen, open_port, serve, the_key

BODY = {"messages": [{"role": "user", "content": "Hi!"}], "max_tokens": 200}


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`hfsft serve` in a process of its own, and its address."""
    command = [sys.executable, "-m", "hfsft", "serve", "--port", "0", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            line = running.stdout.readline()
            assert " talk to it at http://127.0.0.1:" in line, running.stderr.read()
            yield running, line.split()[-1]
        finally:
            running.kill()


def failure(capsys, *arguments: str) -> str:
    """What the command says on standard error when it ends with status 2."""
    capsys.readouterr()

    with pytest.raises(SystemExit) as caught:
        run_main(_run_app, "serve", *arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_an_open_file_limit_that_cannot_be_raised_is_kept(monkeypatch):
    resource = pytest.importorskip("resource")

    def refuse(*given):
        raise ValueError("current limit exceeds maximum limit")  # macOS, of its own "unlimited"

    monkeypatch.setattr(resource, "setrlimit", refuse)
    with open_port("127.0.0.1", 0) as listener:
        listen(listener, "127.0.0.1", 0)
        socket.create_connection(listener.getsockname()).close()


def test_a_port_in_use(folders, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = failure(capsys, folders("llama"), "--port", str(port))
    assert said == (
        f"hfsft: port {port} of 127.0.0.1 is in use\n  Pass another: --port {port + 1}\n"
    )


def test_other_machines_need_a_key(folders, capsys, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    said = failure(capsys, folders("llama"), "--host", "0.0.0.0")
    assert said.startswith("hfsft: --host 0.0.0.0 lets other machines in, so it needs a key\n")
    assert said.count("\n") == 2


def test_where_the_key_comes_from(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text("from-file\n")
    monkeypatch.setenv(KEY_VARIABLE, "from-environment")
    assert the_key("given", file) == "given"
    assert the_key(None, file) == "from-file"
    assert the_key(None, None) == "from-environment"
    for wrong in ("", " ", "ké"):
        with pytest.raises(ServingError, match="--api_key: a key is one line"):
            the_key(wrong, None)
    with pytest.raises(ServingError, match="No such file"):
        the_key(None, tmp_path / "nothing")
    monkeypatch.delenv(KEY_VARIABLE)
    assert the_key(None, None) is None


def test_an_address_that_does_not_exist():
    with pytest.raises(ServingError, match=r"cannot listen at 203\.0\.113\.1, port 8000"):
        open_port("203.0.113.1", 8000)
    with pytest.raises(ServingError, match="cannot listen at no such host"):
        open_port("no such host", 0)


BROKEN = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "unknown architecture": lambda folder: (folder / "config.json").write_text(
        '{"model_type": "perceptron"}'
    ),
    "no architecture": lambda folder: (folder / "config.json").write_text("{}"),
    "no model for text": lambda folder: (folder / "config.json").write_text(
        '{"model_type": "vit"}'
    ),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "truncated weights": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "empty weights": lambda folder: os.truncate(folder / "model.safetensors", 0),
    "other sizes": lambda folder: change_config(folder, hidden_size=128),
    "no heads": lambda folder: change_config(folder, num_attention_heads=0),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "tokenizer is no JSON": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "wrong context": lambda folder: change_config(folder, max_position_embeddings="many"),
    "wrong sampling": lambda folder: (folder / "generation_config.json").write_text("[]"),
}


def change_config(folder: Path, **keys) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_gets_two_lines(folders, tmp_path, capsys, fault):
    folder = tmp_path / "broken"
    shutil.copytree(folders("llama"), folder)
    BROKEN[fault](folder)
    said = failure(capsys, str(folder), "--port", "0")
    assert said.startswith(f"hfsft: {folder}")
    assert said.count("\n") <= 2 and "Traceback" not in said


def test_names(folders, tmp_path, make_model, tokenizer, monkeypatch):
    for run in ("one", "two"):
        for stage in ("mid", "sft"):
            save(make_model("llama"), tokenizer, tmp_path / run / stage)
            (tmp_path / run / stage / "stage.json").write_text(
                f'{{"stage": "{stage}", "status": "finished", "settings": {{}}}}'
            )
    monkeypatch.chdir(tmp_path)
    assert model_name("one/sft") == "one/sft" == model_name(str(tmp_path / "one" / "sft"))
    assert model_name(folders("llama")) == "llama"
    assert model_name("me/fast") == "me/fast"
    monkeypatch.chdir(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "more" / "one")
    names = [one.name for one in load_served(["sft", "../more/one/sft"], 1, 1)]
    assert names == ["sft", "../more/one/sft"]
    with pytest.raises(ModelError, match="is given twice"):
        load_served(["sft", str(tmp_path / "one" / "sft")], 1, 1)


def test_sigterm_finishes_what_runs(folders):
    with process(folders("nanochat"), "--api_key", "k") as (running, url):
        path, body = f"{url}/v1/chat/completions", BODY | {"stream": True}
        assert httpx2.post(path, json=body).status_code == 401
        key = {"authorization": "Bearer k"}
        with httpx2.stream("POST", path, json=body, headers=key, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert '"finish_reason":"length"' in "".join(rest) or '"stop"' in "".join(rest)
        assert "data: [DONE]" in rest
        _, error = running.communicate(timeout=60)
        assert running.returncode == 143
        assert error == "hfsft: stopped by SIGTERM\n"


@pytest.mark.slow
def test_curl_and_transformers_chat(folders):
    with process(folders("nanochat")) as (_, url):
        data = json.dumps({"messages": BODY["messages"], "max_tokens": 8})
        command = ["curl", "-s", f"{url}/v1/chat/completions", "-d", data]
        whole = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        assert whole["usage"]["completion_tokens"] == 8
        streamed = data.replace("{", '{"stream": true, ', 1)
        command = ["curl", "-sN", f"{url}/v1/chat/completions", "-d", streamed]
        assert subprocess.run(command, capture_output=True).stdout.endswith(b"data: [DONE]\n\n")

        program = Path(sys.executable).with_name("transformers")
        chat = subprocess.run(
            [program, "chat", "nanochat", f"{url}/v1", "max_new_tokens=8", "do_sample=False"],
            input="Hi!\nn\n!exit\n",
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert chat.returncode == 0, chat.stderr
        assert "nanochat was already loaded" in chat.stdout
        assert "Generation stopped after reaching the token limit" in chat.stdout
        counts = httpx2.get(f"{url}/metrics").text
        assert 'hfsft_generated_tokens_total{model="nanochat"} 24' in counts


def test_serve_needs_one_or_two_models(tmp_path):
    with pytest.raises(ServingError, match="3 models are given"):
        serve(["a", "b", "c"])
    with pytest.raises(ModelError, match="no such folder"):
        serve([str(tmp_path / "nothing")], port=0)
