"""What the commands over runs make of a run of `offload finetune`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from offload.cli import main
from offload.training.finetune import finetune


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that the test gives back."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_finished_run_is_listed_checked_exported_and_removed(
    make_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(max_steps=2)
    finetune(config)
    output = tmp_path / "out"
    capsys.readouterr()
    assert call("runs", tmp_path, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert (found["state"], found["step"], found["output_dir"]) == ("complete", 2, str(output))
    assert found["model"] == config.model_name_or_path.name
    assert call("verify", output) == 0
    assert call("export", output, "--to", tmp_path / "again") == 0
    ours = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    theirs = {path.name: path.read_bytes() for path in (output / "final").iterdir()}
    assert ours == theirs
    assert call("clean", output, "--yes") == 0
    assert not (output / "state").exists() and (output / "final").is_dir()
    assert call("runs", output) == 0
    assert "no runs" in capsys.readouterr().out
