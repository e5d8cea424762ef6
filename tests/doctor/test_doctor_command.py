"""`offload doctor` as a newcomer meets it: typos, bad paths, help, JSON, and its exit codes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from doctor_machines import DIRECTORY, SOUND, with_host

from offload.cli import main
from offload.doctor import collect
from offload.doctor.facts import DirectoryFacts, Facts, TorchFacts
from offload.sizes import GIB


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch):
    """Makes the command meet these facts, and returns the directories that it asked for."""

    def show(facts: Facts) -> list[list[str]]:
        asked: list[list[str]] = []

        def facts_of(directories: list[str]) -> Facts:
            asked.append(directories)
            return facts

        monkeypatch.setattr(collect, "collect_facts", facts_of)
        return asked

    return show


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", *arguments])
    out, err = capsys.readouterr()
    code = caught.value.code
    assert isinstance(code, int)
    return code, out, err


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        (SOUND, 0),
        (with_host(huge_pages="never"), 0),
        (with_host(swap_used_nbytes=9 * GIB), 1),
        (replace(SOUND, directories=(replace(DIRECTORY, problem="Not a directory"),)), 2),
    ],
)
def test_the_exit_code_is_that_of_the_worst(shown, capsys, facts, code):
    asked = shown(facts)
    assert call(capsys, "/mnt/nvme0", "b")[0] == code
    assert call(capsys, "--json")[0] == code
    assert asked == [["/mnt/nvme0", "b"], []]


def test_json_is_all_of_the_output(shown, capsys):
    shown(SOUND)
    code, out, err = call(capsys, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["facts"]["software"]["torch"]["cuda"] == "13.0"


def test_help_teaches_the_exit_codes_and_shows_examples(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for part in ("exit code 2", "exit code 1", "exit code 0", "--json | jq", "offload doctor /mnt/nvme0"):
        assert part in out


def test_a_mistyped_option_names_the_right_one(capsys):
    code, out, err = call(capsys, "--jsn")
    assert (code, out) == (2, "")
    assert "--json" in err


def test_an_empty_name_is_not_the_working_directory(shown, capsys):
    asked = shown(SOUND)
    code, out, err = call(capsys, "/mnt/nvme0", "")
    assert (code, out, asked) == (2, "", [])
    assert err.startswith("error: a DIR is empty")


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(directories: list[str]) -> Facts:
        raise KeyboardInterrupt

    monkeypatch.setattr(collect, "collect_facts", interrupted)
    assert call(capsys) == (130, "", "interrupted; nothing is left behind\n")


def test_a_missing_package_of_its_own_is_one_message(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "offload.doctor.screen", raising=False)
    monkeypatch.setitem(sys.modules, "rich.table", None)
    code, _, err = call(capsys)
    assert code == 2
    assert err.startswith("error: rich is not installed: python3 -m pip install rich")


def test_a_directory_that_is_not_there_is_named_with_all_that_is_known(monkeypatch, capsys, tmp_path: Path):
    """The whole command, but for the seconds that torch takes."""
    monkeypatch.setattr(collect.TorchImport, "result", lambda self, timeout_s: TorchFacts(version="9.9"))
    code, out, err = call(capsys, str(tmp_path), str(tmp_path / "gone"))
    assert (code, err) == (2, "")
    assert f"error:   {tmp_path}/gone: No such file or directory" in out
    assert f"mkdir -p {tmp_path}/gone" in out
    assert f"{tmp_path} (named)" in out
    assert list(tmp_path.iterdir()) == []


def test_a_refused_engine_does_not_speak_before_the_screen(monkeypatch, capsys, caplog, tmp_path):
    found: list[DirectoryFacts] = []
    real = collect.look_at_directory

    def look(path, origin, engine):
        found.append(real(path, origin, engine))
        return found[-1]

    monkeypatch.setenv("OFFLOAD_IO_ENGINE", "portable")
    monkeypatch.setattr(collect, "look_at_directory", look)
    monkeypatch.setattr(collect.TorchImport, "result", lambda self, timeout_s: TorchFacts(version="9.9"))
    code, out, _ = call(capsys, str(tmp_path))
    assert "portable (OFFLOAD_IO_ENGINE)" in out
    assert found[0].direct is None
    assert caplog.records == []
    assert code in (0, 1)
