"""The screen and the JSON: everything is said, in a form to paste; the keys stay."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from directory_cases import DIRECTORY_CASES
from doctor_machines import DIRECTORY, HOST, SOUND, with_directory, with_engine, with_host, with_torch
from machine_cases import MACHINE_CASES

from offload.doctor.checks import find_problems
from offload.doctor.document import doctor_document, to_json
from offload.doctor.facts import Facts, GpuFacts
from offload.doctor.screen import print_screen, summary
from offload.sizes import GIB

ROOT = Path(__file__).resolve().parents[2]


class Terminal(io.StringIO):
    """Text that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def shown(facts: Facts, stream: io.StringIO | None = None) -> str:
    stream = io.StringIO() if stream is None else stream
    print_screen(facts, find_problems(facts), stream)
    return stream.getvalue()


def test_a_pipe_gets_every_fact_as_plain_text():
    text = shown(SOUND)
    for part in (
        "offload 0.1.0, 2026-11-21T12:00:00+00:00",
        "Example Linux, Linux 6.1.0-21-amd64, x86_64",
        "2.13.0+cu130, CUDA 13.0, 1 GPUs usable",
        "_aio (sse4.2), _adam (avx2)",
        "Example CPU, 8 cores, governor powersave (intel_pstate)",
        "64.0 GiB, 50.0 GiB available, swap 1.0 GiB of 8.0 GiB",
        "locked memory unlimited",
        "NVIDIA Example, 24.0 GiB, 1.0 GiB in use, PCIe 4 x16, P0, driver 580.65.06",
        "engine      uring\n",
        "/mnt/nvme0 (named)",
        "ext4 on /dev/nvme0n1p1, noatime",
        "500.0 GiB of 1000.0 GiB free, O_DIRECT works",
        "nvme0n1, Example 990, nvme, volatile write cache, scheduler none, PCIe 4 x4",
        "nothing is wrong\n",
    ):
        assert part in text
    assert "\x1b" not in text
    assert len(text.splitlines()) <= 24


@pytest.mark.parametrize(
    ("facts", "part"),
    [
        (with_host(limit_nbytes=GIB, swap_nbytes=0), "1.0 GiB of 64.0 GiB (control group)"),
        (with_host(num_cores=2), "2 of 8 cores"),
        (with_host(container="docker", virtual=True), "docker, virtual machine"),
        (with_torch(version=None, problem="ImportError: x"), "2.13.0+cu130 (ImportError: x)"),
        (with_engine(chosen="threads", refused=(("uring", "seccomp"),)), "threads; not uring: seccomp"),
        (with_engine(chosen="threads", asked="threads"), "threads (OFFLOAD_IO_ENGINE)"),
        (with_directory(problem="Permission denied"), "problem  Permission denied"),
        (with_directory(write_problem="No space left on device"), "cannot be written to: No space"),
        (replace(SOUND, gpu=GpuFacts()), "none found, no NVIDIA driver"),
    ],
)
def test_what_is_out_of_the_ordinary_is_shown(facts, part):
    assert part in shown(facts)


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_every_finding_is_shown_with_its_fix(stream, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    facts = replace(with_host(swap_used_nbytes=9 * GIB, huge_pages="never"), directories=())
    findings = find_problems(facts)
    text = shown(facts, stream())
    assert len(findings) == 2
    for finding in findings:
        assert f"{finding.about}: {finding.problem}" in text
        assert finding.fix in text
    assert text.index("warning") < text.index("note")


def test_a_name_that_would_steer_a_terminal_is_shown_harmless():
    facts = with_directory(path="/mnt/\x1b[31m[red]x", mode=0o777)
    for stream in (io.StringIO(), Terminal()):
        text = shown(facts, stream)
        assert "\x1b[31m[red]" not in text
        assert "?[31m[red]x" in text


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (SOUND, "nothing is wrong"),
        (with_host(huge_pages="never"), "1 note: it will work"),
        (
            with_host(huge_pages="never", energy_preference="power"),
            "1 warning, 1 note: it will work, but not at its best",
        ),
        (with_directory(problem="gone"), "1 error: what is an error will not work"),
    ],
)
def test_the_last_line_says_how_bad_it_is(facts, words):
    assert summary(find_problems(facts)) == words
    assert shown(facts).endswith(f"{words}\n")


KEYS = {
    "": ["schema", "exit_code", "findings", "facts"],
    "facts": ["taken_at", "software", "host", "gpu", "engine", "measured", "directories"],
    "facts.software": ["offload", "python", "packages", "extensions", "torch"],
    "facts.software.packages.0": ["name", "needed", "version"],
    "facts.software.extensions.0": ["name", "problem", "files", "suffix", "isas"],
    "facts.software.torch": ["version", "cuda", "hip", "num_gpus", "problem", "timed_out"],
    "facts.host.limits": ["memlock_nbytes", "address_space_nbytes", "file_nbytes", "open_files"],
    "facts.gpu": ["source", "driver", "gpus", "problem"],
    "facts.gpu.gpus.0": ["name", "memory_nbytes", "used_nbytes", "link", "performance_state"],
    "facts.gpu.gpus.0.link": ["generation", "width", "max_generation", "max_width"],
    "facts.engine": ["chosen", "asked", "available", "refused"],
    "facts.measured": ["path", "problem", "measured_at", "directories", "file_system_ids"],
    "facts.directories.0.mount": ["source", "file_system", "options"],
    "facts.directories.0": [
        "path",
        "origin",
        "problem",
        "mount",
        "file_system_id",
        "mode",
        "total_nbytes",
        "free_nbytes",
        "direct",
        "write_problem",
        "clock_skew_s",
        "device",
    ],
    "facts.directories.0.device": [
        "name",
        "model",
        "bus",
        "rotational",
        "write_cache",
        "scheduler",
        "parts",
        "encrypted",
        "link",
    ],
    "facts.host": [
        "system",
        "kernel",
        "distribution",
        "architecture",
        "container",
        "virtual",
        "cpu",
        "num_cores",
        "num_cpus",
        "governor",
        "governor_driver",
        "energy_preference",
        "memory_nbytes",
        "limit_nbytes",
        "available_nbytes",
        "swap_nbytes",
        "swap_used_nbytes",
        "huge_pages",
        "limits",
    ],
}


@pytest.mark.parametrize("place", KEYS)
def test_keys_of_schema_1_are_never_lost(place):
    value = doctor_document(SOUND, ())
    for part in filter(None, place.split(".")):
        value = value[int(part)] if part.isdigit() else value[part]
    assert set(KEYS[place]) <= set(value)


def test_json_holds_findings_and_their_exit_code():
    facts = replace(SOUND, host=HOST, directories=(replace(DIRECTORY, problem="Not a directory"),))
    document = json.loads(to_json(facts, find_problems(facts)))
    assert (document["schema"], document["exit_code"]) == ("offload-doctor-1", 2)
    assert document["findings"] == [
        {
            "id": "directory-unusable",
            "severity": "error",
            "about": "/mnt/nvme0",
            "problem": "Not a directory",
            "fix": "name the directory that holds it",
        }
    ]


def test_the_page_names_every_finding_and_no_other():
    page = (ROOT / "docs" / "doctor.md").read_text()
    table = page[page.index("## What it finds") : page.index("## JSON")]
    named = {
        name
        for cell in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
        for name in re.findall(r"`([a-z-]+)`", cell)
    }
    ids = {
        name
        for path in (ROOT / "offload" / "doctor").glob("check_*.py")
        for name in re.findall(r'(?:\bid=|directory,\s+)"([a-z-]+)"', path.read_text())
    }
    assert named == ids
    assert {case[1] for case in [*MACHINE_CASES, *DIRECTORY_CASES]} == ids - {
        "io-uring-refused",
        "memlock-low",
    }
