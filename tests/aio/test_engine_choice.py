"""Which engine is opened, and that the reason is said."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from offload.aio import open_engine, probe_engines
from offload.aio.failures import io_error
from offload.aio.native import missing_reason
from offload.errors import ConfigError, PlanError


def run_script(script: str) -> str:
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_probe_tells_of_each_engine_in_order_of_preference() -> None:
    rows = probe_engines()
    assert [row.name for row in rows] == ["uring", "threads", "portable"]
    assert rows[-1].available
    assert all(row.reason for row in rows)


def test_the_first_engine_that_works_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OFFLOAD_IO_ENGINE", raising=False)
    best = next(row.name for row in probe_engines() if row.available)
    with open_engine() as engine:
        assert engine.name == best


def test_the_environment_names_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_IO_ENGINE", "portable")
    with open_engine() as engine:
        assert engine.name == "portable"


def test_an_argument_is_stronger_than_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_IO_ENGINE", "nonsense")
    with open_engine("portable") as engine:
        assert engine.name == "portable"


def test_an_unknown_name_is_an_error_that_lists_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_IO_ENGINE", "libaio")
    with pytest.raises(ConfigError, match=r"OFFLOAD_IO_ENGINE: .*'libaio'.*uring, threads, portable"):
        open_engine()
    with pytest.raises(ConfigError, match="name: "):
        open_engine("libaio")  # type: ignore[arg-type]


@pytest.mark.skipif(bool(missing_reason), reason=missing_reason)
@pytest.mark.parametrize(
    "options", [{"queue_depth": 0}, {"queue_depth": 5000}, {"segment_nbytes": 5000}, {"threads": 0}]
)
def test_limits_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        open_engine("threads", **options)  # type: ignore[arg-type]


def test_queue_depth_is_what_can_be_in_flight() -> None:
    with open_engine("portable", queue_depth=5) as engine:
        assert engine.queue_depth == 5
    with open_engine("threads", threads=3) as engine:
        assert engine.queue_depth == 3


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="offload.aio")
    for _ in range(3):
        open_engine("portable", queue_depth=17).close()
    assert [record.getMessage() for record in caplog.records] == ["I/O engine: portable, queue depth 17"]


# A classic BPF program for PR_SET_SECCOMP: `{errno}` to io_uring_setup (425), all else allowed.
_SECCOMP = """
import ctypes, logging, struct, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
program = b"".join(struct.pack("HBBI", *step) for step in [
    (0x20, 0, 0, 0),                       # load the number of the system call
    (0x15, 0, 1, 425),                     # io_uring_setup?
    (0x06, 0, 0, 0x00050000 | {errno}),    # then SECCOMP_RET_ERRNO
    (0x06, 0, 0, 0x7FFF0000),              # else SECCOMP_RET_ALLOW
])
code = ctypes.create_string_buffer(program)
filter = struct.pack("HP", 4, ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, filter, 0, 0):  # NO_NEW_PRIVS, SECCOMP
    print("no seccomp here")
    sys.exit()
from offload.aio import open_engine, probe_engines
from offload.errors import PlanError
print(probe_engines()[0])
with open_engine() as engine:
    print("opened", engine.name)
try:
    open_engine("uring")
except PlanError as error:
    print("forced:", error)
"""


@pytest.mark.skipif(bool(missing_reason), reason=missing_reason)
@pytest.mark.parametrize(
    ("errno", "reason"),
    [(1, "a seccomp filter refuses io_uring (EPERM)"), (38, "this kernel has no io_uring")],
)
def test_where_seccomp_refuses_io_uring_threads_take_over_and_say_why(errno: int, reason: str) -> None:
    output = run_script(_SECCOMP.replace("{errno}", str(errno)))
    if "no seccomp here" in output:
        pytest.skip("this kernel has no seccomp filters")
    lines = output.splitlines()
    assert "available=False" in lines[0]
    assert lines[1].startswith("WARNING I/O engine: threads, queue depth 8, because uring: " + reason)
    assert lines[2] == "opened threads"
    assert lines[3].startswith("forced: ")
    assert reason in lines[3]


_WITHOUT_EXTENSION = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
sys.modules["offload._aio"] = None  # what an import of a module that is not there meets
import offload.aio
with offload.aio.open_engine() as engine:
    print(engine.name, hex(offload.aio.crc32c(b"123456789")))
"""


def test_without_the_extension_everything_goes_on_in_python() -> None:
    warning, result = run_script(_WITHOUT_EXTENSION).splitlines()
    assert warning.startswith("WARNING I/O engine: portable, queue depth 32, because uring: the extension")
    assert result == "portable 0xe3069283"


def test_a_refusal_without_errno_name_is_still_an_error() -> None:
    assert "errno 4000" in str(io_error("open", "/x", 4000))
    assert issubclass(ConfigError, PlanError)
