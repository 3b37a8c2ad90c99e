"""The Hub of hub_server.py with the real clients: storing, reading, refusing and retrying."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
from hub_server import HubServer
from huggingface_hub import (
    _CACHED_NO_EXIST,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# huggingface_hub 2.4 hands its LFS uploads to httpx2 in a way that is being retired
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def client(hub, token="hf_write"):
    return HfApi(endpoint=hub.endpoint, token=token)


def add(path, data):
    # an open buffer is never sent through Xet, so this holds without HF_HUB_DISABLE_XET too
    return CommitOperationAdd(path, io.BytesIO(data))


def run(hub, home, code, token="hf_write", **settings):
    """The JSON that the code prints, run in a new process that can reach only this Hub."""
    environment = hub.env(home, token) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | settings
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# -- who is asking


def test_whoami_returns_the_role_and_the_organisations(hub):
    me = client(hub, "hf_read").whoami()
    assert me["name"] == "me"
    assert [org["name"] for org in me["orgs"]] == ["lab"]
    assert me["auth"]["accessToken"]["role"] == "read"
    assert hub.requests[0].token == "hf_read"
    assert hub.requests[0].status == 200


def test_a_wrong_token_is_refused_everywhere(hub):
    hub.add_repo("me/model")
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as failure:
        client(hub, "hf_wrong").whoami()
    assert failure.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as failure:
        client(hub, "hf_wrong").model_info("me/model")
    assert not isinstance(failure.value, RepositoryNotFoundError)


def test_a_read_token_cannot_write(hub):
    hub.add_repo("me/model")
    reader = client(hub, "hf_read")
    with pytest.raises(HfHubHTTPError, match="don't have the rights"):
        reader.create_repo("me/new")
    with pytest.raises(HfHubHTTPError, match="write token") as failure:
        reader.create_commit("me/model", [add("a.txt", b"a")], commit_message="a")
    assert failure.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError):
        reader.auth_check("me/model", write=True)
    assert set(hub.files("me/model")) == {".gitattributes"}


def test_a_private_repository_looks_missing_to_strangers(hub, tmp_path):
    hub.add_repo("me/secret", files={"a.txt": b"a"}, private=True)
    assert client(hub, "hf_read").model_info("me/secret").private
    for token, status in (("hf_other", 404), (False, 401)):
        for repo_id in ("me/secret", "me/missing"):
            with pytest.raises(RepositoryNotFoundError) as failure:
                client(hub, token).model_info(repo_id)
            assert failure.value.response.status_code == status
            with pytest.raises(RepositoryNotFoundError):
                client(hub, token).hf_hub_download(repo_id, "a.txt", cache_dir=tmp_path)


def test_a_gated_repository_shows_its_files_but_not_their_content(hub, tmp_path):
    hub.add_repo("me/gated", "dataset", {"a.txt": b"a"}, gated=True, readers={"guest"})
    for token, status in (("hf_other", 403), (False, 401)):
        stranger = client(hub, token)
        assert "a.txt" in stranger.list_repo_files("me/gated", repo_type="dataset")
        for attempt in (
            lambda api: api.hf_hub_download(
                "me/gated", "a.txt", repo_type="dataset", cache_dir=tmp_path
            ),
            lambda api: api.auth_check("me/gated", repo_type="dataset"),
        ):
            with pytest.raises(GatedRepoError) as failure:
                attempt(stranger)
            assert failure.value.response.status_code == status
    hub.repos["dataset", "me/gated"].readers.add("other")
    client(hub, "hf_other").auth_check("me/gated", repo_type="dataset")


# -- repositories, commits, revisions


def test_create_repo_twice_needs_exist_ok(hub):
    api = client(hub)
    url = api.create_repo("me/data", repo_type="dataset", private=True)
    assert (url.repo_id, url.repo_type) == ("me/data", "dataset")
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("me/data", repo_type="dataset")
    assert api.create_repo("me/data", repo_type="dataset", exist_ok=True) == url
    assert api.create_repo("model").repo_id == "me/model"
    assert api.create_repo("lab/model").repo_id == "lab/model"
    assert api.dataset_info("me/data").private
    assert api.repo_exists("me/model")
    assert not api.repo_exists("me/data")  # a model of that name


def test_regular_and_lfs_files_of_one_commit_come_back_byte_for_byte(hub, tmp_path):
    api = client(hub)
    api.create_repo("me/model")
    small = {f"notes/{n}.txt": b"note %d" % n for n in range(30)}
    operations = [add(path, data) for path, data in small.items()]
    operations += [add("model.safetensors", WEIGHTS), add("empty.txt", b"")]
    commit = api.create_commit("me/model", operations, commit_message="All at once")

    assert len(hub.seen("POST .*/commit/main")) == 1
    assert [request.status for request in hub.seen("PUT /cdn/")] == [200]
    assert len(hub.seen("POST .*/objects/verify")) == 1
    # the storage is another origin: it must not see the token
    assert hub.seen("PUT /cdn/")[0].token is None

    info = api.model_info("me/model", files_metadata=True)
    assert info.sha == commit.oid
    sizes = {file.rfilename: (file.size, bool(file.lfs)) for file in info.siblings}
    assert sizes["model.safetensors"] == (len(WEIGHTS), True)
    assert sizes["notes/7.txt"] == (6, False)
    assert set(api.list_repo_files("me/model")) == {
        ".gitattributes", "empty.txt", "model.safetensors", *small,
    }  # fmt: skip
    titles = [stored.title for stored in hub.repos["model", "me/model"].commits.values()]
    assert titles == ["initial commit", "All at once"]

    folder = api.snapshot_download("me/model", cache_dir=tmp_path)
    for path, data in {**small, "model.safetensors": WEIGHTS, "empty.txt": b""}.items():
        assert (tmp_path / folder / path).read_bytes() == data
    assert hub.seen("GET /cdn/.*/model.safetensors")[0].token is None
    assert hub.seen("GET /me/model/resolve/.*/notes/7.txt")[0].token == "hf_write"


def test_unchanged_files_are_not_uploaded_again(hub):
    api = client(hub)
    hub.add_repo("me/model", files={"a.txt": b"a", "model.safetensors": WEIGHTS})
    before = api.model_info("me/model").sha
    same = [add("a.txt", b"a"), add("model.safetensors", WEIGHTS)]
    assert api.create_commit("me/model", same, commit_message="Nothing").oid == before
    api.create_commit("me/model", [add("copy.safetensors", WEIGHTS)], commit_message="Copy")
    assert not hub.seen("PUT /cdn/")
    assert hub.files("me/model")["copy.safetensors"] == WEIGHTS


def test_branches_tags_and_deletions(hub, tmp_path):
    api = client(hub)
    hub.add_repo("me/model", files={"a.txt": b"first", "old/b.txt": b"b"})
    first = api.model_info("me/model").sha
    api.create_tag("me/model", tag="v1")
    api.create_branch("me/model", branch="try/one", revision=first)
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch("me/model", branch="try/one")
    api.create_branch("me/model", branch="try/one", exist_ok=True)
    changes = [add("a.txt", b"second"), CommitOperationDelete("old/")]
    second = api.create_commit("me/model", changes, commit_message="x", revision="try/one").oid

    refs = api.list_repo_refs("me/model")
    assert {r.name: r.target_commit for r in refs.branches} == {"main": first, "try/one": second}
    assert {r.name: r.target_commit for r in refs.tags} == {"v1": first}
    assert "old/b.txt" not in api.list_repo_files("me/model", revision="try/one")
    assert "old/b.txt" in api.list_repo_files("me/model")
    for revision, text in (
        ("main", "first"),
        ("try/one", "second"),
        (first, "first"),
        ("v1", "first"),
    ):
        path = api.hf_hub_download("me/model", "a.txt", revision=revision, cache_dir=tmp_path)
        assert Path(path).read_text() == text

    for attempt in (
        lambda: api.model_info("me/model", revision="nope"),
        lambda: api.hf_hub_download("me/model", "a.txt", revision="nope", cache_dir=tmp_path),
        lambda: api.create_commit(
            "me/model", [add("c", b"c")], commit_message="c", revision="nope"
        ),
    ):
        with pytest.raises(RevisionNotFoundError):
            attempt()
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("me/model", "nope.txt", cache_dir=tmp_path)
    absent = try_to_load_from_cache("me/model", "nope.txt", cache_dir=tmp_path)
    assert absent is _CACHED_NO_EXIST  # remembered under the commit the Hub named
    with pytest.raises(HfHubHTTPError) as failure:
        api.create_commit("me/model", [add("d", b"d")], commit_message="d", parent_commit="0" * 40)
    assert failure.value.response.status_code == 412
    api.delete_branch("me/model", branch="try/one")
    assert not api.revision_exists("me/model", "try/one")


def test_listings_come_in_pages_and_by_folder(hub):
    hub.add_repo("me/data", "dataset", {f"d/{n}/x.txt": b"x" for n in range(7)})
    hub.page_size = 3
    api = client(hub)
    assert len(api.list_repo_files("me/data", repo_type="dataset")) == 8
    assert len(hub.seen("GET .*/tree/main")) > 3
    top = api.list_repo_tree("me/data", repo_type="dataset")
    assert [entry.path for entry in top] == [".gitattributes", "d"]
    folder = api.list_repo_tree("me/data", "d/3", repo_type="dataset")
    assert [entry.path for entry in folder] == ["d/3/x.txt"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("me/data", "nope", repo_type="dataset"))
    found = api.get_paths_info("me/data", ["d/1", "d/1/x.txt", "nope"], repo_type="dataset")
    assert [entry.path for entry in found] == ["d/1", "d/1/x.txt"]


def test_an_unknown_request_is_an_error(hub):
    with pytest.raises(HfHubHTTPError, match="does not speak GET /api/collections/x"):
        client(hub).get_collection("x")


# -- faults


def test_500_is_retried_by_uploads_but_not_by_lookups_and_downloads(hub, tmp_path):
    api = client(hub)
    hub.add_repo("me/model")
    hub.fail("POST .*/preupload/", status=500)
    hub.fail("PUT /cdn/", status=503)
    api.create_commit("me/model", [add("x.safetensors", WEIGHTS)], commit_message="x")
    assert [request.status for request in hub.seen("POST .*/preupload/")] == [500, 200]
    assert [request.status for request in hub.seen("PUT /cdn/")] == [503, 200]
    assert hub.files("me/model")["x.safetensors"] == WEIGHTS
    hub.fail("GET /api/models/me/model$", nth=2, status=500)
    assert api.model_info("me/model").id == "me/model"
    with pytest.raises(HfHubHTTPError, match="500") as failure:
        api.model_info("me/model")
    assert failure.value.response.status_code == 500
    hub.fail("GET /cdn/", status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.hf_hub_download("me/model", "x.safetensors", cache_dir=tmp_path)
    path = api.hf_hub_download("me/model", "x.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == WEIGHTS


def test_429_waits_as_long_as_the_hub_asks(hub):
    hub.add_repo("me/model")
    hub.fail("GET .*/tree/main", status=429, retry_after=1)
    start = time.monotonic()
    assert client(hub).list_repo_files("me/model") == [".gitattributes"]
    assert time.monotonic() - start >= 2  # the client adds a second of its own
    assert [request.status for request in hub.seen("GET .*/tree/main")] == [429, 200]


def test_a_reset_is_retried_by_listings_but_not_by_downloads(hub, tmp_path):
    api = client(hub)
    hub.add_repo("me/model", files={"model.safetensors": WEIGHTS})
    hub.fail("GET .*/tree/main", reset=True)
    assert "model.safetensors" in api.list_repo_files("me/model")
    assert [request.status for request in hub.seen("GET .*/tree/main")] == [None, 200]
    for pattern in ("HEAD .*/model.safetensors", "GET /cdn/.*/model.safetensors"):
        hub.fail(pattern, reset=True)
        with pytest.raises(httpx2.ReadError):
            api.hf_hub_download("me/model", "model.safetensors", cache_dir=tmp_path)
    path = api.hf_hub_download("me/model", "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == WEIGHTS


def test_a_commit_whose_response_is_lost_still_happened(hub):
    api = client(hub)
    hub.add_repo("me/model")
    for applied in (False, True):
        hub.fail("POST .*/commit/main", reset=True, applied=applied)
        with pytest.raises(httpx2.ReadError):
            api.create_commit("me/model", [add("a.txt", b"a")], commit_message="a")
        assert ("a.txt" in hub.files("me/model")) is applied


def test_a_slow_response_is_requested_again(hub, tmp_path):
    hub.add_repo("me/model", files={"a.txt": b"a"})
    hub.fail("HEAD .*/a.txt", delay=1.0)
    path = client(hub).hf_hub_download("me/model", "a.txt", cache_dir=tmp_path, etag_timeout=0.2)
    assert Path(path).read_bytes() == b"a"
    assert len(hub.seen("HEAD .*/a.txt")) == 2


def test_a_truncated_download_is_completed(hub, tmp_path):
    hub.add_repo("me/model", files={"model.safetensors": WEIGHTS})
    hub.fail("GET /cdn/", truncate=1000)
    path = client(hub).hf_hub_download("me/model", "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == WEIGHTS
    ranges = [request.headers.get("range") for request in hub.seen("GET /cdn/")]
    # the client keeps complete 10 MB chunks only: a truncated one is requested again
    assert ranges == [None, None]


def test_a_stopped_hub_cannot_be_reached(tmp_path):
    with HubServer() as hub:
        api = client(hub)
        assert api.whoami()["name"] == "me"
    with pytest.raises(httpx2.ConnectError):
        api.whoami()


# -- processes that read HF_ENDPOINT when they start


def test_upload_folder_from_disk(hub, tmp_path):
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "sub" / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.")
    (folder / "skip.log").write_text("x")
    files = run(hub, tmp_path, """
import json
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("me/out", exist_ok=True)
api.upload_folder(repo_id="me/out", folder_path="out", ignore_patterns=["*.log"])
print(json.dumps(api.list_repo_files("me/out")))
""")  # fmt: skip
    assert files == [".gitattributes", "README.md", "model.safetensors", "sub/config.json"]
    assert hub.files("me/out")["model.safetensors"] == WEIGHTS
    assert len(hub.seen("POST .*/commit/main")) == 1
    assert hub.seen("POST /api/validate-yaml")


def test_a_stalled_download_is_restarted(hub, tmp_path):
    hub.add_repo("me/model", files={"model.safetensors": WEIGHTS})
    hub.fail("GET /cdn/", truncate=1000, delay=60)
    code = """
from huggingface_hub import hf_hub_download
print(len(open(hf_hub_download("me/model", "model.safetensors"), "rb").read()))
"""
    assert run(hub, tmp_path, code, HF_HUB_DOWNLOAD_TIMEOUT="1") == len(WEIGHTS)
    assert len(hub.seen("GET /cdn/")) == 2


CARD = b"""---
configs:
- config_name: small
  data_files:
  - split: train
    path: small/train.jsonl
- config_name: large
  default: true
  data_files:
  - split: train
    path: large/train-*.jsonl
  - split: test
    path: large/test.jsonl
---
"""


def lines(*texts):
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def test_load_dataset_of_jsonl_and_parquet(hub, tmp_path):
    hub.add_repo("me/configs", "dataset", {
        "README.md": CARD,
        "small/train.jsonl": lines("s"),
        "large/train-0.jsonl": lines("a", "b"),
        "large/train-1.jsonl": lines("c"),
        "large/test.jsonl": lines("t"),
    })  # fmt: skip
    hub.add_repo("me/plain", "dataset", {
        "data/train.jsonl": lines("x", "y"), "data/test.jsonl": lines("z"),
    }, private=True)  # fmt: skip
    # not me/plain: once loaded, a data set is served from the cache to a process without a token
    hub.add_repo("me/secret", "dataset", {"train.jsonl": lines("secret")}, private=True)
    hub.add_repo("other/gated", "dataset", {"train.jsonl": lines("gated")}, gated=True)
    hub.fail("GET /cdn/.*/train-00000-of-00001.parquet", status=500)
    got = run(hub, tmp_path, """
import json
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

def texts(*args, **kwargs):
    return [row["text"] for row in load_dataset(*args, **kwargs)]

Dataset.from_dict({"text": ["p", "q"], "n": [1, 2]}).push_to_hub("me/pushed")
Dataset.from_dict({"text": ["r"]}).push_to_hub("me/pushed", "second", split="test")
got = {}
for streaming in (True, False):  # the fault is for streaming: a download gives up at a 500
    got[f"streaming={streaming}"] = [
        texts("me/configs", "small", split="train", streaming=streaming),
        texts("me/configs", split="train", streaming=streaming),
        texts("me/configs", "large", split="test", streaming=streaming),
        texts("me/plain", split="train", streaming=streaming),
        texts("me/plain", split="test", streaming=streaming),
        texts("me/pushed", split="train", streaming=streaming),
        texts("me/pushed", "second", split="test", streaming=streaming),
    ]
got["columns"] = list(next(iter(load_dataset("me/pushed", split="train", streaming=True))))
for name, token in (("me/nothing", None), ("me/secret", False), ("other/gated", None)):
    try:
        load_dataset(name, token=token)
    except DatasetNotFoundError as error:
        got[name] = str(error)
print(json.dumps(got))
""")  # fmt: skip
    expected = [["s"], ["a", "b", "c"], ["t"], ["x", "y"], ["z"], ["p", "q"], ["r"]]
    assert got["streaming=False"] == expected
    assert got["streaming=True"] == expected
    assert got["columns"] == ["text", "n"]
    assert "doesn't exist on the Hub or cannot be accessed" in got["me/nothing"]
    assert "doesn't exist on the Hub or cannot be accessed" in got["me/secret"]
    assert "gated dataset" in got["other/gated"]
    assert 500 in [r.status for r in hub.seen("GET /cdn/.*/train-00000-of-00001.parquet")]
    assert any("range" in r.headers for r in hub.seen("GET /cdn/.*.parquet"))


def test_a_pushed_model_loads_and_generates(hub, tmp_path):
    got = run(hub, tmp_path, """
import json
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM,
    PreTrainedTokenizerFast, pipeline,
)
vocabulary = {word: n for n, word in enumerate(["<unk>", "a", "b", "c"])}
words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<unk>")
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=2, max_position_embeddings=32,
))
model.push_to_hub("me/tiny", private=True)
model.push_to_hub("me/tiny", revision="other")
tokenizer.push_to_hub("me/tiny")
again = AutoModelForCausalLM.from_pretrained("me/tiny")
equal = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
AutoModelForCausalLM.from_pretrained("me/tiny", revision="other")
ids = AutoTokenizer.from_pretrained("me/tiny")("a c")["input_ids"]
say = pipeline("text-generation", model="me/tiny")
text = say("a b", max_new_tokens=2, do_sample=False)[0]["generated_text"]
try:
    AutoModelForCausalLM.from_pretrained("me/nothing")
except OSError as error:
    missing = str(error)
print(json.dumps({"equal": equal, "ids": ids, "text": text, "missing": missing}))
""")  # fmt: skip
    assert got["equal"] is True
    assert got["ids"] == [1, 3]
    assert got["text"].startswith("a b")
    assert "is not a valid model identifier" in got["missing"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files("me/tiny"))
    assert "tokenizer.json" not in hub.files("me/tiny", revision="other")
    assert all(request.token == "hf_write" for request in hub.seen(" /me/tiny/resolve/"))
