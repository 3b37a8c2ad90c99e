"""What `hfsft doctor` prints."""

from hfsft.doctor.findings import Finding
from hfsft.doctor.machine import machine
from hfsft.terminal import say


def print_machine() -> None:
    """Print what this machine is."""
    for name, text in machine().items():
        say(f"{name:20} {text}")
    say("")


def print_finding(finding: Finding) -> None:
    """Print one finding, and what to do about a failure."""
    say(f"{finding.name:26}{finding.status:15}{finding.found}")
    if finding.advice:
        say(f"{'':26}{finding.advice}")
