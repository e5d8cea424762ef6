"""Small runs for the commands over runs, and the command line called in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_models import SETTINGS, build, train

import offload
from offload.cli import main


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the command line; return exit code, output, errors."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    code = caught.value.code
    assert isinstance(code, int)
    return code, out, err


def begin(disk: list[Path], *, steps: int = 2, name: str = "mlp", **settings: Any) -> str:
    """Train a toy, close it, and return the run's id."""
    model = build(name)
    torch.manual_seed(7)
    with offload.attach(model, **{**SETTINGS, **settings}, disk=disk) as runtime:
        train(name, runtime, model, range(steps))
        assert runtime.run_id is not None
        return runtime.run_id


def point(output: Path, run_id: str, disk: list[Path], **identity: str) -> Path:
    """Make an output directory that names a run, as finetune does."""
    output.mkdir(parents=True)
    pointer = {
        "format": "offload-run",
        "version": 1,
        "run_id": run_id,
        "disk": [str(path) for path in disk],
        "identity": identity,
        "imported": True,
        "exported_step": None,
    }
    (output / "run.json").write_text(json.dumps(pointer))
    return output


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))
