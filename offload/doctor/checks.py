"""All checks, and the order of what they find: the worst first, then by what it concerns. Pure."""

from __future__ import annotations

from .check_directories import check_directories
from .check_gpu import check_gpu
from .check_host import check_engine, check_host
from .check_software import check_software
from .facts import Facts
from .finding import Finding

__all__ = ["find_problems"]


def find_problems(facts: Facts) -> tuple[Finding, ...]:
    """Return what is wrong with a machine; nothing is looked up."""
    findings = [
        *check_software(facts.software),
        *check_host(facts.host),
        *check_gpu(facts),
        *check_engine(facts.engine, facts.host, facts.software),
        *check_directories(facts),
    ]
    return tuple(sorted(findings, key=lambda finding: -finding.severity.exit_code))
