"""Pushes of a run to a Hub on loopback: when, where, and what happens on failure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer

from hfsft.run.manifest import commit

BIN = Path(sys.executable).parent
MODEL = {"config.json": "{}", "model.safetensors": "weights"}
STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "place.json")
# two saves and the end of a run; each checkpoint is deleted as soon as the pusher has it
RUN = """
import json, shutil, sys, time
from pathlib import Path
from hfsft.hub.bounds import bound_requests
from hfsft.hub.push import Pusher, check_push, report_pushes
from hfsft.recipe.schema import Stage

folder, settings, patience, wait = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
stage = Stage("sft", folder, 1, data=[], held_out=0, push_to_hub=True, **settings)
check_push(stage)
bound_requests(1.0)
pusher = Pusher(stage, patience)
began = time.monotonic()
for step in (1, 2):
    pusher.checkpoint(stage.checkpoints / f"checkpoint-{step}")
    shutil.rmtree(stage.checkpoints / f"checkpoint-{step}")
pusher.model(folder)
took = time.monotonic() - began
pushes, printed = pusher.finish(wait), []
try:
    report_pushes(pushes, folder, printed.append)
except Exception as error:
    printed.append(str(error))
print(json.dumps([took, [[push.folder.name, push.url, push.problem] for push in pushes], printed]))
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture
def stage(tmp_path) -> Path:
    """The folder of a finished sft stage of the run `fast`, with two checkpoints."""
    folder = tmp_path / "fast" / "sft"
    for step in (1, 2):
        partial = folder / "checkpoints" / "partial"
        partial.mkdir(parents=True)
        for name in (*MODEL, *STATES, "README.md"):
            (partial / name).write_text(f"{name} of {tmp_path} after {step}")
        commit(partial, folder / "checkpoints" / f"checkpoint-{step}", {})
    for name, text in MODEL.items():
        (folder / name).write_text(f"{text} {tmp_path}")
    return folder


def run(hub, stage: Path, home: Path, patience=10, wait=60, **settings) -> list:
    """Seconds that the pusher blocked the run, its pushes, and what is printed."""
    arguments = [str(stage), *map(json.dumps, (settings, patience, wait))]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        cwd=Path(__file__).parents[2],
        env=hub.env(home, "hf_write"),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def hfsft_push(hub, home: Path, *arguments: str, token="hf_write") -> subprocess.CompletedProcess:
    return subprocess.run(
        [BIN / "hfsft", "push", *arguments],
        env=hub.env(home, token) | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=100,
        stdin=subprocess.DEVNULL,
    )


WHOLE = {*MODEL, *STATES, "manifest.json"}


@pytest.mark.parametrize(
    ("strategy", "held"),
    [
        ("end", None),
        ("every_save", set(MODEL)),
        ("checkpoint", {f"last-checkpoint/{name}" for name in WHOLE}),
        ("all_checkpoints", {f"checkpoint-{step}/{name}" for step in (1, 2) for name in WHOLE}),
    ],
)
def test_a_strategy_decides_where_checkpoints_go(hub, tmp_path, stage, strategy, held):
    name = f"me/strategy-{strategy}"
    _, pushes, printed = run(hub, stage, tmp_path, hub_model_id=name, hub_strategy=strategy)
    assert all(problem is None for _, _, problem in pushes) and len(printed) == len(pushes)
    assert pushes[-1][0] == "sft"
    repo = hub.repos["model", name]
    assert set(hub.files(name)) == {".gitattributes", *MODEL}
    assert len(hub.seen(f"POST .*/{name}/commit/main")) == 1
    assert not (stage / "checkpoints" / "pushing").exists()
    if held is None:
        assert set(repo.refs) == {"refs/heads/main"}
        return
    files = hub.files(name, revision="checkpoints")
    assert set(files) == {".gitattributes", *held}
    last = {path: data for path, data in files.items() if path.endswith("model.safetensors")}
    assert max(last.values()) == f"model.safetensors of {tmp_path} after 2".encode()
    if strategy == "checkpoint":  # the newer one's, all of them
        assert all(data.endswith(b"after 2") for path, data in files.items() if "_state" in path)


def test_another_branch_has_its_own_checkpoints(hub, tmp_path, stage):
    settings = {"hub_model_id": "lab/branch", "hub_revision": "try/2", "hub_private_repo": True}
    run(hub, stage, tmp_path, **settings)
    repo = hub.repos["model", "lab/branch"]
    assert repo.private
    assert set(repo.refs) == {f"refs/heads/{ref}" for ref in ("main", "try/2", "try/2-checkpoints")}
    assert set(hub.files("lab/branch")) == {".gitattributes"}
    assert set(hub.files("lab/branch", revision="try/2")) == {".gitattributes", *MODEL}


def test_a_hub_that_hangs_blocks_nothing(hub, tmp_path, stage):
    hub.add_repo("me/still")
    hub.fail("(POST|PUT) .*/me/still/(preupload|commit)/", times=999, delay=90.0)
    took, pushes, printed = run(hub, stage, tmp_path, wait=3, hub_model_id="me/still")
    assert took < 20  # a single push is given up after some 60 s
    assert [folder for folder, _, _ in pushes][-1] == "sft"
    assert {problem for _, _, problem in pushes} >= {"sft to me/still: not done in 3 s"}
    assert f"pushes failed; everything is safe in {stage}\n" in printed[-1]


def test_a_failed_push_is_reported_and_resumed(hub, tmp_path, stage):
    hub.add_repo("me/late")
    fault = hub.fail("POST .*/me/late/commit/", times=999, status=503)
    settings = {"hub_model_id": "me/late", "hub_strategy": "end"}
    _, _, printed = run(hub, stage, tmp_path, patience=2, **settings)
    assert printed == [
        f"1 of 1 pushes failed; everything is safe in {stage}\n"
        f"  not pushed: cannot push {stage} to me/late: 503 Fault on demand: 503\n"
        f"  To push again: hfsft push {stage}"
    ]
    fault.times = 0
    record = {"stage": "sft", "status": "finished"}
    settings = {"sft": {**settings, "push_to_hub": True}}
    (stage / "stage.json").write_text(json.dumps(record | {"settings": settings}))
    before = len(hub.seen("PUT "))
    done = hfsft_push(hub, tmp_path, str(stage.parent), "--json")  # of the run
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        {
            "folder": str(stage),
            "url": f"{hub.endpoint}/me/late/commit/{hub.repos['model', 'me/late'].at().oid}",
        }
    ]
    assert set(hub.files("me/late")) == {".gitattributes", "stage.json", *MODEL}
    assert len(hub.seen("PUT ")) == before  # the weights were there


def test_push_accepts_a_run_a_stage_or_any_model(hub, tmp_path, stage):
    done = hfsft_push(hub, tmp_path, str(stage), "lab/any", "--revision", "v2", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"pushed sft: {hub.endpoint}/lab/any/commit/")
    assert hub.repos["model", "lab/any"].private
    assert set(hub.files("lab/any", revision="v2")) == {".gitattributes", *MODEL}
    settings = {"push_to_hub": True, "hub_model_id": "me/run", "hub_strategy": "checkpoint"}
    record = {"stage": "sft", "status": "finished", "settings": {"sft": settings}}
    (stage / "stage.json").write_text(json.dumps(record))
    assert hfsft_push(hub, tmp_path, str(stage.parent)).stdout.count("pushed ") == 2
    files = hub.files("me/run", revision="checkpoints")
    assert files["last-checkpoint/model.safetensors"].endswith(b"after 2")
    (stage / "stage.json").write_text(json.dumps(record | {"status": "interrupted"}))
    done = hfsft_push(hub, tmp_path, str(stage))
    assert done.returncode == 2 and "training is not finished" in done.stderr


def test_gguf_files_go_to_the_top_with_their_card(hub, tmp_path, stage):
    done = hfsft_push(hub, tmp_path, str(stage), "me/files", "--gguf")
    assert done.returncode == 2
    assert done.stderr.splitlines()[1] == f"  Write one first: hfsft export {stage} --to gguf"
    exported = {"model-Q8_0.gguf", "model-Q8_0.proof.json", "Modelfile", "README.md"}
    for folder in (stage / "gguf", stage / "qwen3"):
        folder.mkdir()
        for name in (*exported, "model-F16.gguf.partial"):
            (folder / name).write_text(f"{name} of {folder.name}")
    assert hfsft_push(hub, tmp_path, str(stage), "me/plain").returncode == 0
    assert set(hub.files("me/plain")) == {".gitattributes", *MODEL}
    done = hfsft_push(hub, tmp_path, str(stage), "me/files", "--gguf")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pushed ") == 2
    files = hub.files("me/files")
    assert set(files) == {".gitattributes", *MODEL, *exported}
    assert files["README.md"] == b"README.md of gguf"


def test_a_push_without_write_access_fails_in_two_lines(hub, tmp_path, stage):
    hub.add_repo("me/closed")
    for token in (None, "hf_read", "hf_unknown"):
        done = hfsft_push(hub, tmp_path, str(stage), "me/closed", token=token)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) <= 2 and "Traceback" not in done.stderr
        assert str(token) not in done.stderr


def test_the_pushed_model_answers_like_the_local_one(hub, tmp_path, tokenizer, make_model):
    folder = tmp_path / "fast" / "sft"
    make_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert hfsft_push(hub, tmp_path / "home", str(folder), "me/fast").returncode == 0
    code = (
        "import json, sys\n"
        "from transformers import pipeline\n"
        "messages = [{'role': 'user', 'content': 'Who are you?'}]\n"
        "for model in sys.argv[1:]:\n"
        "    chat = pipeline('text-generation', model=model)\n"
        "    print(json.dumps(chat(messages, max_new_tokens=12, do_sample=False)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), "me/fast"],
        env=hub.env(tmp_path / "stranger"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    here, there = done.stdout.splitlines()
    assert here == there
    assert len(json.loads(here)[0]["generated_text"][1]["content"]) > 0


CARD = """
import json, sys
from pathlib import Path
from hfsft.train.card import model_card
from hfsft.recipe.schema import Source, Stage
folder, sources, record = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
stage = Stage("sft", folder, 1, data=[Source(**source) for source in sources], held_out=0)
print(model_card(stage, record))
"""


def card_of(hub, tmp_path, stage, sources, note) -> str:
    """The card of a stage that was trained on the sources, made in a process of its own."""
    hub.add_repo("me/chats", "dataset", {"README.md": b"---\nlicense: cc-by-4.0\n---\n"})
    (stage / "data.json").write_text(
        json.dumps({"sources": [{"source": "me/chats:small", "kept": 1234}]})
    )
    start = {"model": "lab/start", "revision": "v1", "stage": None}
    record = {
        "stage": "sft",
        "lineage": {
            "model": str(tmp_path / "fast" / "mid"),
            "revision": None,
            "stage": {"stage": "mid", "steps": 500, "lineage": start},
        },
        "settings": {
            "seed": 42,
            "sft": {"data": sources, "note": note},
            "start": {"model": "x"},
        },
        "versions": {"hfsft": "0.1", "torch": "2.13"},
        **{"parameters": 1000, "trained_parameters": 10, "steps": 200, "examples_per_step": 32},
        **{"tokens": 9000, "train_loss": 1.5, "eval_loss": 1.25, "eval_loss_before": 2.25},
        **{"device": "a GPU", "processes": 1, "precision": "bf16", "seconds": 1800.0},
        **{"peak_memory_bytes": 2**30, "peak_memory_of": "GPU reserved"},
    }
    arguments = [str(stage), json.dumps(sources), json.dumps(record)]
    done = subprocess.run(
        [sys.executable, "-c", CARD, *arguments],
        cwd=Path(__file__).parents[2],
        env=hub.env(tmp_path / "hf", "hf_write"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_card_is_complete(hub, tmp_path, stage):
    planted = "hf_PlantedTokenThatNoHubKnowsOfAtAll00"
    sources = [
        {"path": "me/chats", "name": "small", "revision": "main"},
        {"path": "identity"},
        {"path": str(tmp_path / "home of|mine.jsonl")},
    ]
    (tmp_path / "home of|mine.jsonl").write_text("{}")
    card = card_of(hub, tmp_path, stage, sources, note=f"```\n---\n{planted}")
    _, above, text = card.split("---\n", 2)
    assert yaml.safe_load(above) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hfsft", "sft"],
        "base_model": "lab/start",
        "datasets": ["me/chats"],
    }
    for line in (
        "| lineage | lab/start at v1 → mid (500 steps) → sft (200 steps) |",
        "| steps | 200 of 32 examples |",
        "| training loss | 1.5000 in the last steps |",
        "| validation loss | 2.2500 before, 1.2500 after |",
        "| hardware | a GPU, 1 process(es), bf16 |",
        "| time | 1,800 s |",
        "| [me/chats:small](https://huggingface.co/datasets/me/chats) at main | 1,234 "
        "| cc-by-4.0 |",
        "| identity | streamed | apache-2.0 |",
        r"| home of\|mine.jsonl | streamed | not stated: a file of the author's |",
        f'chat = pipeline("text-generation", model="{stage.as_posix()}")',
    ):
        assert line in text.splitlines()
    assert planted not in card and "start:" not in text
    block = text.partition("## Recipe\n")[2].partition("Trained with")[0]
    assert all(line.startswith("    ") for line in block.splitlines() if line)
    recipe = yaml.safe_load(block)
    assert recipe["seed"] == 42
    assert [source["path"] for source in recipe["sft"]["data"]] == [
        *(source["path"] for source in sources[:-1]),
        "home of|mine.jsonl",  # no path of this machine
    ]
