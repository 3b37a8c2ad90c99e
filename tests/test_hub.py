"""Models and datasets on the Hub: one that answers, on loopback, and one out of reach."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

from hfsft.errors import ModelError
from hfsft.hub import require_model

ROWS = "".join(
    json.dumps(
        {
            "messages": [
                {"role": "user", "content": f"Question {number}?"},
                {"role": "assistant", "content": "Yes."},
            ]
        }
    )
    + "\n"
    for number in range(8)
)
TEXTS = "".join(json.dumps({"text": f"Document {number} ends."}) + "\n" for number in range(8))
NOWHERE = "http://127.0.0.1:9"  # nothing listens there

# evaluates expressions in one process, since the endpoint is read at import
ASK = """
import importlib, json, sys, time
from hfsft.errors import HfsftError
from hfsft.recipe import Source, Stage

class Names(dict):
    def __missing__(self, name):  # a process imports what it is asked for alone
        if name == "snapshot_download":
            return importlib.import_module("huggingface_hub").snapshot_download
        for module in ("hub", "mixture", "corpus", "tokenizer", "model"):
            if f"\\ndef {name}(" in open(f"hfsft/{module}.py").read():
                return getattr(importlib.import_module(f"hfsft.{module}"), name)
        raise KeyError(name)

def stage(**settings):
    settings = {"data": [], "held_out": 0, **settings}
    return Stage(name="sft", folder=None, seed=1, **settings)

names, answers = Names(Source=Source, stage=stage), []
for expression in sys.argv[1:]:
    began = time.perf_counter()
    try:
        answer = eval(expression, {}, names)
    except HfsftError as error:
        answer = [type(error).__name__, str(error)]
    answers.append([answer, time.perf_counter() - began])
print(json.dumps(answers))
"""


def ask(env: dict[str, str], *expressions: str) -> list:
    """The value of each expression in a new process, or its error's type and text; and seconds."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *expressions],
        cwd=Path(__file__).parent.parent,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


def test_what_the_hub_has_is_loaded(hub, tmp_path, tokenizer, make_model):
    tokenizer.save_pretrained(tmp_path / "model")
    make_model("llama").save_pretrained(tmp_path / "model")
    hub.add_repo(
        "me/model",
        files={file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()},
    )
    hub.add_repo("me/chats", "dataset", {"train.jsonl": ROWS.encode()})
    hub.add_repo("me/text", "dataset", {"train.jsonl": TEXTS.encode()})
    answers = ask(
        hub.env(tmp_path / "home"),
        "load_tokenizer('me/model').hfsft_template",
        "load_model(stage(model_name_or_path='me/model'), load_tokenizer('me/model')).num_parameters()",  # noqa: E501
        "load_rows(Source('me/chats'), 0).num_rows",
        "load_rows(Source('me/chats', rows=3, first=True), 0)['messages'][0][0]['content']",
        "load_rows(Source('me/chats', split='test'), 0)",
        "list(base_texts(stage(data=[Source('me/text', streaming=True)])))[7]",
        "next(base_texts(stage(data=[Source('me/chats', streaming=True)])))",
    )
    assert [answer for answer, _ in answers] == [
        "nanochat",
        147_776,
        8,
        "Question 0?",
        [
            "DataError",
            "me/chats: cannot be loaded: Unknown split \"test\". Should be one of ['train'].",
        ],
        "Document 7 ends.",
        [
            "DataError",
            "me/chats: has no column 'text' but messages; name its text with "
            "`columns: {text: YOUR_COLUMN}`",
        ],
    ]


def test_what_the_hub_lacks_is_an_error_that_says_so(hub, tmp_path):
    hub.add_repo("me/there", files={"config.json": b"{}"})
    hub.add_repo("me/secret", "dataset", private=True)
    private = "no dataset me/secret here or on the Hub (a private one needs `hf auth login`)"
    requests = (
        "require_on_hub('me/there', 'model')",
        "require_on_hub('me/there', 'model', 'v9')",
        "require_on_hub('me/nothing', 'model')",
        "require_on_hub('me/secret', 'dataset')",
        "require_on_hub('not a name', 'dataset')",
    )
    assert [answer for answer, _ in ask(hub.env(tmp_path), *requests)] == [
        None,
        ["ModelError", "the model me/there has no revision v9"],
        [
            "ModelError",
            "no model me/nothing here or on the Hub (a private one needs `hf auth login`)",
        ],
        ["DataError", private],
        ["DataError", "not a name is neither a folder or file here nor a name on the Hub"],
    ]
    answers = ask(hub.env(tmp_path, "hf_read"), "require_on_hub('me/secret', 'dataset')")
    assert answers[0][0] is None


def test_out_of_reach_is_one_error_at_once_unless_it_is_in_the_cache(hub, tmp_path):
    hub.add_repo("me/cached", "dataset", {"train.jsonl": ROWS.encode()})
    ask(hub.env(tmp_path), "len(snapshot_download('me/cached', repo_type='dataset'))")
    answers = ask(
        hub.env(tmp_path) | {"HF_ENDPOINT": NOWHERE},
        "require_model('me/model')",
        "load_rows(Source('me/chats'), 0)",
        "require_on_hub('me/cached', 'dataset')",
    )
    demo = "\n  To try hfsft without the Hub: hfsft run demo"
    reason = "[Errno 111] Connection refused"
    assert [answer for answer, _ in answers] == [
        ["ModelError", f"cannot reach the Hub for the model me/model: {reason}{demo}"],
        ["DataError", f"cannot reach the Hub for the dataset me/chats: {reason}{demo}"],
        None,
    ]
    assert all(seconds < 5 for _, seconds in answers)


def test_folders_are_no_business_of_the_hub(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    require_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"^\./nowhere: no such folder$"):
        require_model("./nowhere")
