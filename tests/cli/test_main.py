"""The command line: one message, the right exit code, help that names every key."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from offload.cli import main
from offload.training.config import ALIASES, ELSEWHERE, FinetuneConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No colours, wide enough that no word is broken, and an environment that the test gives back."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    code = caught.value.code
    assert isinstance(code, int)
    return code, out, err


def test_help_names_every_key_and_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "finetune", "--help")
    assert code == 0
    for name, field in FinetuneConfig.model_fields.items():
        assert f"--{name} " in out
        assert " ".join((field.description or "").split()) in " ".join(out.split())
    assert not any(f"--{name} " in out for name in (*ALIASES, *ELSEWHERE))


def test_help_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert (code, "finetune" in out) == (0, True)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--version")
    assert (code, out.startswith("offload")) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["finetun"], 2, "Did you mean 'finetune'?"),
        (["finetune", "--learnin_rate", "1"], 2, "--learning_rate"),
        (["finetune", "--learning-rat", "1"], 2, "--learning_rate"),
        (["finetune", "--save_total_limit", "1"], 2, ELSEWHERE["save_total_limit"]),
        (["finetune", "none.yaml"], 2, "error: cannot read the configuration none.yaml: No such file"),
        (["finetune", "--seed", "x"], 2, "seed: 'x' should be a valid integer"),
        (["finetune"], 2, "error: model_name_or_path is missing"),
    ],
)
def test_a_mistake_is_one_message_with_its_exit_code(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    got, out, err = call(capsys, *arguments)
    assert (got, message in err, "Traceback" in err, out) == (code, True, False, "")


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "finetune", "none.yaml", "--debug")
    assert (code, "Traceback" in err, "error: cannot read" in err) == (2, True, True)


@pytest.mark.parametrize("code", [0, 130])
def test_flags_reach_the_run_and_its_exit_code_comes_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    seen: list[FinetuneConfig] = []

    def finetune(config: FinetuneConfig) -> SimpleNamespace:
        seen.append(config)
        return SimpleNamespace(exit_code=code)

    monkeypatch.setattr("offload.training.finetune.finetune", finetune)
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\noutput_dir: o\nseed: 5\n")
    flags = ["--train-file", "a", "--train_file", "b", "--max-length=64"]
    got, _, _ = call(capsys, "finetune", str(path), *flags, "--disk", "/x")
    assert got == code
    assert (seen[0].train_file, seen[0].max_length, seen[0].seed) == (["a", "b"], 64, 5)
    assert seen[0].disk == [Path("/x")]


def test_ctrl_c_outside_the_loop_is_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def finetune(config: FinetuneConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("offload.training.finetune.finetune", finetune)
    flags = ["--model_name_or_path", "m", "--train_file", "t", "--output_dir", "o"]
    code, _, err = call(capsys, "finetune", *flags)
    assert (code, err) == (130, "interrupted; run the same command again to go on\n")


def test_the_environment_is_set_before_torch_is_imported() -> None:
    script = (
        "import os, sys\nfrom offload.cli import main\n"
        "try:\n    main(['finetune', '--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules\nassert 'transformers' not in sys.modules\n"
        "print(os.environ['HF_HUB_OFFLINE'])\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1"
