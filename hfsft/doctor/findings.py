"""What a check found."""

from dataclasses import dataclass

PASSED, FAILED, ABSENT = "passed", "failed", "not available"
REINSTALL = "pip install -c constraints.txt -e . brings the tested versions"


@dataclass(frozen=True)
class Finding:
    """One line of the output."""

    name: str
    status: str  # PASSED, FAILED or ABSENT
    found: str
    advice: str = ""  # what a failure means, and what to set


class CheckFailed(Exception):
    """A check whose result is wrong.

    Args:
        found: what was measured.
        advice: what it means, and what to set.
    """

    def __init__(self, found: str, advice: str):
        super().__init__(found)
        self.advice = advice


class NotHere(Exception):
    """A check that this machine lacks something for."""
