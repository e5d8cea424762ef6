"""The whole measurement at toy size: what comes out, what is refused, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from offload.aio import probe_engines
from offload.errors import ConfigError, DiskFullError, PlanError, StorageError
from offload.machine import IoSetting, file_system_id
from offload.probe import run
from offload.probe.results import BenchResult
from offload.probe.run import BenchOptions, run_bench
from offload.report.sections import sections_of
from offload.report.terminal import to_text
from offload.sizes import KIB, MIB

ROOT = Path(__file__).resolve().parents[2]
SMALL = IoSetting(segment_nbytes=64 * KIB, queue_depth=4)


def toy(**changes: object) -> BenchOptions:
    """Eight MiB a file, one small setting, as little time as possible."""
    options: dict[str, object] = {
        "size_nbytes": 8 * MIB,
        "block_nbytes": (64 * KIB,),
        "depths": (4,),
        "rounds": 2,
        "sample_s": 0.0,
        "engine": "threads",
        "memory": False,
        "device": False,
    }
    return BenchOptions(**{**options, **changes})


@contextmanager
def run_child(tmp_path: Path, source: str) -> Iterator[subprocess.Popen[str]]:
    """Run `source` in a process of its own, which does not outlive the test."""
    child = subprocess.Popen(
        [sys.executable, "-c", source, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            yield child
        finally:
            child.kill()


def kinds(result: BenchResult) -> set[tuple[str, str, tuple[int, ...]]]:
    return {(c.workload.mode, c.workload.pattern, c.workload.drives) for c in result.cells}


@pytest.mark.parametrize("engine", ["uring", "threads", "portable"])
def test_everything_of_one_drive(tmp_path, engine):
    available = {probe.name: probe.available for probe in probe_engines()}
    if not available[engine]:
        pytest.skip(f"no {engine} here")
    result = run_bench([str(tmp_path)], toy(engine=engine))
    (drive,) = result.drives
    assert drive.path == str(tmp_path)
    assert (drive.engine, drive.engine_reason) == (engine, "asked for")
    assert drive.file_nbytes == 8 * MIB
    assert drive.verified_nbytes > 8 * MIB
    assert kinds(result) == {
        *(("bandwidth", pattern, (0,)) for pattern in ("read", "write", "mixed")),
        *(("latency", pattern, (0,)) for pattern in ("read", "write")),
    }
    assert all(len(cell.samples) == 2 for cell in result.cells)
    assert all((cell.latency is not None) == (cell.workload.pattern != "mixed") for cell in result.cells)
    (speed,) = result.machine.drives
    assert speed.setting == SMALL
    assert speed.read_bytes_per_s > 0 and speed.write_bytes_per_s > 0
    assert speed.mixed_bytes_per_s is not None
    assert result.machine.setting_for((file_system_id(drive.path),)) == SMALL
    assert result.machine.together is None
    assert list(tmp_path.iterdir()) == []


def test_two_directories_are_measured_alone_and_together(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    result = run_bench([str(folder) for folder in folders], toy(latency=False, patterns=("read", "write")))
    assert kinds(result) == {
        ("bandwidth", pattern, drives) for pattern in ("read", "write") for drives in ((0,), (1,), (0, 1))
    }
    assert len(result.machine.drives) == 2
    assert result.machine.together is not None
    assert result.machine.together.setting == SMALL
    assert any(f"{folders[0]}, {folders[1]} are on one drive" in note for note in result.notes)
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def test_the_quick_run_measures_mixed_at_the_best_setting_only(tmp_path):
    result = run_bench(
        [str(tmp_path)], toy(size_nbytes=64 * MIB, block_nbytes=None, depths=None, latency=False, rounds=1)
    )
    settings = {
        pattern: {cell.workload.setting for cell in result.cells if cell.workload.pattern == pattern}
        for pattern in ("read", "write", "mixed")
    }
    assert settings["read"] == settings["write"]
    assert len(settings["read"]) > 1
    assert settings["mixed"] == {result.machine.drives[0].setting}
    # Eight threads are eight operations at most.
    assert max(one.queue_depth for one in settings["read"]) == 8
    assert any("8 operations in flight at most" in note for note in result.notes)


def test_settings_without_room_are_left_out_with_a_note(tmp_path):
    result = run_bench([str(tmp_path)], toy(block_nbytes=(64 * KIB, 8 * MIB), latency=False))
    assert {cell.workload.setting for cell in result.cells} == {SMALL}
    assert any("left out" in note and "8.0 MiB x 4" in note for note in result.notes)


def test_nothing_that_fits_is_an_error_with_the_remedy(tmp_path):
    with pytest.raises(PlanError, match="no setting can be measured .* use a larger --size"):
        run_bench([str(tmp_path)], toy(block_nbytes=(8 * MIB,)))
    assert list(tmp_path.iterdir()) == []


def test_without_writes_no_setting_is_kept(tmp_path):
    result = run_bench([str(tmp_path)], toy(patterns=("read",), latency=False))
    assert result.machine.drives == ()
    assert any("both reads and writes" in note for note in result.notes)


def test_the_whole_file_is_read_back_at_the_end(tmp_path):
    # Nothing else reads: what was verified is the file, once.
    result = run_bench([str(tmp_path)], toy(patterns=("write",), latency=False))
    assert result.drives[0].verified_nbytes == result.drives[0].file_nbytes


def test_a_long_write_is_a_curve(tmp_path):
    result = run_bench([str(tmp_path)], toy(sustained_s=0.02, latency=False))
    (run,) = result.sustained
    assert run.points and run.first_bytes_per_s > 0


def test_memory_and_checksum_are_measured_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "copy_bytes_per_s", lambda threads: 1e10 * threads)
    monkeypatch.setattr(run, "checksum_bytes_per_s", lambda nbytes: 5e9)
    monkeypatch.setattr(run, "device_speed", lambda: None)
    monkeypatch.setattr(run.host, "num_cores", lambda: 2)
    result = run_bench([str(tmp_path)], toy(memory=True, device=True, latency=False))
    assert result.machine.memory_bytes_per_s == 2e10
    assert result.machine.crc32c_bytes_per_s == 5e9
    assert any("no CUDA device" in note for note in result.notes)


def test_progress_rises_to_one_and_names_the_part(tmp_path):
    heard: list[tuple[float, str]] = []
    run_bench([str(tmp_path)], toy(), lambda fraction, text: heard.append((fraction, text)))
    fractions = [fraction for fraction, _ in heard]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0.0 and fractions[-1] == 1.0
    assert any(text == f"{tmp_path}: read 64.0 KiB x 4" for _, text in heard)


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    def interrupt(_: float, text: str) -> None:
        if "latency" in text:
            raise KeyboardInterrupt

    before = set(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        run_bench([str(tmp_path)], toy(), interrupt)
    assert list(tmp_path.iterdir()) == []
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1  # the listing itself
    assert threading.active_count() == threads


@pytest.mark.parametrize("number", [1, 2])
def test_ctrl_c_in_the_middle_of_a_run_ends_it(tmp_path, number):
    folders = [str(tmp_path / str(index)) for index in range(number)]
    for folder in folders:
        os.mkdir(folder)
    source = f"""
from offload.probe.run import BenchOptions, run_bench
options = BenchOptions(size_nbytes=8 << 20, block_nbytes=(65536,), depths=(4,), sample_s=3600.0, rounds=1,
                       patterns=("write",), latency=False, memory=False, device=False)
if {number} > 1:
    from offload.probe import survey
    alone = survey._group
    def only_together(runner, drives, *rest):
        return alone(runner, (0, 1), *rest)
    survey._group = only_together
run_bench({folders!r}, options, lambda _, text: print(text, flush=True))
"""
    with run_child(tmp_path, source) as child:
        assert child.stdout is not None and child.stderr is not None
        for line in child.stdout:
            if "warm-up" in line:
                break
        child.send_signal(signal.SIGINT)
        errors = child.stderr.read()
        assert child.wait() == -signal.SIGINT, errors
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert [os.listdir(folder) for folder in folders] == [[]] * number


def test_a_directory_named_twice_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="named twice"):
        run_bench([str(tmp_path), str(tmp_path / "link")], toy())


def test_no_directory_is_refused():
    with pytest.raises(ConfigError, match="no directory"):
        run_bench([], toy())


def test_one_missing_directory_is_refused_before_any_file_is_made(tmp_path):
    with pytest.raises(StorageError, match="gone: No such file"):
        run_bench([str(tmp_path), str(tmp_path / "gone")], toy())
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_does_not_fit_is_refused_before_it_is_made(tmp_path):
    with pytest.raises(DiskFullError, match="must stay free; use --size"):
        run_bench([str(tmp_path)], toy(size_nbytes=1 << 60))
    assert list(tmp_path.iterdir()) == []


def test_drives_are_measured_without_torch(run_python, tmp_path):
    out = run_python(
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from offload.probe.run import BenchOptions, run_bench\n"
        f"result = run_bench([{str(tmp_path)!r}], BenchOptions(size_nbytes=8 << 20, block_nbytes=(65536,),\n"
        "    depths=(4,), rounds=1, sample_s=0.0, memory=False, latency=False))\n"
        "print(len(result.machine.drives), result.machine.device)"
    )
    assert out == "1 None"


def test_what_fits_each_drive_but_not_all_at_once_is_a_note(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    options = BenchOptions(
        size_nbytes=16 * MIB,
        block_nbytes=(2 * MIB,),
        depths=(1,),
        buffer_nbytes=8 * MIB,
        rounds=1,
        sample_s=0,
        latency=False,
        memory=False,
        device=False,
    )
    result = run_bench([str(path) for path in paths], options)
    assert len(result.machine.drives) == 2
    assert result.machine.together is None
    assert [note for note in result.notes if note.startswith("all together: left out")]
    assert "best setting" in to_text(sections_of(result))
