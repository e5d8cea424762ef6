"""Facts and findings as JSON: stable keys, a version of the schema, for programs and for bug reports.

Within one schema version keys and ids of findings are only added. Sizes are bytes; null is a limit that
is none, or what could not be found. docs/doctor.md describes the keys.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from .facts import Facts
from .finding import Finding, exit_code

__all__ = ["SCHEMA", "doctor_document", "to_json"]

SCHEMA: Literal["offload-doctor-1"] = "offload-doctor-1"


def doctor_document(facts: Facts, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return both as what JSON can hold."""
    return {
        "schema": SCHEMA,
        "exit_code": exit_code(findings),
        "findings": [{**asdict(finding), "severity": finding.severity.value} for finding in findings],
        "facts": asdict(facts),
    }


def to_json(facts: Facts, findings: Sequence[Finding]) -> str:
    """Return both as indented JSON text, ending in a newline."""
    return json.dumps(doctor_document(facts, findings), indent=2, allow_nan=False) + "\n"
