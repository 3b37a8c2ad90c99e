"""The benchmark for a card, with all its parts, on the CPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
ROWS = {"plan": 3, "step": 7, "job": 1, "base": 4, "auto": 4, "sweep": 1}  # of each part


def numbers(value: object) -> list[float]:
    """Every number within plain data."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [] if value is None or isinstance(value, bool | str) else [float(value)]


def test_the_benchmark_for_a_card_runs_every_part_on_a_cpu(tmp_path):
    command = [sys.executable, str(PROGRAM), "--device", "cpu", "--tiny"]
    command += ["--folder", "runs", "--results", "results"]  # relative to where it is started
    # inductor's C++ takes minutes: tests/model/test_compiling.py has it
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
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
    # hfsft, the bare loop and the padded ones train on the same conversations
    losses = [rows[f"step: tiny, {name}, 0"]["losses"] for name in ("hfsft", "bare", "padded")]
    for step in zip(*losses, strict=True):
        assert max(step) / min(step) < 1 + 1e-5
