"""The conformance suite, third part: who owns what until when; forks, signals, the end."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_workbench import SEGMENT_NBYTES, Drive, View, aligned, pattern

from offload.aio import Engine


def run_script(engine_name: str, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `script` in a fresh interpreter; `ENGINE` in it is the engine's name."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", f"ENGINE = {engine_name!r}\n{script}", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_buffer_is_free_once_its_request_was_waited_for(engine: Engine, tmp_path: Path) -> None:
    with engine.open(str(tmp_path / "data"), "x+") as file:
        buffer = bytearray(pattern(5 * SEGMENT_NBYTES))
        request = engine.submit("write", file, buffer, 0)
        request.wait()
        buffer.append(1)  # BufferError while anything holds it
        request.wait()


def test_a_buffer_is_held_while_its_request_is_in_flight(engine: Engine, drive: Drive) -> None:
    with engine.open(str(drive.path / "data"), "x+") as file, drive.frozen() as thaw:
        buffer = bytearray(pattern(9000))
        request = engine.submit("write", file, buffer, 0)
        with pytest.raises(BufferError):
            buffer.append(1)
        thaw()
        request.wait()
        buffer.append(1)


def test_a_dropped_request_goes_on_and_holds_its_buffer(engine: Engine, drive: Drive, view: View) -> None:
    with engine.open(str(drive.path / "data"), "x+") as file:
        with drive.frozen():
            buffer = bytearray(pattern(3 * SEGMENT_NBYTES))
            engine.submit("write", file, buffer, 0)
            with pytest.raises(BufferError):
                buffer.append(1)
        engine.close()
        buffer.append(1)
    assert view.read_file(drive.path / "data") == pattern(3 * SEGMENT_NBYTES)


def test_a_dropped_buffer_lives_until_the_transfer_has_ended(
    engine: Engine, tmp_path: Path, view: View
) -> None:
    nbytes = 8 * SEGMENT_NBYTES
    with engine.open(str(tmp_path / "data"), "x+") as file:
        for turn in range(20):
            engine.submit("write", file, bytearray(pattern(nbytes, seed=turn)), turn * nbytes)
    assert view.read_file(tmp_path / "data") == b"".join(pattern(nbytes, seed=turn) for turn in range(20))


def test_closing_the_engine_finishes_what_is_in_flight(engine: Engine, tmp_path: Path, view: View) -> None:
    nbytes = 10 * SEGMENT_NBYTES + 5
    file = engine.open(str(tmp_path / "data"), "x+")
    requests = [engine.submit("write", file, pattern(nbytes, seed), seed * nbytes) for seed in range(10)]
    engine.close()
    assert all(request.done() for request in requests)
    assert [request.wait() for request in requests] == [nbytes] * 10
    file.close()
    assert view.read_file(tmp_path / "data") == b"".join(pattern(nbytes, seed) for seed in range(10))


def test_closing_a_file_finishes_what_is_in_flight_on_it(engine: Engine, tmp_path: Path) -> None:
    nbytes = 10 * SEGMENT_NBYTES + 5
    file = engine.open(str(tmp_path / "data"), "x+")
    requests = [engine.submit("write", file, pattern(nbytes, seed), seed * nbytes) for seed in range(10)]
    file.close()
    assert all(request.wait() == nbytes for request in requests)


def test_a_dropped_file_is_closed_only_after_its_requests(engine: Engine, tmp_path: Path, view: View) -> None:
    target = aligned(40 * SEGMENT_NBYTES)
    view.write_file(tmp_path / "data", pattern(40 * SEGMENT_NBYTES))
    request = engine.submit("read", engine.open(str(tmp_path / "data")), target, 0)
    assert request.wait() == len(target)
    assert target == pattern(40 * SEGMENT_NBYTES)


def test_a_request_outlives_its_engine(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    with make_engine() as engine, engine.open(str(tmp_path / "data"), "x+") as file:
        request = engine.submit("write", file, b"abc", 0)
    del engine, file
    assert request.wait() == 3


def test_an_engine_that_is_dropped_without_close_finishes_its_work(
    make_engine: Callable[..., Engine], tmp_path: Path, view: View
) -> None:
    engine = make_engine()
    if engine.name == "portable":
        engine.close()
        pytest.skip("its work goes on, but dropping it waits for none of it")
    data = pattern(20 * SEGMENT_NBYTES)
    engine.submit("write", engine.open(str(tmp_path / "data"), "x+"), data, 0)
    del engine
    assert view.read_file(tmp_path / "data") == data


@pytest.mark.usefixtures("real_files")
def test_waiting_leaves_the_interpreter_to_others(engine: Engine, drive: Drive) -> None:
    with engine.open(str(drive.path / "data"), "x+") as file, drive.frozen() as thaw:
        request = engine.submit("write", file, pattern(9000), 0)
        # This thread waits; only another that runs Python meanwhile can end the wait.
        thread = threading.Thread(target=thaw)
        thread.start()
        assert request.wait() == 9000
        thread.join()


_INTERRUPTED = """
import fcntl, os, signal, sys
from offload.aio import open_engine
folder = os.open(sys.argv[1], os.O_RDONLY)
engine = open_engine(ENGINE)
file = engine.open("data", "x+", dir_fd=folder)
fcntl.ioctl(folder, 0xC0045877, 0)
try:
    request = engine.submit("write", file, bytes(9000), 0)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        request.wait()
    except KeyboardInterrupt:
        print("interrupted")
finally:
    fcntl.ioctl(folder, 0xC0045878, 0)
print(request.wait())
engine.close()
"""


@pytest.mark.usefixtures("real_files")
def test_ctrl_c_ends_a_wait_on_a_hung_drive(engine: Engine, drive: Drive) -> None:
    result = run_script(engine.name, _INTERRUPTED, str(drive.path))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == ["interrupted", "9000"]


_AT_EXIT = """
import sys
from offload.aio import open_engine
engine = open_engine(ENGINE)
file = engine.open(sys.argv[1], "x+")
kept = [engine.submit("write", file, bytes([n]) * 1_000_003, n * 1_000_003) for n in range(16)]
engine.submit("write", file, bytearray(100), 20 * 1_000_003)
"""


@pytest.mark.usefixtures("real_files")
def test_the_interpreter_ends_cleanly_with_work_in_flight(engine: Engine, tmp_path: Path) -> None:
    result = run_script(engine.name, _AT_EXIT, str(tmp_path / "data"))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    if engine.name != "portable":  # its thread pool is gone before anybody can wait for it
        expected = b"".join(bytes([n]) * 1_000_003 for n in range(16))
        assert (tmp_path / "data").read_bytes()[: len(expected)] == expected


_DAEMONS = """
import sys, threading
from offload.aio import open_engine
from offload.errors import StateError
engine = open_engine(ENGINE)
file = engine.open(sys.argv[1], "x+")
engine.submit("write", file, bytes(65536), 0).wait()
started, idle = threading.Semaphore(0), threading.Event()
def work():
    buffer = bytearray(65536)
    try:
        while True:
            engine.submit("read", file, buffer, 0).wait()
            file.size_nbytes
            started.release()
    except StateError:  # the engine is closed when the interpreter ends
        idle.wait()
for _ in range(24):
    threading.Thread(target=work, daemon=True).start()
for _ in range(24):
    started.acquire()
"""


@pytest.mark.usefixtures("real_files")
def test_the_interpreter_ends_cleanly_with_daemon_threads_in_calls(engine: Engine, tmp_path: Path) -> None:
    # One that wanted the interpreter back while it ends was the end of the process.
    if engine.name == "portable":
        pytest.skip("no C++; its thread pool is gone before the engine is, and its threads say so")
    for attempt in range(4):
        result = run_script(engine.name, _DAEMONS, str(tmp_path / f"data{attempt}"))
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


_FORKED = """
import os, sys, warnings
from offload.aio import open_engine
from offload.errors import StateError
warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: a fork of a process with threads
engine = open_engine(ENGINE)
file = engine.open(sys.argv[1], "x+")
engine.submit("write", file, b"parent", 0).wait()
pending = [engine.submit("write", file, bytes(1_000_000), 0) for _ in range(8)]
child = os.fork()
if child == 0:
    refused = 0
    for call in (
        lambda: engine.submit("write", file, b"child", 0),
        lambda: engine.open(sys.argv[1]),
        lambda: engine.sync(file),
        lambda: file.size_nbytes,
    ):
        try:
            call()
        except StateError as error:
            assert "parent" in str(error)
            refused += 1
    try:
        pending[-1].wait()  # done before the fork, or refused
    except StateError:
        pass
    file.close()
    engine.close()
    del file, engine, pending
    with open_engine(ENGINE) as mine, mine.open(sys.argv[1], "r+") as own:
        mine.submit("write", own, b"child", 100).wait()
    os._exit(refused)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
print(sum(request.wait() for request in pending))
engine.close()
"""


@pytest.mark.usefixtures("real_files")
def test_a_forked_child_is_refused_and_may_open_its_own(engine: Engine, tmp_path: Path) -> None:
    result = run_script(engine.name, _FORKED, str(tmp_path / "data"))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == ["4", "8000000"]


def test_no_descriptor_is_left_behind(make_engine: Callable[..., Engine], tmp_path: Path, view: View) -> None:
    def use() -> None:
        with make_engine() as engine, engine.open(str(tmp_path / "data"), "r+") as file:
            engine.submit("write", file, pattern(100_000), 1).wait()

    view.write_file(tmp_path / "data", b"")
    use()  # the first use may open what stays, the import machinery's for example
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        use()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_an_engine_that_is_dropped_without_close_leaves_neither_threads_nor_descriptors(
    make_engine: Callable[..., Engine], tmp_path: Path, view: View
) -> None:
    view.write_file(tmp_path / "data", pattern(5000))

    def use() -> list[threading.Thread]:
        before = set(threading.enumerate())
        engine = make_engine()
        engine.submit("read", engine.open(str(tmp_path / "data")), bytearray(5000), 0).wait()
        # Those that Python knows of; they end soon after the engine, which does not wait for them.
        return [thread for thread in threading.enumerate() if thread not in before]

    def use_and_count() -> int:
        for thread in use():
            thread.join(timeout=10)
            assert not thread.is_alive()
        return len(list(Path("/proc/self/fd").iterdir()))

    once = use_and_count()
    assert [use_and_count() for _ in range(3)] == [once] * 3
