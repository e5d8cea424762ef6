"""`offload finetune` makes a plan, shows it, obeys it, and puts what it measured beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planner_cases import drive, machine

from offload.cli import main
from offload.errors import CapacityError
from offload.hf import open_pretrained
from offload.machine import MACHINE_VARIABLE, Machine, ProcessorSpeed, file_system_id, save_machine
from offload.preflight import ComputeSpeed
from offload.sizes import GIB
from offload.training import planning
from offload.training.finetune import finetune
from offload.training.job import choose_device

SPEED = ProcessorSpeed(num_threads=1, update_bytes_per_s=1e10, update_8bit_bytes_per_s=1e10)


def found_machine(directory: Path, rate: float = 1e9) -> Machine:
    here = replace(drive(read=rate, write=rate), path=str(directory), device=file_system_id(directory))
    on = machine(memory=64 * GIB, drives=0, device=None)
    return replace(on, drives=(here,), processor=SPEED, crc32c_bytes_per_s=1e10)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """A machine that every probe finds at once."""
    found = found_machine(tmp_path)
    monkeypatch.setattr(planning, "probe_machine", lambda *_, **__: found)
    speed = ComputeSpeed(seconds=0.05, rows=2, length=32, num_threads=1)
    monkeypatch.setattr(planning, "compute_speed", lambda *_, **__: speed)
    return found


def records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory: Path) -> list[float]:
    return [record["loss"] for record in records(directory) if "loss" in record]


@pytest.mark.parametrize("home", [None, "disk", "host", "device"])
def test_a_run_does_what_its_plan_says(home, probed, make_config, tmp_path: Path) -> None:
    lines: list[str] = []
    open_keys = {"host_memory": None, "device_memory": None, "home": home, "save_steps": 2 if home else None}
    if home == "disk":
        # Of five steps two thirds commit; a plan shares the bytes of a cache's commits among many.
        open_keys["host_cache"] = 0
    config = make_config(preflight=True, max_steps=5, output_dir=tmp_path / "planned").model_copy(
        update=open_keys
    )
    assert finetune(config, echo=lines.append).exit_code == 0
    said = [line for line in lines if line.startswith("plan: ")]
    # Of plans that are alike in time, the one that writes least: memory, or a disk that is all cached.
    homes = ("disk", "host", "device") if home is None else (home,)
    assert said[0].startswith(tuple(f"plan: home {one}, 2 rows at once" for one in homes))
    assert (", a host cache of " in said[0]) == (home is None and "home disk" in said[0])
    assert "set by" in said[1] and "TB)" in said[1]
    assert lines.index(said[2]) < next(i for i, line in enumerate(lines) if line.startswith("import"))
    (outcome,) = [record for record in records(tmp_path / "planned") if "predicted" in record]
    predicted, measured = outcome["predicted"], outcome["measured"]
    for key in ("to_device_nbytes", "to_host_nbytes"):
        assert measured[key] == pytest.approx(predicted[key], rel=0.1), key
    for key in ("host_peak_nbytes", "device_peak_nbytes"):
        assert measured[key] == pytest.approx(predicted[key], rel=0.1), key
    if home == "disk":
        assert measured["disk_written_nbytes"] == pytest.approx(predicted["disk_written_nbytes"], rel=0.03)
    assert outcome["step"] == 5 and predicted["step_s"] > 0
    assert any(line.startswith("time of a step") for line in lines)
    # Where things live changes no value.
    finetune(make_config(max_steps=5, output_dir=tmp_path / "plain"), echo=lambda _: None)
    assert losses(tmp_path / "planned") == losses(tmp_path / "plain")


def test_a_resumed_run_is_planned_again_and_goes_on_alike(probed, make_config, tmp_path: Path) -> None:
    settings = {"preflight": True, "lr_scheduler_type": "constant"}
    finetune(make_config(**settings, max_steps=6, output_dir=tmp_path / "whole"), echo=lambda _: None)
    finetune(make_config(**settings, max_steps=3), echo=lambda _: None)
    lines: list[str] = []
    finetune(make_config(**settings, max_steps=6, home="disk"), echo=lines.append)
    assert lines[0].startswith("plan: home disk")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert len([record for record in records(tmp_path / "out") if "predicted" in record]) == 2


def test_a_run_that_fits_nowhere_is_refused_with_the_keys_that_would_do(
    probed, make_config, tmp_path: Path
) -> None:
    with pytest.raises(CapacityError, match=r"(?s)no plan fits .*host_memory: \d+MiB"):
        finetune(make_config(preflight=True, host_memory="100KiB"), echo=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_the_room_of_a_snapshot_is_counted(probed, make_config, monkeypatch, tmp_path: Path) -> None:
    config = make_config(preflight=True, snapshot_steps=2, home="disk")
    lines: list[str] = []
    finetune(config, echo=lines.append)
    assert any(line.endswith("of it for a snapshot") for line in lines)
    plan, _ = planning.plan_run(request_of(config))
    assert plan is not None and plan.snapshot_nbytes == plan.drive_nbytes // 2
    monkeypatch.setattr(planning, "free_nbytes", lambda _: plan.drive_nbytes + plan.snapshot_nbytes - 1)
    with pytest.raises(CapacityError, match="each drive lacks 1 B.*for a snapshot"):
        planning.plan_run(request_of(config))


def request_of(config: Any) -> planning.RunQuestion:

    model, source = open_pretrained(config.model_name_or_path)
    source.close()
    device, compute = choose_device(config)
    return planning.RunQuestion(config, model, (config.output_dir.parent,), device, compute)


def test_a_link_that_is_slower_than_planned_is_warned_of_once(
    probed, make_config, monkeypatch, tmp_path: Path
) -> None:
    path = tmp_path / "machine.json"
    save_machine(found_machine(tmp_path, rate=4e9), path)
    monkeypatch.setenv(MACHINE_VARIABLE, str(path))
    lines: list[str] = []
    finetune(make_config(preflight=True, max_steps=2), echo=lines.append)
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert "reading from" in warnings[0] and "1.00 GB/s now, 4.00 GB/s in" in warnings[0]
    assert f"offload bench {tmp_path}" in warnings[0]


def test_a_measured_machine_is_enough_for_a_plan_without_a_preflight(
    make_config, monkeypatch, tmp_path: Path
) -> None:
    path = tmp_path / "machine.json"
    save_machine(found_machine(tmp_path), path)
    monkeypatch.setenv(MACHINE_VARIABLE, str(path))
    monkeypatch.setattr(planning, "probe_machine", None)
    lines: list[str] = []
    finetune(make_config(max_steps=2), echo=lines.append)
    assert any("nothing is known of how fast the device computes" in line for line in lines)


def test_the_command_plans_the_very_run(probed, make_config, monkeypatch, capsys, tmp_path: Path) -> None:
    config = make_config(preflight=True, home="host", save_steps=7)
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    for arguments in ([], ["--json"]):
        with pytest.raises(SystemExit) as end:
            main(["plan", str(path), *arguments])
        assert end.value.code in (0, None)
    document = json.loads(capsys.readouterr().out.partition("\n{")[2].join(("{", "")))
    plan, _ = planning.plan_run(request_of(config))
    assert plan is not None
    assert document["plan"]["settings"] == json.loads(json.dumps(dict(plan.settings)))
    with pytest.raises(SystemExit):
        main(["plan", str(path), "--batch", "3"])
    assert "decides --batch" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
