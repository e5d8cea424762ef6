"""The output directory: which run it holds, and metrics that never hold a step twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offload.errors import ConfigError, CorruptionError, StateError
from offload.training.output import OutputDirectory


def begin(path: Path, make_config) -> OutputDirectory:
    output = OutputDirectory(path)
    output.begin(make_config(), (output.state,), {"seed": 1})
    return output


def test_a_new_run_is_recorded_before_anything_else(tmp_path: Path, make_config) -> None:
    output = begin(tmp_path / "a" / "b", make_config)
    pointer = output.pointer()
    assert pointer is not None
    assert (pointer.imported, pointer.exported_step, pointer.identity) == (False, None, {"seed": 1})
    assert pointer.disk == (str(output.state),)
    assert output.state.stat().st_mode & 0o777 == 0o700


def test_what_is_noted_is_read_again(tmp_path: Path, make_config) -> None:
    output = begin(tmp_path / "a", make_config)
    pointer = output.mark_imported(output.pointer(), (Path("/mnt/b"),))
    assert output.mark_exported(pointer, 7) == output.pointer()
    assert (output.pointer().imported, output.pointer().exported_step) == (True, 7)


def test_an_abandoned_run_leaves_nothing_of_ours(tmp_path: Path, make_config) -> None:
    output = begin(tmp_path / "a" / "b", make_config)
    output.abandon(output.pointer())
    assert not (tmp_path / "a").exists()


def test_abandoning_keeps_what_others_put_there(tmp_path: Path, make_config) -> None:
    output = begin(tmp_path / "a", make_config)
    (tmp_path / "a" / "notes.txt").touch()
    output.abandon(output.pointer())
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["notes.txt"]


def test_a_run_with_a_commit_is_never_abandoned(tmp_path: Path, make_config) -> None:
    output = begin(tmp_path / "a", make_config)
    with pytest.raises(StateError, match="has committed steps"):
        output.abandon(output.mark_imported(output.pointer(), ()))


def test_an_empty_directory_holds_no_run(tmp_path: Path) -> None:
    assert OutputDirectory(tmp_path).pointer() is None
    assert OutputDirectory(tmp_path / "none").pointer() is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run_id": "x"}', '{"format": "offload-run"}'])
def test_a_damaged_pointer_is_not_taken_for_no_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CorruptionError, match=r"run\.json is damaged"):
        OutputDirectory(tmp_path).pointer()


def test_every_difference_is_listed(tmp_path: Path, make_config) -> None:
    output = begin(tmp_path / "a", make_config)
    output.check_same(output.pointer(), {"seed": 1})
    with pytest.raises(ConfigError, match="seed: 1 then, 2 now; new: None then, 3 now"):
        output.check_same(output.pointer(), {"seed": 2, "new": 3})


def test_metrics_after_the_commit_and_torn_lines_are_cut(tmp_path: Path) -> None:
    output = OutputDirectory(tmp_path)
    for step in range(5):
        output.append_metrics({"step": step})
    with open(output.metrics, "a") as file:
        file.write('{"step": 2')
    output.cut_metrics(2)
    assert [json.loads(line)["step"] for line in output.metrics.read_text().splitlines()] == [0, 1, 2]


def test_cutting_metrics_that_are_not_there_is_harmless(tmp_path: Path) -> None:
    OutputDirectory(tmp_path).cut_metrics(3)
    assert list(tmp_path.iterdir()) == []
