"""The parts of benchmarks/io.py: the cells, the turns, the bars, fio's report, and the quiet disk."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from offload.errors import CapacityError, ConfigError, StorageError
from offload.sizes import KIB, MIB

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

# What fio 3.33 reported of two jobs, each reading 64 MiB; the fields that nobody reads left out.
RECORDED = {
    "fio version": "fio-3.33",
    "jobs": [
        {
            "jobname": "a",
            "error": 0,
            "read": {"io_bytes": 67108864, "bw_bytes": 504577924, "runtime": 133, "total_ios": 64},
            "write": {"io_bytes": 0, "bw_bytes": 0, "runtime": 0, "total_ios": 0},
            "job_runtime": 132,
            "usr_cpu": 6.060606,
            "sys_cpu": 0.0,
        },
        {
            "jobname": "b",
            "error": 0,
            "read": {"io_bytes": 67108864, "bw_bytes": 387912508, "runtime": 173, "total_ios": 64},
            "write": {"io_bytes": 0, "bw_bytes": 0, "runtime": 0, "total_ios": 0},
            "job_runtime": 172,
            "usr_cpu": 0.0,
            "sys_cpu": 5.232558,
        },
    ],
}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def cells(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("_cells")


@pytest.fixture
def report(load: Callable[[str], ModuleType]) -> object:
    return load("_report").Report("io.py", "?", [])


def test_a_cell_is_called_as_the_options_call_it(cells: ModuleType) -> None:
    names = [cell.name for cell in cells.grid(("read", "write"), (128 * KIB, 8 * MIB), (1,))]
    assert names == ["read:128k:1", "read:8m:1", "write:128k:1", "write:8m:1"]


def test_cells_are_selected_by_patterns_in_the_order_of_the_grid(cells: ModuleType) -> None:
    grid = cells.grid(("read", "write"), (128 * KIB, MIB), (1, 32))
    selected = cells.select_cells(grid, "write:*:32, read:1m:*")
    assert [cell.name for cell in selected] == ["read:1m:1", "read:1m:32", "write:128k:32", "write:1m:32"]


def test_a_pattern_that_matches_no_cell_is_refused(cells: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"'read:4m:\*' matches none of the 1 cells.*read:1m:1"):
        cells.select_cells(cells.grid(("read",), (MIB,), (1,)), "read:1m:1,read:4m:*")


@pytest.mark.parametrize("block_nbytes", [128 * KIB, MIB, 8 * MIB])
@pytest.mark.parametrize("depth", [1, 3, 8, 32])
def test_two_requests_of_a_cell_fill_its_depth(cells: ModuleType, block_nbytes: int, depth: int) -> None:
    request_nbytes = cells.Cell("read", block_nbytes, depth).request_nbytes
    assert request_nbytes % block_nbytes == 0
    assert request_nbytes >= 2 * block_nbytes
    assert 2 * request_nbytes >= depth * block_nbytes


def test_a_paired_ratio_is_the_median_of_the_rounds_not_the_ratio_of_medians(cells: ModuleType) -> None:
    # The third round was disturbed for both alike.
    spread = cells.Spread.paired([10.0, 8.0, 1.0], [10.0, 10.0, 1.0])
    assert (spread.median, spread.least, spread.most) == (1.0, 0.8, 1.0)


def test_a_file_in_which_requests_would_overlap_is_refused(
    load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_io", BENCHMARKS / "io.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main(["--disk", str(tmp_path), "--size", "256MiB", "--without-fio"]) == 2
    assert "read 8m x 32 needs a file of 512.0 MiB, not of 256.0 MiB" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_contenders_swap_their_order_each_round(
    load: Callable[[str], ModuleType], cells: ModuleType, report: object
) -> None:
    order = []

    def contender(name: str) -> Callable[[object], object]:
        def run(_: object) -> object:
            order.append(name)
            return cells.Transfer(1000, 1.0, 0.5, 0.5)

        return run

    cell = cells.Cell("read", MIB, 1)
    measured = load("_turns").take_turns(report, "part", cell, {n: contender(n) for n in "ab"}, 3)
    assert "".join(order) == "abbaab"
    assert [len(runs) for runs in measured.values()] == [3, 3]


def test_bars_name_the_worst_cell_and_count_what_is_missed(
    load: Callable[[str], ModuleType], cells: ModuleType, report: object, capsys: pytest.CaptureFixture[str]
) -> None:
    def runs(rate: float, cost: float) -> list[object]:
        return [cells.Transfer(10**9, 1 / rate, cost, cost)] * 3

    small, large = cells.Cell("read", 128 * KIB, 8), cells.Cell("read", MIB, 8)
    # Small blocks: slower than fio, and dear; threads are not judged there. Large: the best cell.
    measured = {
        small: {"fio": runs(2, 0.1), "uring": runs(1.8, 0.13), "threads": runs(0.5, 0.2)},
        large: {"fio": runs(4, 0.1), "uring": runs(4.4, 0.1), "threads": runs(4, 0.1)},
    }
    load("_grid").judge(report, measured)
    lines = [line for line in capsys.readouterr().out.splitlines() if "bar" in line]
    assert lines == [
        "- read: uring / fio, least of all cells (read 128k x 8): 0.900, bar at least 0.950: MISSED",
        "- read: uring / fio where fio is fastest (read 1m x 8): 1.100, bar at least 1.000: held",
        "- read: CPU time uring / fio, most of all cells (read 128k x 8): 1.300, bar 1.200: MISSED",
        "- read: threads / uring, least from 1 MiB on (read 1m x 8): 0.909, bar at least 0.900: held",
    ]
    assert report.finish(None) == 1


def test_fio_report_is_summed_over_its_jobs(load: Callable[[str], ModuleType], cells: ModuleType) -> None:
    transfer = load("_fio").parse_fio(RECORDED, cells.Cell("read", MIB, 2))
    assert transfer.nbytes == 2 * 64 * MIB
    assert transfer.elapsed_s == 0.173
    assert transfer.cpu_s == pytest.approx(0.008 + 0.009, abs=1e-6)


def test_fio_gets_a_job_for_each_file_that_only_reads_or_only_writes(
    load: Callable[[str], ModuleType], cells: ModuleType
) -> None:
    arguments = load("_fio").fio_arguments
    read = arguments(cells.Cell("read", MIB, 8), [Path("/a/x"), Path("/b/x")], 4 * MIB, 9 * MIB)
    assert [part for part in read if part.startswith("--filename")] == ["--filename=/a/x", "--filename=/b/x"]
    assert read.count("--rwmixread=100") == read.count("--direct=1") == read.count("--iodepth=8") == 2
    assert read.count(f"--io_size={9 * MIB}") == read.count(f"--bs={MIB}") == 2
    write = arguments(cells.Cell("write", MIB, 8), [Path("/a/x")], 4 * MIB, 9 * MIB, ["--fixedbufs=1"])
    assert "--rw=write" in write and "--fixedbufs=1" in write


def test_a_missing_fio_is_an_error_that_says_how_to_get_it(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="apt-get install fio"):
        load("_fio").fio_version()


@pytest.fixture
def data(load: Callable[[str], ModuleType], tmp_path: Path) -> Path:
    path = tmp_path / "data"
    load("_ours").fill_file(path, 4 * MIB + 4096)
    return path


def test_fio_moves_what_was_asked_for(
    load: Callable[[str], ModuleType], cells: ModuleType, data: Path
) -> None:
    if shutil.which("fio") is None:
        pytest.skip("no fio on this machine")
    for op in ("read", "write"):
        try:
            transfer = load("_fio").run_fio(cells.Cell(op, 128 * KIB, 8), [data], 4 * MIB, 8 * MIB)
        except StorageError as error:
            pytest.skip(f"fio cannot do this here: {error}")
        assert transfer.nbytes == 8 * MIB
        # Its start is charged to the process as well.
        assert transfer.process_cpu_s > transfer.cpu_s


@pytest.mark.parametrize("name", ["uring", "threads"])
def test_ours_writes_all_of_the_file_and_no_byte_beyond(
    load: Callable[[str], ModuleType], cells: ModuleType, data: Path, name: str
) -> None:
    before = data.read_bytes()
    cell = cells.Cell("write", 128 * KIB, 4)
    try:
        transfer = load("_ours").run_ours(name, cell, [data], 4 * MIB, 8 * MIB)
    except (StorageError, ConfigError) as error:
        pytest.skip(f"no direct I/O, or no {name}, here: {error}")
    after = data.read_bytes()
    assert transfer.nbytes == 8 * MIB
    # The buffers have a one at the start of each page, else zeros.
    assert after[: 4 * MIB] == (b"\1" + bytes(4095)) * (4 * MIB // 4096)
    assert after[4 * MIB :] == before[4 * MIB :]


def test_an_interrupted_run_leaves_no_file_open(
    load: Callable[[str], ModuleType], cells: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An open file would keep the quiet disk mounted; the traceback still holds the frames here."""
    ours = load("_ours")

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ours._Stream, "finish", interrupt)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            ours.run_ours("threads", cells.Cell("read", 128 * KIB, 4), [data], 4 * MIB, 4 * MIB)
    except StorageError as error:
        pytest.skip(f"no direct I/O here: {error}")
    targets = [os.readlink(each.path) for each in os.scandir("/proc/self/fd") if os.path.islink(each.path)]
    assert str(data) not in targets
    del caught  # till here it held the frames


def test_two_files_count_both(load: Callable[[str], ModuleType], cells: ModuleType, data: Path) -> None:
    other = data.with_name("other")
    shutil.copy(data, other)
    cell = cells.Cell("read", 128 * KIB, 4)
    try:
        transfer = load("_ours").run_ours("threads", cell, [data, other], 4 * MIB, 8 * MIB)
    except StorageError as error:
        pytest.skip(f"no direct I/O here: {error}")
    assert transfer.nbytes == 2 * 8 * MIB


def test_quiet_disk_is_refused_without_root(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="needs root"), load("_quiet").quiet_disk(MIB):
        pass


def test_quiet_disk_is_refused_when_memory_is_short(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = load("_quiet")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    with pytest.raises(CapacityError, match="lower --size"), quiet.quiet_disk(1 << 60):
        pass


@pytest.fixture
def quiet(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_mounts: None
) -> ModuleType:
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("no mkfs.ext4")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    module = load("_quiet")
    try:
        with module.quiet_disk(MIB):
            pass
    except ConfigError as error:
        pytest.skip(f"no loop devices here: {error}")
    return module


def mounts_below(directory: Path) -> Iterator[str]:
    return (line for line in Path("/proc/self/mounts").read_text().splitlines() if str(directory) in line)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_quiet_disk_is_taken_down_after_a_signal(quiet: ModuleType, tmp_path: Path, number: int) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    mounted: list[str] = []

    def use(disk: Path) -> None:
        (disk / "file").write_bytes(b"x")
        mounted.extend(mounts_below(tmp_path))
        signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt), quiet.quiet_disk(MIB) as disk:
        use(disk)
    assert len(mounted) == 2
    assert not list(mounts_below(tmp_path))
    assert not any(tmp_path.iterdir())
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_while_the_quiet_disk_is_made_waits_until_it_can_be_taken_down(
    quiet: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = quiet._run

    def interrupted(*command: str) -> str:
        output = run(*command)
        if command[0] == "losetup" and "--find" in command:
            signal.raise_signal(signal.SIGINT)
        return output

    monkeypatch.setattr(quiet, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt), quiet.quiet_disk(MIB):
        pytest.fail("the signal was lost")
    assert not list(mounts_below(tmp_path))
    assert not any(tmp_path.iterdir())


def test_quiet_disk_that_is_busy_for_a_while_is_taken_down(
    quiet: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, files = quiet._run, []

    def closing(*command: str) -> str:
        try:
            return run(*command)
        except ConfigError:
            files.pop().close()
            raise

    monkeypatch.setattr(quiet, "_run", closing)
    with quiet.quiet_disk(MIB) as disk:
        files.append((disk / "file").open("xb"))
    assert not files and not list(mounts_below(tmp_path))
    assert not any(tmp_path.iterdir())


def test_quiet_disk_says_which_command_failed_and_leaves_nothing(
    quiet: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = quiet._run
    monkeypatch.setattr(quiet, "_run", lambda *c: run("false", *c[1:]) if c[0] == "mkfs.ext4" else run(*c))
    with pytest.raises(ConfigError, match="false .* ended with status 1"), quiet.quiet_disk(MIB):
        pass
    assert not list(mounts_below(tmp_path))
    assert not any(tmp_path.iterdir())
