"""hfsft eval as a process: with a model and rows from a Hub on loopback, and killed midway."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from hub_server import HubServer
from rigged import save

from hfsft.evaluation.evaluate import evaluate

HFSFT = str(Path(sys.executable).parent / "hfsft")
CARD = """---
configs:
- config_name: ARC-Easy
  data_files:
  - split: test
    path: ARC-Easy/test.jsonl
---
"""


def test_a_model_and_rows_from_the_hub(tmp_path, make_model, tokenizer):
    rows = [
        {
            "id": f"own_{number}",
            "question": f"Question {number}?",
            "choices": {"text": ["yes", "no", "both", "none"], "label": list("ABCD")},
            "answerKey": "ABCD"[number % 4],
        }
        for number in range(6)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    save(make_model(), tokenizer, tmp_path / "model")
    files = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    with HubServer() as hub:
        hub.add_repo(
            "me/model", files=files | {"consolidated.safetensors": b"x", "a/b.json": b"{}"}
        )
        hub.add_repo(
            "allenai/ai2_arc",
            "dataset",
            {"README.md": CARD.encode(), "ARC-Easy/test.jsonl": text.encode()},
        )
        command = [HFSFT, "eval", "me/model", "--tasks", "arc_easy", "--rows", "4", "--json"]
        env = hub.env(tmp_path / "home") | {"COLUMNS": "100"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert not hub.seen("consolidated")
    found = json.loads(done.stdout)
    assert found["model"] == "me/model"
    assert found["tasks"]["arc_easy"]["rows"] == 4
    kept = tmp_path / "eval-me--model"
    assert json.loads((kept / "eval.json").read_text()) == found
    assert len((kept / "eval" / "arc_easy.jsonl").read_text().splitlines()) == 4


def test_a_killed_evaluation_resumes(tmp_path, make_model, tokenizer):
    folder = save(make_model(), tokenizer, tmp_path / "model")
    settings = {"tasks": ["arithmetic"], "rows": 6, "batch_size": 2}
    code = (
        "import os, signal\n"
        "from hfsft.evaluation.evaluate import evaluate\n"
        "def killed(task, done, rows):\n"
        "    if done == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"evaluate({folder!r}, **{settings}, progress=killed)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    kept = tmp_path / "model" / "eval" / "arithmetic.jsonl"
    before = kept.read_text()
    assert len(before.splitlines()) == 4
    uninterrupted = evaluate(folder, **settings, out=tmp_path / "other")
    asked = []
    found = evaluate(folder, **settings, progress=lambda *seen: asked.append(seen))
    assert asked == [("arithmetic", 4, 6), ("arithmetic", 6, 6)]
    assert found["tasks"] == uninterrupted["tasks"]
    assert kept.read_text().startswith(before)
