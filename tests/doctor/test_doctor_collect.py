"""The facts as a whole: which directories, which engine, and what does not answer is left behind."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from types import TracebackType

import pytest

from offload.aio.select import EngineProbe
from offload.doctor import collect
from offload.doctor.collect import collect_facts
from offload.doctor.facts import DirectoryFacts, GpuFacts, TorchFacts
from offload.machine import DriveSpeed, IoSetting, Machine, save_machine


class QuickTorch:
    """Says at once what an import of torch would, and how long it was waited for."""

    waited_s: float = -1.0

    def result(self, timeout_s: float) -> TorchFacts:
        QuickTorch.waited_s = timeout_s
        return TorchFacts(version="9.9")

    def __enter__(self) -> QuickTorch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@pytest.fixture(autouse=True)
def quick_torch(monkeypatch):
    monkeypatch.setattr(collect, "TorchImport", QuickTorch)


@pytest.fixture
def released():
    """An event that what hangs waits for; set at the end, so that no thread outlives the test."""
    event = threading.Event()
    yield event
    event.set()


def probes(*available: str) -> list[EngineProbe]:
    names = ("uring", "threads", "portable")
    return [
        EngineProbe(name, name in available, "works" if name in available else "refused") for name in names
    ]


def measured(path: str) -> Machine:
    setting = IoSetting(segment_nbytes=1 << 20, queue_depth=8)
    drive = DriveSpeed(
        path=path,
        device="fsid-7",
        file_system="ext4",
        engine="uring",
        direct=True,
        setting=setting,
        read_bytes_per_s=2e9,
        write_bytes_per_s=1e9,
    )
    return Machine(
        measured_at="2026-11-21T00:00:00+00:00", cpu="x", num_cores=2, memory_nbytes=1 << 34, drives=(drive,)
    )


def test_directories_that_are_named_are_looked_at_and_no_others(tmp_path):
    facts = collect_facts([str(tmp_path), str(tmp_path / "gone")])
    assert [(one.path, one.origin) for one in facts.directories] == [
        (str(tmp_path), "named"),
        (str(tmp_path / "gone"), "named"),
    ]
    assert [one.problem for one in facts.directories] == ["", "No such file or directory"]
    assert facts.software.torch == TorchFacts(version="9.9")
    assert 0 < QuickTorch.waited_s <= 10
    assert os.listdir(tmp_path) == []


def test_without_names_the_measured_directories_and_the_working_one_are(tmp_path, monkeypatch):
    path = tmp_path / "machine.json"
    save_machine(measured("/mnt/example-drive"), path)
    monkeypatch.setenv("OFFLOAD_MACHINE", str(path))
    monkeypatch.chdir(tmp_path)
    facts = collect_facts([])
    assert [(one.path, one.origin) for one in facts.directories] == [
        ("/mnt/example-drive", "measured"),
        (str(tmp_path), "working directory"),
    ]
    assert facts.measured.file_system_ids == ("fsid-7",)
    assert (facts.measured.path, facts.measured.problem) == (str(path), "")


def test_a_broken_measurement_is_a_problem_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "machine.json").write_text("{")
    monkeypatch.setenv("OFFLOAD_MACHINE", str(tmp_path / "machine.json"))
    found = collect_facts([str(tmp_path)]).measured
    assert "machine.json" in found.problem
    assert found.directories == ()


def test_no_measurement_is_no_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_MACHINE", str(tmp_path / "none.json"))
    found = collect_facts([str(tmp_path)]).measured
    assert (found.problem, found.measured_at) == ("", "")


@pytest.mark.parametrize(
    ("asked", "available", "chosen"),
    [
        ("", ("uring", "threads"), "uring"),
        ("", ("threads", "portable"), "threads"),
        ("portable", ("uring", "portable"), "portable"),
        ("uring", ("threads",), None),
        ("nonsense", ("threads",), None),
        ("", (), None),
    ],
)
def test_the_engine_is_the_one_that_a_run_would_take(monkeypatch, asked, available, chosen, tmp_path):
    tried = []

    def look(path, origin, engine):
        tried.append(engine)
        return DirectoryFacts(path=path, origin=origin)

    monkeypatch.setenv("OFFLOAD_IO_ENGINE", asked)
    monkeypatch.setattr(collect, "probe_engines", lambda: probes(*available))
    monkeypatch.setattr(collect, "look_at_directory", look)
    found = collect_facts([str(tmp_path)]).engine
    assert (found.chosen, found.asked, found.available) == (chosen, asked, available)
    assert {name for name, _ in found.refused} == {"uring", "threads", "portable"} - set(available)
    assert tried == [chosen]


def test_a_directory_that_does_not_answer_is_left_behind(monkeypatch, released):
    real = collect.look_at_directory

    def look(path, origin, engine):
        if path == "/mnt/dead":
            released.wait()
        return replace(real("/", origin, None), path=path)

    monkeypatch.setattr(collect, "look_at_directory", look)
    facts = collect_facts(["/mnt/dead", "/mnt/alive"], limit_s=0.5)
    assert facts.directories[0].path == "/mnt/dead"
    assert facts.directories[0].problem.startswith("no answer within")
    assert (facts.directories[1].path, facts.directories[1].problem) == ("/mnt/alive", "")


def test_a_driver_that_does_not_answer_is_left_behind(monkeypatch, released, tmp_path):
    monkeypatch.setattr(collect, "look_at_gpus", released.wait)
    found = collect_facts([str(tmp_path)], limit_s=0.5).gpu
    assert (found.source, found.problem.startswith("no answer within")) == ("nvml", True)


def test_our_own_mistake_in_a_thread_is_raised_and_not_swallowed(monkeypatch, tmp_path):
    def broken() -> GpuFacts:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(collect, "look_at_gpus", broken)
    with pytest.raises(ZeroDivisionError, match="ours"):
        collect_facts([str(tmp_path)])
