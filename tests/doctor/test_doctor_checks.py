"""Each check finds its one thing on an otherwise sound machine, with its figures and its cure."""

from __future__ import annotations

import errno
import shlex
from dataclasses import replace

import pytest
from directory_cases import DIRECTORY_CASES
from doctor_machines import (
    DIRECTORY,
    SOUND,
    with_directory,
    with_drive,
    with_engine,
    with_extension,
    with_host,
    with_limits,
    with_options,
    with_package,
    with_torch,
)
from machine_cases import MACHINE_CASES

from offload.aio import select
from offload.doctor.checks import find_problems
from offload.doctor.facts import Facts, GpuFacts
from offload.doctor.finding import Finding, Severity, exit_code
from offload.errors import PlanError, StorageError
from offload.sizes import GIB, KIB, MIB

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE
CASES = [*MACHINE_CASES, *DIRECTORY_CASES]


def only(facts: Facts) -> Finding:
    findings = find_problems(facts)
    assert len(findings) == 1, findings
    return findings[0]


def test_nothing_is_wrong_with_a_sound_machine():
    assert find_problems(SOUND) == ()
    assert exit_code(()) == 0


@pytest.mark.parametrize(
    ("facts", "id", "severity", "problem", "fix"), CASES, ids=[f"{case[1]}: {case[3]}" for case in CASES]
)
def test_a_check_finds_its_one_thing(facts, id, severity, problem, fix):
    found = only(facts)
    assert (found.id, found.severity) == (id, severity)
    assert problem in found.problem
    assert fix in found.fix
    assert exit_code([found]) == {ERROR: 2, WARNING: 1, NOTE: 0}[severity]
    assert "\n" not in found.problem + found.fix


def test_exit_code_of_what_cannot_work_is_that_of_a_plan_that_cannot():
    assert exit_code([only(with_directory(problem="gone"))]) == PlanError.exit_code


def test_the_worst_comes_first():
    facts = replace(
        with_host(huge_pages="never", swap_used_nbytes=9 * GIB),
        engine=with_engine(asked="x", chosen=None).engine,
    )
    assert [found.severity for found in find_problems(facts)] == [ERROR, WARNING, NOTE]


def test_a_missing_torch_is_said_once():
    facts = replace(with_package("torch", None))
    software = replace(
        facts.software, torch=with_torch(version=None, problem="ModuleNotFoundError").software.torch
    )
    assert only(replace(facts, software=software)).id == "package-missing"


def test_nvml_without_a_driver_is_nothing_wrong():
    facts = with_torch(version="2.13.0+cpu", cuda=None, num_gpus=0)
    assert find_problems(replace(facts, gpu=GpuFacts(problem="NVML Shared Library Not Found"))) == ()


def test_any_version_will_do_where_none_is_asked_for():
    assert find_problems(with_package("tqdm", "0.1")) == ()


def test_a_version_is_compared_by_its_numbers_and_not_as_text():
    assert find_problems(with_package("torch", "2.100.0")) == ()
    assert find_problems(with_package("torch", "2.10.0a0+gitabc")) == ()


REFUSALS = [
    (errno.EPERM, "0", "docker", "--security-opt seccomp=unconfined"),
    (errno.EPERM, "0", "podman", "podman run --security-opt"),
    (errno.EPERM, "0", "kubernetes", "io_uring_setup"),
    (errno.EPERM, "2", "", "sysctl kernel.io_uring_disabled=0"),
    (errno.ENOSYS, "0", "docker", "seccomp"),
    (errno.ENOMEM, "0", "", "memlock"),
    (errno.EINVAL, "0", "", "Linux 5.6"),
]


@pytest.mark.parametrize(("number", "sysctl", "container", "fix"), REFUSALS)
def test_why_io_uring_is_refused_decides_the_cure(number, sysctl, container, fix, tmp_path, monkeypatch):
    """The reasons are the words of the engine's own probe, so that neither changes without the other."""
    (tmp_path / "io_uring_disabled").write_text(f"{sysctl}\n")
    monkeypatch.setattr(select, "_SYSCTL", tmp_path / "io_uring_disabled")
    error = StorageError("io_uring of a kernel before 5.6", errno=number)
    refused = with_engine(
        chosen="threads", available=("threads",), refused=(("uring", select._refusal(error)),)
    )
    found = only(replace(refused, host=with_host(container=container).host))
    assert (found.id, found.severity) == ("io-uring-refused", WARNING)
    assert fix in found.fix


def test_a_kernel_without_io_uring_is_to_be_replaced_even_in_a_container():
    refused = with_engine(chosen="threads", refused=(("uring", "no io_uring, or seccomp (ENOSYS)"),))
    found = find_problems(replace(refused, host=with_host(kernel="4.19.0", container="docker").host))
    assert "Linux 5.6" in found[0].fix


def test_io_uring_that_lacks_the_extension_is_said_once():
    refused = (("uring", "not built"), ("threads", "not built"))
    facts = replace(
        with_extension("_aio", problem="not built", files=()),
        engine=with_engine(chosen="portable", available=("portable",), refused=refused).engine,
    )
    assert only(facts).id == "extension-unusable"


@pytest.mark.parametrize(
    ("kernel", "memlock_nbytes", "found"),
    [("5.10.0", 64 * KIB, True), ("5.10.0", 8 * MIB, False), ("5.12.0", 64 * KIB, False)],
)
def test_rings_count_as_locked_memory_on_old_kernels_alone(kernel, memlock_nbytes, found):
    facts = with_host(kernel=kernel, limits=with_limits(memlock_nbytes=memlock_nbytes).host.limits)
    assert ("memlock-low" in [one.id for one in find_problems(replace(facts, gpu=GpuFacts()))]) == found


def test_what_is_found_of_the_working_directory_is_a_note():
    for facts, *_ in DIRECTORY_CASES:
        if facts.directories[0] != DIRECTORY:
            here = replace(facts.directories[0], origin="working directory")
            found = find_problems(replace(facts, directories=(here,)))
            assert {one.severity for one in found} <= {NOTE}


def test_a_virtual_drive_that_claims_to_spin_is_believed_nothing():
    assert find_problems(with_drive(name="vda", bus="virtio", rotational=True, scheduler="bfq")) == ()


def test_memory_has_no_o_direct_to_refuse():
    facts = with_options("rw", kind="tmpfs")
    found = find_problems(replace(facts, directories=(replace(facts.directories[0], direct=False),)))
    assert [one.id for one in found] == ["in-memory"]


def test_a_sticky_directory_may_be_everybodys():
    assert find_problems(with_directory(mode=0o1777)) == ()


def test_a_path_in_a_fix_can_be_pasted_into_a_shell():
    found = only(with_directory(path="/mnt/my drive; rm x", mode=0o777))
    assert shlex.split(found.fix) == ["chmod", "o-w", "/mnt/my drive; rm x"]


def test_a_file_system_that_does_not_tell_its_room_is_not_full():
    assert find_problems(with_directory(total_nbytes=0, free_nbytes=0)) == ()
