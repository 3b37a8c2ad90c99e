"""Untrusted templates, models and file names; and no local paths in what is uploaded."""

import json
import os
import pickle
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from faults import EVERY_STEP
from hub_server import HubServer
from plain_tokenizers import MARKED, plain_bpe

from hfsft import sft
from hfsft.errors import ModelError
from hfsft.hub.client import _additions
from hfsft.tokens import foreign_templates
from hfsft.tokens.encoding import encode_conversations
from hfsft.tokens.messages import Conversation
from hfsft.tokens.tokenizer import load_tokenizer
from hfsft.tokens.training_flags import BadRow

# --- chat templates ---

LARGE = "takes more than 256 MiB of memory"
SLOW = "takes more than 0.3 s of processor time"
BOMBS = {
    "{{ 'a' * 500000000 }}": LARGE,
    "{% set n = 50000000000 %}{{ 'a' * n }}": LARGE,
    "{{ 'a' | center(999999999) }}": LARGE,
    "{{ '%0999999999d' | format(1) }}": LARGE,
    "{% set l = [0] * 200000000 %}": LARGE,
    "{% set ns = namespace(x='abcdefgh') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}": LARGE,
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": SLOW,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}":
        SLOW,
    "{{ 9 ** (9 ** 9) }}": SLOW,
    "{{ 'a' * 100000 }}": "writes 100,055 characters",
    "{{ 1 / 0 }}": "refuses it: division by zero",
    "{% for a in range(10 ** 9) %}{% endfor %}": "refuses it: Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "refuses it: maximum recursion depth",
    "{% for a in [1] %}" * 30 + "{% endfor %}" * 30: "refuses it: too many statically nested",
    "{{ ''.__class__.__mro__ }}": "refuses it: access to attribute '__class__'",
}  # fmt: skip


def with_template(folder: Path, template: str) -> str:
    made = plain_bpe("<|end|>", eos_token="<|end|>")
    made.chat_template = template
    made.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("bomb", "message"), BOMBS.items(), ids=range(len(BOMBS)))
def test_a_template_that_exceeds_its_limits_is_rejected(tmp_path, monkeypatch, bomb, message):
    if message == SLOW:
        monkeypatch.setattr(foreign_templates, "SECONDS", 0.3)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(with_template(tmp_path, bomb + MARKED))
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path}: ") and message in first
    assert second.strip().startswith("Choose another: tokenizer: {chat_template: FILE}")


def test_a_template_that_exceeds_its_limits_on_a_row_ends_the_stage(tmp_path):
    bomb = "{% if 'boom' in messages[0].content %}{{ 'a' * 500000000 }}{% endif %}"
    made = load_tokenizer(with_template(tmp_path, bomb + MARKED))
    calm = [{"role": "user", "content": "calm"}, {"role": "assistant", "content": "yes"}]
    loud = [{"role": "user", "content": "boom"}, calm[1]]
    (encoded,) = encode_conversations([Conversation(calm)], made)
    assert not isinstance(encoded, BadRow)
    with pytest.raises(ModelError, match=LARGE):  # not a row that is left out, one after the other
        encode_conversations([Conversation(loud)] * 1000, made)
    with pytest.raises(ModelError, match=LARGE):
        foreign_templates.prompt_text(loud[:1], made)
    long = [{"role": "user", "content": "to be or not " * 20_000}, calm[1]]
    # limits are relative to the row's own length
    (encoded,) = encode_conversations([Conversation(long)], made)
    assert not isinstance(encoded, BadRow)


# --- untrusted models ---


class Evil:
    """Creates a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def model_files(tmp_path_factory, tokenizer, make_model) -> dict[str, bytes]:
    """The files of a model that can be trained."""
    folder = tmp_path_factory.mktemp("model_files")
    make_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def changed(data: bytes, **keys) -> bytes:
    return json.dumps(json.loads(data) | keys).encode()


def repositories(model_files: dict[str, bytes], mark: Path) -> dict[str, dict[str, bytes]]:
    """Malicious models, by the name of what they attempt."""
    evil, code = pickle.dumps(Evil(mark)), f"import os; os.system('touch {mark}')".encode()
    no_weights = {name: data for name, data in model_files.items() if name != "model.safetensors"}
    odd = ("../evil", "-rf", "--help", "ünï/🙂.txt", "a\nb", "x" * 200, "$(touch x)", "..\\up")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../out.safetensors"}}
    to_pickle = {"metadata": {}, "weight_map": {"lm_head.weight": "w.bin"}}
    base = {"peft_type": "LORA", "base_model_name_or_path": "somebody/else", "r": 4}
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    its_tokenizer = {"AutoTokenizer": [None, "evil.T"]}
    return {
        "odd": model_files | dict.fromkeys(odd, b"evil"),
        "both": model_files | {"pytorch_model.bin": evil},
        "pickle": no_weights | {"pytorch_model.bin": evil},
        "index": no_weights | {"model.safetensors.index.json": json.dumps(index).encode()},
        "indexed-pickle": no_weights
        | {"model.safetensors.index.json": json.dumps(to_pickle).encode(), "w.bin": evil},
        "adapter": model_files
        | {"adapter_config.json": json.dumps(base).encode(), "adapter_model.bin": evil},
        "code": model_files
        | {"config.json": changed(model_files["config.json"], model_type="evil", auto_map=auto_map)}
        | {"evil.py": code},
        "tokenizer-code": model_files
        | {
            "tokenizer_config.json": changed(
                model_files["tokenizer_config.json"], tokenizer_class="Evil", auto_map=its_tokenizer
            ),
            "evil.py": code,
        },
    }


ANSWERS = {
    "odd": "loaded",
    "both": "loaded",
    "pickle": "file named model.safetensors",
    "index": "its weights are to be read from '../../out.safetensors', which is unsafe",
    "indexed-pickle": "its weights are to be read from 'w.bin', which is unsafe",
    "adapter": "is a LoRA adapter",
    "code": "it needs Python code of its repository; pass --trust_remote_code to run it",
    "tokenizer-code": "it needs Python code of its repository; pass --trust_remote_code to run it",
}
LOAD = """
import json, sys
from pathlib import Path
from hfsft.errors import HfsftError
from hfsft.data.encoded import model_positions
from hfsft.model.loading import load_model
from hfsft.recipe.schema import Stage
from hfsft.tokens.tokenizer import load_tokenizer

results = {}
for start in sys.argv[1:]:
    stage = Stage("sft", Path("run/sft"), 1, [], 0, model_name_or_path=start, max_length=64)
    try:
        model_positions(stage)
        load_model(stage, load_tokenizer(start))
        results[start] = "loaded"
    except HfsftError as error:
        results[start] = str(error)
print(json.dumps(results))
"""


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_a_model_runs_no_code_and_reaches_nothing_else(tmp_path, model_files, place):
    mark, home = tmp_path / "mark", tmp_path / "home"
    home.mkdir()
    made = repositories(model_files, mark)
    with HubServer() as hub:
        if place == "hub":
            for name, files in made.items():
                hub.add_repo(f"me/{name}", files=files)
            starts = {f"me/{name}": name for name in made}
        else:
            for name, files in made.items():
                for file, data in files.items():
                    if ".." not in file:
                        path = home / "models" / name / file
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(data)
            starts = {f"models/{name}": name for name in made}
        # any prompt on standard input would be answered with yes
        ours, theirs = pty.openpty()
        os.write(ours, b"y\n" * 20)
        done = subprocess.run(
            [sys.executable, "-c", LOAD, *starts],
            cwd=home,
            env=hub.env(tmp_path / "hf", "hf_read") | {"OMP_NUM_THREADS": "1"},
            stdin=theirs,
            capture_output=True,
            text=True,
        )
        os.close(ours)
        os.close(theirs)
        assert done.returncode == 0, done.stderr
        results = json.loads(done.stdout.splitlines()[-1])
        for start, name in starts.items():
            assert ANSWERS[name] in results[start] and len(results[start].splitlines()) == 1
        assert not hub.seen("somebody")
    assert "[y/N]" not in done.stdout + done.stderr and not mark.exists()
    made_here = {path.name for path in tmp_path.iterdir()}
    assert made_here <= {"home", "hf"} and {p.name for p in home.iterdir()} <= {"models"}


# --- uploads ---


def test_a_push_contains_no_local_path(tmp_path, model_files, capsys):
    start = tmp_path / "secret-place" / "model"
    start.mkdir(parents=True)
    for name, data in model_files.items():
        (start / name).write_bytes(data)
    chats = tmp_path / "secret-place" / "chats.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"A number, {n}."} for n in range(40)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "fast",
        "output_dir": str(tmp_path / "secret-place" / "runs"),
        "sft": {
            "model_name_or_path": str(start),
            "data": [{"path": str(chats)}],
            "held_out": 4,
            "examples_per_step": 4,
            "max_length": 64,
            "lora": {"r": 4},
            "metric_for_best_model": "loss",
            **EVERY_STEP,
            "max_steps": 3,
        },
    }
    path = tmp_path / "secret-place" / "fast.yaml"
    path.write_text(yaml.safe_dump(recipe))
    sft.main(str(path), "--quiet")
    folder = tmp_path / "secret-place" / "runs" / "fast" / "sft"
    checkpoint = folder / "checkpoints" / "checkpoint-3"
    sent = [
        *_additions(folder, "", "me/fast", ()),
        *_additions(checkpoint, "last-checkpoint/", "me/fast", ("README.md",)),
    ]
    files = {}
    for addition in sent:
        with addition.as_file() as file:
            files[addition.path_in_repo] = file.read()
    assert {"README.md", "stage.json", "data.json", "adapter/adapter_config.json"} <= set(files)
    assert {"last-checkpoint/adapter_config.json", "last-checkpoint/trainer_state.json"} <= set(
        files
    )
    listed = json.loads(files["last-checkpoint/manifest.json"])["files"]
    assert {f"last-checkpoint/{name}" for name in listed} <= set(files)  # it can be resumed from
    naming = [name for name, data in files.items() if b"secret-place" in data]
    assert naming == []
    adapter = json.loads(files["adapter/adapter_config.json"])
    assert adapter["base_model_name_or_path"] == "./model"
    assert json.loads(files["stage.json"])["settings"]["sft"]["data"] == [{"path": "chats.jsonl"}]
    # the local record keeps the path
    assert json.loads((folder / "stage.json").read_text())["lineage"]["model"] == str(start)
    assert capsys.readouterr().out == ""
    sft.main(str(path), "--quiet", "--restart", "--max_steps", "1")
    assert capsys.readouterr().out == "" and (folder.parent / "sft.old-1").is_dir()
