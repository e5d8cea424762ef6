"""Every benchmark runs, at toy size, and keeps what it measured; the figures are not judged here."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from offload.errors import DiskFullError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("[!_]*.py"))
# What the long tests said stands beside the benchmarks' results; it has no samples.
RESULTS = sorted(
    path for path in (BENCHMARKS / "results").glob("*/*") if path.is_dir() and path.name != "soak"
)

SMALL = ["--shape", "toy", "--host-memory", "64MiB", "--device-memory", "64MiB"]
ARGUMENTS = {
    "adam": ["--parameters", "1000", "--rounds", "1"],
    "adam_small": ["--layers", "1", "--hidden", "12", "--tensors", "3", "--numel", "9", "--rounds", "1"],
    "bounded": [*SMALL, "--steps", "2", "--length", "8", "--learning-rate", "0.01"],
    "checksums": [*SMALL, "--warm-up", "1", "--pairs", "1"],
    "chunked_loss": [*SMALL, "--rounds", "1", "--steps", "2", "--length", "16", "--chunk", "64KiB"],
    "damaged_checkpoints": ["--steps", "3"],
    "fewest_bytes": [*SMALL, "--moments", "8bit", "--warm-up", "1", "--steps", "1", "--length", "8"],
    "host_cache": [*SMALL, "--warm-up", "1", "--steps", "2", "--length", "8"],
    "kill_loop": [*SMALL, "--kills", "1", "--steps", "3", "--length", "8"],
    "io": [
        *("--size", "8MiB", "--transfer", "8MiB", "--rounds", "1", "--cells", "*:128k:*"),
        *("--without-fio", "--parts", "all"),
    ],
    "spilled_inputs": [
        *SMALL,
        *("--kept", "1", "--rounds", "1", "--warm-up", "1", "--steps", "1", "--length", "8"),
    ],
    "plan_accuracy": [
        *("--shapes", "toy", "--homes", "disk", "--warm-up", "1", "--rounds", "1", "--steps", "1"),
        *("--host-memory", "64MiB", "--device-memory", "64MiB", "--length", "8"),
    ],
    "verify": ["--size", "64MiB", "--rounds", "1"],
    "whole_step": [*SMALL, "--steps", "2", "--kill-at", "1", "--length", "8", "--learning-rate", "0.01"],
    "quality_8bit": ["--seeds", "1", "--scratch-steps", "2", "--scratch-rows", "1"],
    "overlap": [*SMALL, "--rounds", "1", "--steps", "1", "--length", "8"],
}
COLUMNS = {
    "quality_8bit": {"task", "seed", "moments", "step", "loss", "held_out"},
    "adam": {"threads", "round", "contender", "numel", "nbytes", "elapsed_s"},
    "adam_small": {"model", "threads", "round", "contender", "elapsed_s"},
    "bounded": {"time_s", "private_nbytes"},
    "checksums": {"pair", "contender", "step_s", "checksum_s", "checksum_nbytes", "transferred_nbytes"},
    "chunked_loss": {"round", "contender", "step", "step_s", "peak_nbytes", "loss"},
    "damaged_checkpoints": {"contender", "damage", "handled", "outcome"},
    "fewest_bytes": {"micro_batches", "step", "kernel_read", "kernel_written", "runtime_read"},
    "host_cache": {"cached", "step", "committed", "loss", "seconds"},
    "kill_loop": {"killed at", "status", "resumed at step"},
    "io": {"part", "op", "block_nbytes", "depth", "round", "contender", "nbytes", "elapsed_s", "cpu_s"},
    "plan_accuracy": {"shape", "home", "round", "step_s", "predicted step, s", "measured host peak, B"},
    "verify": {"part", "round", "contender", "nbytes", "elapsed_s", "cpu_s"},
    "whole_step": {"attempt", "step", "loss", "step_s", "read_nbytes", "written_nbytes"},
    "overlap": {"round", "step", "compute", "disk", "ratio"},
    "spilled_inputs": {"inputs_in", "step", "loss", "step_s", "inputs_written", "inputs_read"},
}


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    # By its path: `import io` would be Python's own.
    path = BENCHMARKS / f"{request.param}.py"
    spec = importlib.util.spec_from_file_location(request.param, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if request.param != "io":
        monkeypatch.setitem(sys.modules, request.param, module)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def each(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("script", names, indirect=True)


def samples(saved: Path) -> list[dict[str, str]]:
    with open(saved / "raw.csv", newline="") as file:
        return list(csv.DictReader(file))


@each(*SCRIPTS)
def test_benchmark_runs_at_toy_size_and_keeps_its_samples(script: ModuleType, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    status = script.main([*ARGUMENTS[script.__name__], "--disk", str(tmp_path), "--save", str(saved)])
    # A toy misses the bars of real sizes; that nothing is lost holds at any size.
    assert status == 0 or script.__name__ not in ("kill_loop", "damaged_checkpoints", "spilled_inputs")
    rows = samples(saved)
    assert rows and rows[0].keys() >= COLUMNS[script.__name__]
    report = (saved / "README.md").read_text()
    assert report.startswith(f"# {script.__name__}: ")
    assert "- command: `python benchmarks/" in report
    assert not [path for path in tmp_path.iterdir() if path != saved], "it leaves its state behind"


@each(*SCRIPTS)
def test_benchmark_explains_itself(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        script.main(["--help"])
    assert ended.value.code == 0
    assert "--save" in capsys.readouterr().out
    assert f"`{script.__name__}.py`" in (BENCHMARKS / "README.md").read_text()


@each("bounded")
def test_a_drive_without_room_is_refused_before_anything_is_written(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "DISK_NBYTES_PER_PARAMETER", 1 << 60)
    with pytest.raises(DiskFullError, match="name another directory with --disk"):
        script.main([*ARGUMENTS["bounded"], "--disk", str(tmp_path)])
    assert not any(tmp_path.iterdir())


@each("overlap")
def test_overlap_writes_a_trace_with_reads_compute_updates_and_writes(
    script: ModuleType, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    script.main([*ARGUMENTS["overlap"], "--disk", str(tmp_path), "--trace", str(trace)])
    events = json.loads(trace.read_text())["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"compute", "disk read", "disk write", "update"} <= tracks


@each("overlap")
def test_overlap_replays_gradients_that_go_to_disk(script: ModuleType, tmp_path: Path) -> None:
    arguments = [*ARGUMENTS["overlap"], "--max-grad-norm", "1", "--disk", str(tmp_path)]
    arguments[arguments.index("--host-memory") + 1] = "17154048"
    saved = tmp_path / "saved"
    script.main([*arguments, "--save", str(saved)])
    report = (saved / "README.md").read_text()
    assert "Clipping: by 1, gradients of a step: " in report
    assert "on disk, written and read once a step" in report


@pytest.mark.parametrize("saved", RESULTS, ids=lambda path: "/".join(path.parts[-2:]))
def test_published_results_have_their_command_and_raw_samples(saved: Path) -> None:
    assert "- command: `python benchmarks/" in (saved / "README.md").read_text()
    assert samples(saved)
