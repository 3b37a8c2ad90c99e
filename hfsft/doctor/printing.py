"""What `hfsft doctor` prints."""

from hfsft.doctor.findings import Finding
from hfsft.doctor.machine import machine


def print_machine() -> None:
    """Print what this machine is."""
    for name, text in machine().items():
        print(f"{name:20} {text}")
    print()


def print_finding(finding: Finding) -> None:
    """Print one finding, and what to do about a failure."""
    print(f"{finding.name:26}{finding.status:15}{finding.found}", flush=True)
    if finding.advice:
        print(f"{'':26}{finding.advice}", flush=True)
