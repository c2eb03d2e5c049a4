"""What a check of the doctor returns."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do where that is no good."""

    name: str
    found: str
    remedy: str = ""

    @property
    def good(self) -> bool:
        return not self.remedy


Check = Callable[[], Iterator[Finding]]


def run_check(check: Check) -> list[Finding]:
    """Return the findings of a check; an error inside it is a fault too, and ends no other check."""
    findings = []
    try:
        for finding in check():
            findings.append(finding)
    except Exception as error:
        name = getattr(check, "__name__", "check").replace("_", " ")
        found = f"the check itself failed: {type(error).__name__}: {error}"
        findings.append(Finding(name, found, "look at the library or file that it names"))
    return findings
