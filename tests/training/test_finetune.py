"""The whole loop on a tiny model: it learns, stops when asked, resumes bit by bit, and cleans up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import offload.training.finetune
import offload.training.output
from offload.aio import open_engine
from offload.errors import CapacityError, ConfigError, DiskFullError, OffloadError, StateError, StorageError
from offload.store import Store, drives, list_runs
from offload.training.finetune import finetune
from offload.training.job import learning_rates


def records(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory: Path) -> list[float]:
    return [record["loss"] for record in records(directory) if "loss" in record]


def everything(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def stopper(at: str, number: signal.Signals = signal.SIGINT):
    """An echo that sends the signal when a line begins with `at`."""
    lines: list[str] = []

    def echo(line: str) -> None:
        lines.append(line)
        if line.startswith(at):
            os.kill(os.getpid(), number)

    return echo, lines


def test_a_run_learns_and_exports_what_transformers_loads(make_config, tmp_path: Path) -> None:
    lines: list[str] = []
    result = finetune(make_config(val_size=4, max_steps=12), echo=lines.append)
    out = tmp_path / "out"
    assert (result.step, result.exit_code, result.directory) == (12, 0, out / "final")
    assert losses(out)[-1] < losses(out)[0] - 0.2
    held_out = [record["eval_loss"] for record in records(out) if "eval_loss" in record]
    assert len(held_out) == 2
    assert held_out[1] < held_out[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "final")
    assert transformers.AutoTokenizer.from_pretrained(out / "final").eos_token_id == 256
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert any(line.startswith("step 1/12  loss") for line in lines)
    assert lines[-1] == f"the model is in {out / 'final'}"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_resumes_bit_by_bit(
    make_config, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    finetune(make_config(output_dir=tmp_path / "whole", lr_scheduler_type="cosine"), echo=lambda _: None)
    config = make_config(output_dir=tmp_path / "broken", lr_scheduler_type="cosine")
    echo, lines = stopper("step 2/6", number)
    result = finetune(config, echo=echo)
    assert (result.step, result.exit_code, result.directory) == (2, code, None)
    assert f"{number.name}: finishing this step, then stopping" in lines
    assert "stopped after step 2 of 6, which is committed; run the same command again to go on" in lines
    assert not (tmp_path / "broken" / "final").exists()
    lines.clear()
    assert finetune(config, echo=lines.append).step == 6
    assert lines[0].endswith("at step 2 of 6")
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    broken, whole = (load_file(tmp_path / name / "final/model.safetensors") for name in ("broken", "whole"))
    assert all(torch.equal(broken[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_by_bit(make_config, tmp_path: Path) -> None:
    finetune(make_config(output_dir=tmp_path / "whole"), echo=lambda _: None)
    config = make_config(output_dir=tmp_path / "broken")
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom offload.training.config import load_config\n"
        "from offload.training.finetune import finetune\n"
        "def echo(line):\n    if line.startswith(sys.argv[2]): os._exit(9)\n"
        "finetune(load_config(Path(sys.argv[1]), {}), echo=echo)\n"
    )
    root = Path(offload.training.finetune.__file__).parents[1]
    for at in ("import", "step 2/6", "step 5/6", "loss"):
        command = [sys.executable, "-c", script, str(tmp_path / "run.yaml"), at]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100)
        assert done.returncode == 9, done.stderr
    assert finetune(config, echo=lambda _: None).step == 6
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert len(list((tmp_path / "broken" / "state").iterdir())) == 1


def test_a_finished_run_has_nothing_left_to_do(make_config, tmp_path: Path) -> None:
    finetune(make_config(max_steps=2), echo=lambda _: None)
    before = (tmp_path / "out/final/model.safetensors").stat()
    lines: list[str] = []
    assert finetune(make_config(max_steps=2), echo=lines.append).step == 2
    assert "all 2 steps are done; raise max_steps to train further" in lines
    assert (tmp_path / "out/final/model.safetensors").stat() == before
    assert finetune(make_config(max_steps=3), echo=lines.append).step == 3
    assert (tmp_path / "out/final/model.safetensors").stat() != before


def test_a_start_that_never_committed_is_begun_anew(make_config, tmp_path: Path) -> None:
    config = make_config(max_steps=2)

    def kill(*_: object) -> None:
        raise SystemExit(9)

    with pytest.MonkeyPatch.context() as patch:
        # Dying between the commit of the import and the note of it.
        patch.setattr(offload.training.output.OutputDirectory, "mark_imported", kill)
        with pytest.raises(SystemExit):
            finetune(config, echo=lambda _: None)
    (left,) = (tmp_path / "out/state").iterdir()
    lines: list[str] = []
    assert finetune(config, echo=lines.append).step == 2
    assert lines[0] == "the last start did not finish its import; starting anew"
    assert not left.exists()


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("seed", 43, "seed: 42 then, 43 now"),
        ("dtype", "float32", "dtype: 'bfloat16' then, 'float32' now"),
        ("moments", "8bit", "moments: 'float32' then, '8bit' now"),
        ("max_length", 16, "max_length: 32 then, 16 now"),
        ("gradient_accumulation_steps", 3, "rows_per_step: 4 then, 6 now"),
    ],
)
def test_a_resume_with_another_setting_is_refused(
    make_config, tmp_path: Path, flag: str, value: object, message: str
) -> None:
    finetune(make_config(max_steps=1), echo=lambda _: None)
    before = everything(tmp_path)
    with pytest.raises(ConfigError) as caught:
        finetune(make_config(max_steps=2, **{flag: value}), echo=lambda _: None)
    assert message in str(caught.value)
    assert everything(tmp_path) == before


def test_moments_in_8_bits_are_the_run_s_and_a_resume_goes_on_with_them(make_config, tmp_path: Path) -> None:
    settings = {"moments": "8bit", "lr_scheduler_type": "constant"}
    for folder, stops in (("broken", (2, 4)), ("whole", (4,))):
        for max_steps in stops:
            config = make_config(max_steps=max_steps, output_dir=tmp_path / folder, **settings)
            assert finetune(config, echo=lambda _: None).step == max_steps
    # Evaluations before and after a part are its own; the losses of steps are not.
    steps = [
        {r["step"]: r["loss"] for r in records(tmp_path / n) if "loss" in r} for n in ("broken", "whole")
    ]
    assert steps[0] == steps[1]
    state = tmp_path / "whole" / "state"
    (run,) = list_runs(state)
    with open_engine() as engine, Store.open([state], engine=engine, run_id=run.run_id) as store:
        assert store.identity["moments"] == "8bit"


def test_a_resume_with_changed_text_is_refused(make_config, text_file: Path) -> None:
    finetune(make_config(max_steps=1), echo=lambda _: None)
    text_file.write_text(text_file.read_text().replace("squared", "SQUARED"))
    with pytest.raises(ConfigError, match=r"data: 'sha256 \w{16}' then, 'sha256 \w{16}' now"):
        finetune(make_config(max_steps=2), echo=lambda _: None)


def test_micro_batches_may_change_on_a_resume(make_config) -> None:
    finetune(make_config(max_steps=1), echo=lambda _: None)
    config = make_config(max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert finetune(config, echo=lambda _: None).step == 2


BAD: list[tuple[dict[str, object], type[OffloadError], str]] = [
    ({"model_name_or_path": "{tmp}/none"}, ConfigError, "does not exist"),
    ({"model_name_or_path": "{tmp}"}, ConfigError, "not a model directory"),
    ({"train_file": "{tmp}/none.txt"}, ConfigError, "names no file"),
    ({"train_file": "{tmp}/empty.txt"}, ConfigError, "hold no text"),
    ({"host_memory": "1KiB"}, CapacityError, "host"),
    ({"device_memory": "1KiB"}, CapacityError, "device"),
    ({"output_dir": "{tmp}/empty.txt"}, StorageError, "output_dir"),
    ({"output_dir": "/proc/none"}, StorageError, "output_dir"),
    ({"disk": "{tmp}/none"}, StorageError, "none"),
    ({"max_length": 65}, ConfigError, "64 positions"),
    ({"per_device_train_batch_size": 10**6}, ConfigError, "one step needs"),
    ({"val_size": 10**6}, ConfigError, "val_size"),
    ({"trace": "{tmp}/none/trace.json"}, ConfigError, "trace"),
    ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-9}, ConfigError, "polynomial"),
]


@pytest.mark.parametrize(("flags", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_message_and_leaves_nothing(
    make_config, tmp_path: Path, flags: dict[str, object], error: type[OffloadError], message: str
) -> None:
    (tmp_path / "empty.txt").touch()
    before = everything(tmp_path)
    flags = {key: str(value).format(tmp=tmp_path) for key, value in flags.items()}
    with pytest.raises(error, match=message):
        finetune(make_config(**flags), echo=lambda _: None)
    assert everything(tmp_path) == before


def test_a_full_disk_leaves_nothing(make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(directories, *_: object, **__: object) -> None:
        raise DiskFullError(f"{directories[0]} has 1 KiB free", errno=28, path=directories[0])

    monkeypatch.setattr(drives, "check_room", full)
    before = everything(tmp_path)
    with pytest.raises(DiskFullError, match="1 KiB free"):
        finetune(make_config(), echo=lambda _: None)
    assert everything(tmp_path) == before


def test_ctrl_c_during_the_import_leaves_nothing(
    make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("offload.hf.PretrainedSource.load", interrupted)
    before = everything(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        finetune(make_config(), echo=lambda _: None)
    assert everything(tmp_path) == before


def test_an_output_directory_of_something_else_is_left_alone(make_config, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(ConfigError, match=r"holds a metrics\.jsonl and no run of ours"):
        finetune(make_config(), echo=lambda _: None)
    assert everything(tmp_path) == before


def test_a_loss_that_is_not_finite_stops_at_the_last_commit(make_config, tmp_path: Path) -> None:
    config = make_config(learning_rate=1e30, lr_scheduler_type="constant")
    lines: list[str] = []
    with pytest.raises(StateError, match="nothing of this step was applied"):
        finetune(config, echo=lines.append)
    assert lines[-1].startswith("the run stands at step ")


def test_a_trace_is_written(make_config, tmp_path: Path) -> None:
    finetune(make_config(max_steps=1, trace=tmp_path / "trace.json"), echo=lambda _: None)
    tracks = {event.get("cat") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"compute", "update", "commit", "disk read", "disk write"} <= tracks


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt"])
def test_learning_rates_are_those_of_transformers(make_config, name: str) -> None:
    rate = learning_rates(make_config(lr_scheduler_type=name, warmup_steps=0.25), 12)
    holder = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    scheduler = transformers.get_scheduler(name, holder, num_warmup_steps=3, num_training_steps=12)
    for step in range(12):
        assert rate(step) == holder.param_groups[0]["lr"]
        holder.step()
        scheduler.step()
