import json
import subprocess
import sys
from types import SimpleNamespace

import pynvml
import pytest
import torch
from hub_server import HubServer
from transformers import AttentionInterface

from hfsft.doctor import kernels, machine, stage_checks, step_checks
from hfsft.doctor.examine import CHECKS, examine
from hfsft.doctor.findings import ABSENT, FAILED, PASSED, CheckFailed, NotHere
from hfsft.model.attention import DOCUMENTS, document_attention

FAST = [
    step_checks.fused_head,
    step_checks.packed_attention_of_documents,
    step_checks.activation_checkpointing,
    step_checks.eight_bit_optimizer,
]


@pytest.mark.parametrize("check", FAST, ids=lambda check: check.__name__)
def test_the_step_is_right_here(check):
    check()


def test_a_resumed_run_has_the_bits_of_a_whole_one():
    assert stage_checks.resume() == "the same bits as without an interruption"


def test_what_a_cpu_lacks_is_not_a_failure():
    for check in (stage_checks.four_bit_weights, stage_checks.out_of_memory):
        with pytest.raises(NotHere, match="CUDA GPU"):
            check()
    for check in (kernels.flash_attention, kernels.other_heads):
        with pytest.raises(NotHere, match="not needed"):
            check()


def test_kernels_of_other_packages_are_compared_with_ours():
    """With torch's own in their place: the packages need a card."""
    assert "gradients agree to" in kernels.compare_attention(DOCUMENTS)
    AttentionInterface.register("half", lambda *a, **k: (document_attention(*a, **k)[0] / 2, None))
    with pytest.raises(CheckFailed, match="gradients differ") as failure:
        kernels.compare_attention("half")
    assert failure.value.advice == "do not set attn_implementation: half"

    def plain(hidden, weight, targets):
        logits = (hidden @ weight.t()).float()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    assert "hfsft does not use it" in kernels.compare_head(plain)
    with pytest.raises(CheckFailed, match="gradients differ"):
        kernels.compare_head(lambda *given: plain(*given) / 2)


def test_a_wrong_result_fails_with_what_to_set(monkeypatch):
    def half(*args, **kwargs):
        return document_attention(*args, **kwargs)[0] / 2, None

    AttentionInterface.register("half", half)
    monkeypatch.setattr("hfsft.model.attention.packed_attention", lambda *args: "half")
    with pytest.raises(
        CheckFailed, match=r"llama, torch\.float32, half: gradients differ"
    ) as failure:
        step_checks.packed_attention_of_documents()
    assert "attn_implementation" in failure.value.advice


def test_another_version_is_named_with_the_tested_range(monkeypatch):
    real = machine.version
    monkeypatch.setattr(
        machine, "version", lambda name: "5.0.0" if name == "transformers" else real(name)
    )
    with pytest.raises(CheckFailed, match=r"transformers 5\.0\.0, tested: <5\.25,>=5\.23"):
        machine.check_versions()


CHECK_TOKEN = """
from hfsft.doctor.machine import check_token
try:
    print(check_token())
except Exception as error:
    print(type(error).__name__, error)
"""


def test_the_token_is_asked_for_at_the_hub_and_never_shown(tmp_path):
    def ask(env):
        done = subprocess.run(
            [sys.executable, "-c", CHECK_TOKEN], env=env, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    with HubServer() as hub:
        assert ask(hub.env(tmp_path, "hf_write")) == "the Hub knows the token as me"
        assert ask(hub.env(tmp_path, "hf_wrong")) == "CheckFailed the Hub refuses the token"
        nowhere = hub.env(tmp_path, "hf_write") | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert ask(nowhere).startswith("NotHere the Hub cannot be reached")


def test_a_card_is_shown_without_nvml(monkeypatch):
    def fails():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)

    card = SimpleNamespace(name="GeForce", major=8, minor=9)
    monkeypatch.setattr("pynvml.nvmlInit", fails)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: card)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (6 * 10**9, 8 * 10**9))
    found = machine.machine()
    assert found["device"] == "GeForce, 1 of them here"
    assert found["driver"].startswith("unknown: RM has detected an NVML/RM version mismatch")
    assert found["GPU memory"] == "6.0 GB free of 8.0 GB"


def test_findings_of_every_kind(monkeypatch):
    def wrong():
        raise CheckFailed("off by one", "set it right")

    def absent():
        raise NotHere("no such device")

    def broken():
        raise ImportError("libcudart.so: no such file\nmore")

    checks = [("good", lambda: "fine", ""), ("wrong", wrong, ""), ("absent", absent, "")]
    checks.append(("broken", broken, "reinstall it"))
    monkeypatch.setattr("hfsft.doctor.examine.CHECKS", checks)
    found = examine()
    assert not found["passed"]
    rows = [tuple(check.values()) for check in found["checks"]]
    assert rows == [
        ("good", PASSED, "fine", ""),
        ("wrong", FAILED, "off by one", "set it right"),
        ("absent", ABSENT, "no such device", ""),
        ("broken", FAILED, "ImportError: libcudart.so: no such file", "reinstall it"),
    ]


@pytest.mark.slow
def test_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "hfsft", "doctor", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["passed"], done.stderr
    assert [check["name"] for check in found["checks"]] == [name for name, *_ in CHECKS]
    assert list(tmp_path.iterdir()) == []
