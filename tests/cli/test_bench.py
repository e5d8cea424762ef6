"""`offload bench` on the command line: what reaches the probe, what comes out where, mistakes in one line.

The probe is replaced by one that returns a hand-made result; `test_bench_real.py` runs the true one.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from report.bench_results import full_result, machine, small_result

from offload.cli import main
from offload.cli.bench import parse_seconds
from offload.errors import DiskFullError
from offload.machine import IoSetting, load_machine, save_machine
from offload.probe import run as probe_run
from offload.probe.options import BenchOptions
from offload.probe.results import BenchResult
from offload.report import terminal
from offload.report.document import SCHEMA
from offload.sizes import GIB, MIB

Call = Callable[..., tuple[int, str, str]]
Asked = list[tuple[tuple[str, ...], BenchOptions]]


@pytest.fixture(autouse=True)
def machine_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, value in (("COLUMNS", "300"), ("NO_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    path = tmp_path / "config" / "machine.json"
    monkeypatch.setenv("OFFLOAD_MACHINE", str(path))
    yield path
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".new")]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Replace the probe; what it was asked for is kept."""
    calls: Asked = []

    def run_bench(directories, options, progress=None) -> BenchResult:
        calls.append((tuple(directories), options))
        if progress is not None:
            progress(0.5, "reading")
            progress(1.0, "writing")
        return small_result() if {"read", "write"} <= set(options.patterns) else without_choice()

    monkeypatch.setattr(probe_run, "run_bench", run_bench)
    return calls


def without_choice() -> BenchResult:
    return replace(small_result(), machine=replace(machine(1), drives=()))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["bench", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, out, err

    return run


def test_without_options_everything_is_measured(call: Call, asked: Asked, tmp_path: Path) -> None:
    code, _, err = call(tmp_path)
    assert (code, err) == (0, "")
    assert asked == [((str(tmp_path),), BenchOptions())]


def test_every_option_reaches_the_probe(call: Call, asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    flags = (
        "--size 1GiB --full --read --mixed --block 4MiB,1MiB,1MiB --depth=8,1 --rounds 5 --sustained 2min"
        " --engine threads --buffered --no-latency --no_memory --no-device"
    )
    code, _, _ = call(tmp_path, tmp_path / "b", *flags.split())
    assert code == 0
    assert asked[0][0] == (str(tmp_path), str(tmp_path / "b"))
    assert asked[0][1] == BenchOptions(
        size_nbytes=GIB,
        patterns=("read", "mixed"),
        full=True,
        block_nbytes=(MIB, 4 * MIB),
        depths=(1, 8),
        rounds=5,
        sustained_s=120.0,
        engine="threads",
        direct=False,
        latency=False,
        memory=False,
        device=False,
    )


def test_the_setting_is_kept_and_the_last_line_says_so(
    call: Call, asked: Asked, tmp_path: Path, machine_path: Path
) -> None:
    _, out, _ = call(tmp_path)
    assert load_machine(machine_path) == small_result().machine
    assert out.splitlines()[-1] == (
        f"Best for /mnt/nvme0: blocks of 1 MiB, 8 in flight. Kept in {machine_path} and used from now on."
    )


def test_no_machine_leaves_the_file_alone(
    call: Call, asked: Asked, tmp_path: Path, machine_path: Path
) -> None:
    _, out, _ = call(tmp_path, "--no-machine")
    assert not machine_path.exists()
    assert out.splitlines()[-1].endswith("8 in flight. Not kept: --no-machine.")


def test_another_file_is_named_with_how_to_use_it(
    call: Call, asked: Asked, tmp_path: Path, machine_path: Path
) -> None:
    other = tmp_path / "other.json"
    _, out, _ = call(tmp_path, "--machine", other)
    assert other.exists() and not machine_path.exists()
    assert f"OFFLOAD_MACHINE={other}" in out.splitlines()[-1]


@pytest.mark.parametrize("option", ["--depth=1", "--block=1MiB", "--engine=threads", "--buffered"])
def test_an_experiment_does_not_become_the_setting_of_later_runs(
    call: Call, asked: Asked, tmp_path: Path, machine_path: Path, option: str
) -> None:
    _, out, _ = call(tmp_path, option)
    assert not machine_path.exists()
    assert "narrowed the choice; --machine FILE keeps it" in out.splitlines()[-1]
    call(tmp_path, option, "--machine", machine_path)
    assert machine_path.exists()


def test_a_part_of_the_patterns_chooses_nothing(
    call: Call, asked: Asked, tmp_path: Path, machine_path: Path
) -> None:
    _, out, _ = call(tmp_path, "--read")
    assert not machine_path.exists()
    assert out.splitlines()[-1].startswith("No setting was chosen and none kept: a setting is chosen from")
    code, _, err = call(tmp_path, "--read", "--machine", machine_path)
    assert (code, "reading and writing" in err, len(asked)) == (2, True, 1)


def test_what_overwriting_forgets_is_said(
    call: Call, asked: Asked, tmp_path: Path, machine_path: Path
) -> None:
    save_machine(machine(2), machine_path)
    _, out, _ = call(tmp_path)
    # The result is of device 259:0; the file held 259:0 and 259:1.
    assert "It replaces what was kept of /mnt/nvme1" in out.splitlines()[-1]
    machine_path.write_text("{")
    _, out, _ = call(tmp_path)
    assert out.splitlines()[-1].endswith("It replaces a file that could not be read.")
    _, out, _ = call(tmp_path)
    assert out.splitlines()[-1].endswith("and used from now on.")


def test_measuring_the_same_drives_again_forgets_nothing(
    call: Call, tmp_path: Path, machine_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = small_result()
    # As in a real run: what is shown is the number of the device, what is kept the file system's own.
    drives = tuple(replace(drive, device="fsid-1f") for drive in result.machine.drives)
    again = replace(result, machine=replace(result.machine, drives=drives))
    monkeypatch.setattr(probe_run, "run_bench", lambda directories, options, progress=None: again)
    save_machine(again.machine, machine_path)
    _, out, _ = call(tmp_path)
    assert out.splitlines()[-1].endswith("and used from now on.")


def test_json_alone_on_standard_output(call: Call, asked: Asked, tmp_path: Path) -> None:
    _, out, err = call(tmp_path, "--json", "-")
    assert json.loads(out)["schema"] == SCHEMA
    assert err.startswith("Best for") and err.count("\n") == 1
    _, out, err = call(tmp_path, "--json", "-", "--quiet")
    assert (json.loads(out)["schema"], err) == (SCHEMA, "")


def test_every_file_is_written(call: Call, asked: Asked, tmp_path: Path) -> None:
    page, data, text = tmp_path / "b.html", tmp_path / "b.json", tmp_path / "b.md"
    code, out, _ = call(tmp_path, "--plot", page, "--json", data, "--markdown", text)
    assert code == 0 and "pattern" in out
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert json.loads(data.read_text())["schema"] == SCHEMA
    assert text.read_text().startswith("# offload bench\n")
    call(tmp_path, "--plot", tmp_path / "b.SVG")
    assert ElementTree.parse(tmp_path / "b.SVG").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_quiet_prints_the_last_line_alone(call: Call, asked: Asked, tmp_path: Path) -> None:
    _, out, err = call(tmp_path, "--quiet")
    assert (out.count("\n"), out.startswith("Best for"), err) == (1, True, "")


def test_the_bar_is_drawn_on_a_terminal_only(
    call: Call, asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for flags, drawn in (((), True), (("--quiet",), False)):
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            call(tmp_path, *flags)
        assert ("reading" in terminal.getvalue()) is drawn
        assert ("50%" in terminal.getvalue()) is drawn


def test_the_engine_speaks_once_in_the_table_and_not_for_each_depth(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run_bench(directories, options, progress=None) -> BenchResult:
        logging.getLogger("offload.aio").warning("I/O engine: threads")
        return small_result()

    monkeypatch.setattr(probe_run, "run_bench", run_bench)
    before = logging.getLogger("offload.aio").level
    _, out, _ = call(tmp_path)
    assert "seccomp filter" in out and not caplog.records
    assert logging.getLogger("offload.aio").level == before
    call(tmp_path, "--debug")
    assert [record.getMessage() for record in caplog.records] == ["I/O engine: threads"]


def test_ctrl_c_is_one_line_and_130(
    call: Call, tmp_path: Path, machine_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_bench(directories, options, progress=None) -> BenchResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(probe_run, "run_bench", run_bench)
    assert call(tmp_path) == (130, "", "interrupted; nothing is left on the drives\n")
    assert not machine_path.exists()


def test_a_full_disk_is_one_line_and_75(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_bench(directories, options, progress=None) -> BenchResult:
        raise DiskFullError("/mnt has 1.0 GiB free; use --size 512MiB")

    monkeypatch.setattr(probe_run, "run_bench", run_bench)
    assert call(tmp_path) == (75, "", "error: /mnt has 1.0 GiB free; use --size 512MiB\n")


def test_a_file_that_cannot_be_written_costs_neither_table_nor_setting(
    call: Call, asked: Asked, tmp_path: Path, machine_path: Path
) -> None:
    code, out, err = call(tmp_path, "--json", "/dev/full")
    assert code == 75
    assert err.startswith("error: cannot write /dev/full: No space left on device")
    assert "free" in err
    assert "pattern" in out and machine_path.exists()


def test_a_setting_that_cannot_be_kept_costs_no_file(
    call: Call, asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFLOAD_MACHINE", "/proc/none/machine.json")
    data, page = tmp_path / "b.json", tmp_path / "b.html"
    code, out, err = call(tmp_path, "--json", data, "--plot", page)
    assert (code, err) == (74, "error: cannot write /proc/none/machine.json: No such file or directory\n")
    assert "pattern" in out and page.exists()
    assert json.loads(data.read_text())["schema"] == SCHEMA


def test_a_reader_that_goes_away_costs_neither_setting_nor_files(
    call: Call, asked: Asked, tmp_path: Path, machine_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(sections: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(terminal, "print_sections", gone)
    code, _, err = call(tmp_path, "--json", tmp_path / "b.json")
    assert code != 0 and "Traceback" not in err
    assert machine_path.exists() and (tmp_path / "b.json").exists()


@pytest.mark.parametrize("by_option", [True, False])
def test_what_is_no_regular_file_is_not_replaced_by_the_setting(
    call: Call, asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_option: bool
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setenv("OFFLOAD_MACHINE", str(pipe))
    code, _, err = call(tmp_path, *(["--machine", pipe] if by_option else []))
    assert (code, asked) == (2, [])
    assert err.startswith(f"error: {pipe} is no regular file")
    assert pipe.is_fifo()


def test_a_directory_whose_name_is_no_utf8_is_reported(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b[31m")
    result = small_result()
    (drive,), (speed,) = result.drives, result.machine.drives
    odd = replace(
        result,
        drives=(replace(drive, path=path),),
        machine=replace(result.machine, drives=(replace(speed, path=path),)),
    )
    monkeypatch.setattr(probe_run, "run_bench", lambda directories, options, progress=None: odd)
    text = tmp_path / "b.md"
    code, out, err = call(tmp_path, "--markdown", text)
    assert (code, err) == (0, "")
    assert "\x1b" not in out and f"Best for {tmp_path}/??[31m:" in out.splitlines()[-1]
    assert "\\udcff" in text.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing argument 'DIR...'"),
        (["{tmp}/drvie"], 74, "{tmp}/drvie does not exist, did you mean {tmp}/drive?"),
        (["{tmp}/none/none"], 74, "{tmp}/none/none does not exist, nor does {tmp}/none"),
        (["{tmp}/file"], 74, "{tmp}/file is not a directory; name one on the drive to measure"),
        (["{tmp}", "{tmp}/drive/.."], 2, "{tmp}/drive/.. and {tmp} are one directory"),
        (["{tmp}", "--sise", "1GiB"], 2, "--size"),
        (["{tmp}", "--size", "1Gb4"], 2, "error: --size: not a size: '1Gb4'"),
        (["{tmp}", "--size", "-1"], 2, "error: --size: not a size: '-1'"),
        (["{tmp}", "--size", "1KiB"], 2, "error: size: 1.0 KiB is too little"),
        (["{tmp}", "--block", "1MiB,x"], 2, "error: --block: not a size: 'x'"),
        (["{tmp}", "--block", "5000"], 2, "error: block: 5,000 bytes is no power of two"),
        (["{tmp}", "--depth", "1,,8"], 2, "error: --depth: not a whole number: ''"),
        (["{tmp}", "--depth", "0"], 2, "error: depth: 0 is not from 1"),
        (["{tmp}", "--rounds", "0"], 2, "error: rounds: 0 is less than 1"),
        (["{tmp}", "--sustained", "soon"], 2, "error: --sustained: not a time: 'soon'"),
        (["{tmp}", "--engine", "urin"], 2, "did you mean uring?"),
        (["{tmp}", "--engine", "libaio"], 2, "there are uring, threads, portable"),
        (["{tmp}", "--json", "--quiet"], 2, "--json needs a file, or - for standard output, not '--quiet'"),
        (["{tmp}", "--markdown", "-"], 2, "--markdown needs a file, not '-'"),
        (["{tmp}", "--plot", "b.png"], 2, "b.png is neither .html nor .svg"),
        (["{tmp}", "--plot", "{tmp}/none/b.svg"], 2, "the folder {tmp}/none does not exist"),
        (["{tmp}", "--json", "{tmp}"], 2, "{tmp} is a directory; name a file"),
        (["{tmp}", "--json", "{tmp}/x", "--markdown", "{tmp}/x"], 2, "{tmp}/x is named for two outputs"),
        (["{tmp}", "--machine", "{tmp}/x", "--no-machine"], 2, "exclude each other"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(
    call: Call, asked: Asked, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "drive").mkdir()
    (tmp_path / "file").touch()
    got, out, err = call(*(text.replace("{tmp}", str(tmp_path)) for text in arguments))
    assert (got, out, asked) == (code, "", [])
    assert message.replace("{tmp}", str(tmp_path)) in err
    assert "Traceback" not in err
    if message.startswith("error"):
        assert err.count("\n") == 1


def test_help_teaches_with_examples_that_parse(call: Call, asked: Asked, tmp_path: Path) -> None:
    code, out, _ = call("--help")
    assert code == 0
    for word in ("Examples", "p99.9", "fdatasync", "O_DIRECT", "CPU s/GB", "a minute a drive"):
        assert word in out
    examples = [
        line.split()[2:] for line in out.splitlines() if line.strip().startswith("offload bench /mnt")
    ]
    assert len(examples) == 4
    for folder in ("nvme0", "nvme1"):
        (tmp_path / folder).mkdir()
    for words in examples:
        here = [
            str(tmp_path / Path(word).name) if word.startswith("/mnt") or "." in word else word
            for word in words
        ]
        assert call(*here)[0] == 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5min", 90), ("2 h", 7200), ("10MIN", 600), ("0.5m", 30)],
)
def test_times_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "min", "-5s", "5 days", "1:30", "nan", "1e3"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write 90s, 10min or 1h"):
        parse_seconds(text)


def test_results_of_several_drives_end_with_the_setting_for_all(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_run, "run_bench", lambda directories, options, progress=None: full_result())
    _, out, _ = call(tmp_path)
    assert "Best for 2 drives at once: blocks of 4 MiB, 8 in flight." in out.splitlines()[-1]
    assert full_result().machine.setting_for(("259:0", "259:1")) == IoSetting(
        segment_nbytes=4 * MIB, queue_depth=8
    )
