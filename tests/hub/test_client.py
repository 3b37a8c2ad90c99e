"""Models and datasets on a Hub on loopback, and with no Hub reachable."""

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

from hfsft.errors import ModelError
from hfsft.hub.client import require_model

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
from pathlib import Path
from hfsft.errors import HfsftError
from hfsft.recipe.schema import Source, Stage

MODULES = ("hub.bounds", "hub.client", "data.sources", "data.mixture", "data.text")
MODULES += ("tokens.tokenizer", "model.loading")

class Names(dict):
    def __missing__(self, name):  # import only the module of a name that is used
        if name == "snapshot_download":
            return importlib.import_module("huggingface_hub").snapshot_download
        for module in MODULES:
            path = Path("hfsft", *module.split(".")).with_suffix(".py")
            if f"\\ndef {name}(" in path.read_text():
                return getattr(importlib.import_module(f"hfsft.{module}"), name)
        raise KeyError(name)

def stage(**settings):
    settings = {"data": [], "held_out": 0, **settings}
    return Stage(name="sft", folder=None, seed=1, **settings)

names, answers = Names(Source=Source, stage=stage, Path=Path), []
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
    """Each expression's value in a new process, or its error's type and text; and its seconds."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *expressions],
        cwd=Path(__file__).parents[2],
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


def test_repositories_of_the_hub_are_loaded(hub, tmp_path, tokenizer, make_model):
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
            "me/chats[test]: cannot be loaded: Unknown split \"test\". Should be one of ['train'].",
        ],
        "Document 7 ends.",
        [
            "DataError",
            "me/chats: has no column 'text', only messages; name its text column with "
            "`columns: {text: YOUR_COLUMN}`",
        ],
    ]


def test_a_missing_repository_is_an_error(hub, tmp_path):
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
        ["DataError", "not a name is neither a local path nor a valid name on the Hub"],
    ]
    answers = ask(hub.env(tmp_path, "hf_read"), "require_on_hub('me/secret', 'dataset')")
    assert answers[0][0] is None


def test_an_unreachable_hub_is_one_immediate_error_unless_cached(hub, tmp_path):
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


# -- a push


PLANTED = "hf_PlantedTokenThatNoHubKnowsOfAtAll00"  # as long as a real one
SENT = {
    ".gitattributes",
    "README.md",
    "adapter/adapter_config.json",
    "config.json",
    "model.safetensors",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny stage folder, with many files that must not be uploaded."""
    files = {
        "README.md": '---\nlicense: mit\n---\npipeline("text-generation", model="runs/x/sft")\n',
        "adapter/adapter_config.json": "{}",
        "config.json": "{}",
        "model.safetensors": f"weights of {tmp_path}",
        # not uploaded
        ".env": PLANTED,
        "adapter/.cache/x": PLANTED,
        "checkpoints/checkpoint-1/optimizer.pt": "states",
        "rejected.jsonl": "a refused row",
        "bad_steps.jsonl": "",
        "stage.json.partial": "{",
        "training_args.bin": "a pickle",
    }
    for name, text in files.items():
        (tmp_path / "sft" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sft" / name).write_text(text)
    return tmp_path / "sft"


def uploads(hub, folder: Path) -> int:
    """How often the weights were uploaded."""
    oid = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return len(hub.seen(f"PUT /cdn/{oid}"))


def test_a_folder_is_one_commit_and_nothing_is_uploaded_twice(hub, tmp_path, folder):
    repo = hub.add_repo("me/once", files={"theirs.txt": b"stays"})
    push = f"push_folder(Path({str(folder)!r}), 'me/once')"
    answers = ask(hub.env(tmp_path / "home", "hf_write"), "bound_requests()", push, push)
    assert set(hub.files("me/once")) == SENT | {"theirs.txt"}
    # the folder's own card keeps its path
    assert b'model="me/once")' in hub.files("me/once")["README.md"]
    assert 'model="runs/x/sft")' in (folder / "README.md").read_text()
    assert len(hub.seen("POST .*/me/once/commit/main")) == len(repo.commits) - 2 == 1
    assert uploads(hub, folder) == 1
    assert answers[1][0] == answers[2][0] == f"{hub.endpoint}/me/once/commit/{repo.at().oid}"
    (folder / "config.json").write_text('{"changed": true}')
    ask(hub.env(tmp_path / "home", "hf_write"), push)
    lines = [json.loads(line) for line in hub.seen("me/once/commit/main")[-1].body.splitlines()]
    assert [line["value"]["path"] for line in lines[1:]] == ["config.json"]
    assert uploads(hub, folder) == 1


def test_a_mirror_deletes_extra_files_of_its_folder_only(hub, tmp_path, folder):
    old = {"last/old.bin": b"o", "last/config.json": b"old", "lasting.txt": b"l", "README.md": b"r"}
    hub.add_repo("me/mirror", files=old)
    push = f"push_folder(Path({str(folder)!r}), 'me/mirror', 'main', 'last', ('a*',), True)"
    ask(hub.env(tmp_path / "home", "hf_write"), push)
    assert set(hub.files("me/mirror")) == {
        *(".gitattributes", "README.md", "lasting.txt"),
        *("last/README.md", "last/config.json", "last/model.safetensors"),
    }
    assert hub.files("me/mirror")["README.md"] == b"r"
    assert hub.files("me/mirror")["last/config.json"] == b"{}"


@pytest.mark.parametrize(
    ("step", "damage"),
    [
        ("commit", {"status": 429, "retry_after": 3}),
        ("commit", {"status": 503}),
        ("commit", {"status": 500, "applied": True}),
        ("commit", {"reset": True, "applied": True}),
        ("commit", {"delay": 120.0}),
        ("commit", {"truncate": 3}),
        ("commit", {"status": 412}),
        ("preupload", {"reset": True}),
        ("weights", {"status": 503}),
        ("weights", {"delay": 120.0}),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else value,
)
def test_temporary_failures_are_retried(hub, tmp_path, folder, step, damage):
    name = f"me/{'-'.join([step, *map(str, damage)])}"
    repo = hub.add_repo(name)
    oid = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    hub.fail(f"PUT /cdn/{oid}" if step == "weights" else f"POST .*/{name}/{step}/", **damage)
    push = f"push_folder(Path({str(folder)!r}), {name!r}, patience=10)"
    answers = ask(hub.env(tmp_path / "home", "hf_write"), "bound_requests(1.0)", push)
    assert answers[1][0] == f"{hub.endpoint}/{name}/commit/{repo.at().oid}"
    assert set(hub.files(name)) == SENT
    # if only the response was lost, there is no second commit
    assert len(repo.commits) == 2
    assert answers[1][1] >= damage.get("retry_after", 1)


@pytest.mark.parametrize(
    ("damage", "words", "attempts"),
    [
        ({"status": 503}, "503 Fault on demand: 503", 3),
        ({"delay": 120.0}, "timed out", 3),
        ({"status": 429, "retry_after": 60}, "429 Fault on demand: 429", 1),
        ({"status": 400}, "400 Fault on demand: 400", 1),
        ({"status": 507}, "507 Fault on demand: 507", 3),
    ],
    ids=["503", "stalled", "too long a wait", "400", "full"],
)
def test_permanent_failures_end_the_push(hub, tmp_path, folder, damage, words, attempts):
    name = f"me/down-{'-'.join(map(str, damage.values()))}"
    hub.add_repo(name)
    hub.fail(f"POST .*/{name}/commit/", times=99, **damage)
    push = f"push_folder(Path({str(folder)!r}), {name!r}, patience=3)"
    answers = ask(hub.env(tmp_path / "home", "hf_write"), "bound_requests(1.0)", push)
    kind, text = answers[1][0]
    assert (kind, text) == ("HfsftError", f"cannot push {folder} to {name}: {words}")
    assert len(hub.seen(f"POST .*/{name}/commit/")) == attempts
    assert set(hub.files(name)) == {".gitattributes"}


ODD = {
    "auth-check": "GET .*/{}/auth-check",
    "refs": "GET .*/{}/refs",
    "preupload": "POST .*/{}/preupload/",
    "commit": "POST .*/{}/commit/",
}


@pytest.mark.parametrize("body", [b"{}", b"[]", b"null", b"[[1]]", b'"x"', b"[" * 100_000])
@pytest.mark.parametrize("step", ODD)
def test_json_that_is_not_as_expected_is_one_error(hub, tmp_path, folder, step, body):
    name = f"me/odd-{step}-{len(body)}-{body[:1].hex()}-{body[1:2].hex()}"
    hub.add_repo(name)
    hub.fail(ODD[step].format(name), times=99, body=body)
    open_it = f"open_repository({name!r}, None, ['main'])"
    push = f"push_folder(Path({str(folder)!r}), {name!r}, patience=3)"
    answers = ask(hub.env(tmp_path / "home", "hf_write"), "bound_requests(5.0)", open_it, push)
    failed = [answer for answer, _ in answers[1:] if isinstance(answer, list)]
    for kind, text in failed:
        assert kind == "HfsftError" and text.startswith("cannot ") and "\n" not in text
    # what the client needs nothing of may be anything
    assert failed or step == "auth-check" or set(hub.files(name)) == SENT


@pytest.mark.parametrize("body", [b"{}", b"[]", b"null", b'{"name": {}}', b"[" * 100_000])
def test_a_token_whose_owner_is_odd_is_one_error(hub, tmp_path, body):
    hub.fail("GET /api/whoami-v2", body=body)
    ((kind, text), _), *_ = ask(hub.env(tmp_path / "home", "hf_write"), "repository_id('x')")
    assert kind == "HfsftError" and text.startswith("cannot ask the Hub whose token this is: ")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"drip": 0.1, "body": b"{" + b" " * 10**6}, "takes longer than 1 s"),
        ({"drip_headers": 0.1, "headers": {"X-Long": "x" * 10_000}}, "takes longer than 1 s"),
        ({"body": b"{" + b" " * 10**6 + b"}"}, "is larger than 100,000 bytes"),
        (
            {"body": gzip.compress(b" " * 10**8), "headers": {"Content-Encoding": "gzip"}},
            "is larger than 100,000 bytes",
        ),
        (
            {"body": b"{}", "headers": {"Content-Encoding": "zstd"}},
            "is packed as 'zstd', not as asked for",
        ),
    ],
    ids=["slow", "slow headers", "large", "a bomb", "another packing"],
)
def test_an_answer_without_end_is_cut_off(hub, tmp_path, folder, damage, words):
    name = f"me/endless-{len(repr(damage))}"
    hub.add_repo(name)
    hub.fail(f"POST .*/{name}/commit/", **damage)
    hub.fail(f"GET /api/models/{name}$", **damage)
    limits = "vars(__import__('hfsft.hub.bounds', fromlist=['x'])).update"
    answers = ask(
        hub.env(tmp_path / "home", "hf_write"),
        "bound_requests(5.0)",
        f"{limits}(LONGEST_ANSWER=1.0, LARGEST_ANSWER=100_000)",
        f"push_folder(Path({str(folder)!r}), {name!r}, patience=30)",
        f"require_model({name!r})",
    )
    assert answers[2][0] == [
        "HfsftError",
        f"cannot push {folder} to {name}: the Hub's answer {words}",
    ]
    assert answers[3][0] == [
        "ModelError",
        f"cannot find the model {name}: the Hub's answer {words}",
    ]


def test_a_push_that_is_repeated_for_long_says_so(hub, tmp_path, folder):
    hub.add_repo("me/down-long")
    hub.fail("POST .*/me/down-long/commit/", times=99, status=503)
    push = f"push_folder(Path({str(folder)!r}), 'me/down-long', patience=8)"
    done = subprocess.run(
        [sys.executable, "-c", ASK, "bound_requests(1.0)", push],
        cwd=Path(__file__).parents[2],
        env=hub.env(tmp_path / "home", "hf_write"),
        capture_output=True,
        text=True,
    )
    said = "hfsft: the Hub does not take it yet (503 Fault on demand: 503); trying again for up"
    assert done.stderr.count(said) == 1


READ_ONLY = "\n  It needs a token with write access: https://huggingface.co/settings/tokens"
REJECTED = "\n  The Hub rejected this token: run `hf auth login` or fix HF_TOKEN"
RIGHTS = 'You don\'t have the rights to create a model under the namespace "{}"'
# token, call, error
NO_ACCESS = (
    (None, "repository_id('x')", "a push needs a token: run `hf auth login`, or set HF_TOKEN"),
    (
        PLANTED,
        "repository_id('x')",
        f"cannot ask the Hub whose token this is: 401 Unauthorized{REJECTED}",
    ),
    (
        "hf_read",
        "open_repository('me/mine', None, ['main'])",
        "cannot write to me/mine on the Hub: 403 Forbidden: you must use a write token to "
        "upload to a repository." + READ_ONLY,
    ),
    (
        "hf_read",
        "open_repository('me/new', None, ['main'])",
        f"cannot write to me/new on the Hub: 403 {RIGHTS.format('me')}{READ_ONLY}",
    ),
    (
        "hf_write",
        "open_repository('other/new', None, ['main'])",
        f"cannot write to other/new on the Hub: 403 {RIGHTS.format('other')}{READ_ONLY}",
    ),
    (
        "hf_write",
        "open_repository('me/mine', True, ['main'])",
        "me/mine is public on the Hub, but a private one was requested",
    ),
    (
        "hf_write",
        "open_repository('me/mine', None, ['v1'])",
        "v1 is a tag of me/mine, but a push needs a branch",
    ),
    (
        "hf_write",
        "repository_id('../../etc')",
        "'../../etc' is not a valid repository name: use at most 96 letters, digits, '-', '_' "
        "and '.'; set hub_model_id",
    ),
    (
        "hf_\x01illegal",
        "repository_id('x')",
        "the token contains an invalid character: run `hf auth login` again",
    ),
)


def test_missing_write_access_is_reported_before_training(hub, tmp_path):
    mine = hub.add_repo("me/mine")
    mine.refs["refs/tags/v1"] = mine.at().oid
    before = set(hub.repos)
    for token, expression, words in NO_ACCESS:
        answer = ask(hub.env(tmp_path, token), "bound_requests(5.0)", expression)[1][0]
        assert answer == ["HfsftError", words]
    assert set(hub.repos) == before


def test_a_repository_and_its_branches_are_created_where_missing(hub, tmp_path):
    hub.add_repo("me/hidden", private=True)
    answers = ask(
        hub.env(tmp_path, "hf_write"),
        "repository_id('fast')",
        "repository_id('lab/fast')",
        "open_repository('lab/fast', True, ['main', 'checkpoints', 'a/b'])",
        "open_repository('lab/fast', True, ['main', 'checkpoints', 'a/b'])",
        "open_repository('me/hidden', True, ['main'])",
    )
    assert [answer for answer, _ in answers] == ["me/fast", "lab/fast", None, None, None]
    made = hub.repos["model", "lab/fast"]
    assert made.private
    assert set(made.refs) == {f"refs/heads/{name}" for name in ("main", "checkpoints", "a/b")}


def test_an_unreachable_or_disabled_hub_is_an_error_too(hub, tmp_path):
    env = hub.env(tmp_path, "hf_write")
    check = "open_repository('me/x', None, ['main'])"
    assert ask(env | {"HF_ENDPOINT": NOWHERE}, check)[0][0] == [
        "HfsftError",
        "cannot write to me/x on the Hub: [Errno 111] Connection refused",
    ]
    assert ask(env | {"HF_HUB_OFFLINE": "1"}, "bound_requests()")[0][0] == [
        "HfsftError",
        "HF_HUB_OFFLINE is set: nothing can be pushed",
    ]


def test_tokens_are_removed_from_text(hub, tmp_path):
    assert [
        answer
        for answer, _ in ask(
            hub.env(tmp_path, "hf_short"),
            f"without_tokens('Bearer hf_short and {PLANTED}!')",
            "without_tokens('hf_hub_download')",
        )
    ] == ["Bearer (token) and (token)!", "hf_hub_download"]


def test_odd_file_names_in_a_repository_do_no_harm(hub, tmp_path):
    names = ("train.jsonl", "../../escape.jsonl", "a\nb.jsonl", "$(touch x).jsonl", "..\\up.jsonl")
    hub.add_repo("me/odd", "dataset", dict.fromkeys(names, ROWS.encode()))
    home = tmp_path / "a" / "b" / "home"
    ask(hub.env(home), "load_rows(Source('me/odd'), 0).num_rows")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not [path for path in tmp_path.rglob("*escape*") if home not in path.parents]


def test_the_licence_of_a_dataset_is_that_of_its_page(hub, tmp_path):
    stated = {"one": "license: mit", "two": "license: [mit, cc-by-4.0]", "no": "x: 1"}
    for name, above in stated.items():
        files = {"README.md": f"---\n{above}\n---\n".encode()}
        hub.add_repo(f"me/licence-{name}", "dataset", files)
    asked = (f"dataset_licence('me/licence-{name}')" for name in (*stated, "nowhere"))
    answers = ask(hub.env(tmp_path), *asked, "dataset_licence('*.jsonl')")
    assert [answer for answer, _ in answers] == ["mit", "mit, cc-by-4.0", None, None, None]


def test_local_folders_need_no_hub(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    require_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"^\./nowhere: no such folder$"):
        require_model("./nowhere")
