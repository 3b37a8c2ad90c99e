"""The benchmark for a card, with all its parts, on the CPU; the demo without its mid stage."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from hfsft import base, sft

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STAGES = ("base", "sft")
ROWS = {"plan": 3, "step": 7, "job": 1, "base": 4, "auto": 4, "sweep": 1}  # of each part


def numbers(value: object) -> list[float]:
    """Every number within plain data."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [] if value is None or isinstance(value, bool | str) else [float(value)]


def test_the_benchmark_for_a_card_runs_every_part_on_a_cpu(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--tiny"]
    command += ["--folder", "runs", "--results", "results"]  # relative to where it is started
    # inductor's C++ takes minutes: tests/model/test_compiling.py has it
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    # an earlier try, of which a row failed
    machine = dict.fromkeys(("card", "memory", "torch", "transformers", "trl"), "as before")
    earlier = {"machine": machine, "rows": {"job: tiny": {"failed": "OutOfMemoryError: 2 GiB"}}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cpu-tiny.json").write_text(json.dumps(earlier))
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "results" / "cpu-tiny.json").read_text())["rows"]
    for part, count in ROWS.items():
        found = {name: row for name, row in rows.items() if name.startswith(f"{part}: ")}
        assert len(found) == count, (part, list(found))
        assert f"{part}: " in done.stdout and f"### {part}" in done.stdout
    lacking = {name: row for name, row in rows.items() if "unavailable" in row}
    assert set(lacking) <= {"step: tiny, padding_free, 0", "step: tiny, liger, 0"}
    for name, row in rows.items():
        assert "failed" not in row, (name, row)
        if name not in lacking:
            assert numbers(row) and all(map(math.isfinite, numbers(row))), (name, row)
    for row in (rows["step: tiny, hfsft, 0"], rows["base: tiny, muon"]):
        assert row["micro_batch_rows"] in (2, 16)
        assert row["matmul_parameters"] == row["parameters"] - 8192 * 64  # of the embedding
    # hfsft, the bare loop and the padded ones train on the same conversations
    losses = [rows[f"step: tiny, {name}, 0"]["losses"] for name in ("hfsft", "bare", "padded")]
    for step in zip(*losses, strict=True):
        assert max(step) / min(step) < 1 + 1e-5


def test_the_benchmark_for_a_card_needs_one(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("error: no CUDA GPU here; --device cpu --tiny tries the program\n")
    assert list(tmp_path.iterdir()) == []


def test_the_demo_goes_from_base_to_sft_at_the_tokens_of_all_its_stages(tmp_path):
    bench = runpy.run_path(str(BENCHMARKS / "with_mid.py"))
    recipe = bench["without_mid"]() | {"output_dir": str(tmp_path), "name": "run"}
    assert list(recipe).count("mid") == 0 and "model_name_or_path" not in recipe["sft"]
    rows = {source["path"]: source["rows"] for source in recipe["sft"]["data"]}
    assert rows["simple_spelling"] == 14_000 and rows["identity"] == 1_400 and len(rows) == 5
    for source in recipe["sft"]["data"]:
        source["rows"] = 60
    (path := tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    base.main(str(path), "--max_steps", "2", "--quiet")
    steps = bench["steps_of"](path, [], 2_000)
    sft.main(str(path), "--max_steps", str(steps), "--quiet")
    records = [json.loads((tmp_path / "run" / name / "stage.json").read_text()) for name in STAGES]
    assert [record["steps"] for record in records] == [2, steps]
    assert 2_000 <= records[1]["tokens"] <= 2_000 * steps / (steps - 1)
    before, after = (load_file(tmp_path / "run" / name / "model.safetensors") for name in STAGES)
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
