"""Run every check and collect what was found."""

import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from hfsft.doctor import kernels, machine, stage_checks, step_checks
from hfsft.doctor.findings import ABSENT, FAILED, PASSED, REINSTALL, CheckFailed, Finding, NotHere
from hfsft.errors import first_line

# name, check, and the advice where it raises an unexpected error
CHECKS: tuple[tuple[str, Callable[[], str], str], ...] = (
    ("versions", machine.check_versions, REINSTALL),
    ("Hub token", machine.check_token, REINSTALL),
    ("disk", stage_checks.disk, "free some space, or set output_dir to another disk"),
    ("fused head", step_checks.fused_head, REINSTALL),
    (
        "packed attention",
        step_checks.packed_attention_of_documents,
        "set attn_implementation: eager",
    ),
    (
        "activation checkpointing",
        step_checks.activation_checkpointing,
        "set gradient_checkpointing: false",
    ),
    (
        "8-bit AdamW",
        step_checks.eight_bit_optimizer,
        "set optim: adamw_torch_fused, or reinstall bitsandbytes",
    ),
    (
        "4-bit weights, QLoRA",
        stage_checks.four_bit_weights,
        "set load_in_4bit: false, or reinstall bitsandbytes",
    ),
    ("resume", stage_checks.resume, REINSTALL),
    ("out of memory", stage_checks.out_of_memory, "set per_device_train_batch_size: 1"),
    ("torch.compile", step_checks.compiled_layers, "leave torch_compile out"),
    ("flash-attn", kernels.flash_attention, "leave attn_implementation out"),
    ("other fused heads", kernels.other_heads, "hfsft does not use them"),
    ("rates", step_checks.rates, REINSTALL),
)


def examine(report: Callable[[Finding], None] = lambda finding: None) -> dict[str, Any]:
    """Describe the machine and run every check.

    Args:
        report: called with each finding as it is made.

    Returns:
        `machine` (name → text), `checks` (a list of `Finding` as plain data), `passed`: whether
        none failed.
    """
    _silence()
    findings = []
    for name, check, advice in CHECKS:
        finding = _run(name, check, advice)
        findings.append(finding)
        report(finding)
    return {
        "machine": machine.machine(),
        "checks": [asdict(finding) for finding in findings],
        "passed": all(finding.status != FAILED for finding in findings),
    }


def _run(name: str, check: Callable[[], str], advice: str) -> Finding:
    try:
        return Finding(name, PASSED, check())
    except NotHere as reason:
        return Finding(name, ABSENT, str(reason))
    except CheckFailed as failure:
        return Finding(name, FAILED, str(failure), failure.advice)
    except Exception as error:  # whatever a broken installation raises
        return Finding(name, FAILED, f"{type(error).__name__}: {first_line(error)}", advice)


def _silence() -> None:
    """No warnings or progress bars between the findings."""
    warnings.simplefilter("ignore")
    try:
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
    except Exception:  # a broken installation, which the first check reports
        return
