"""`offload runs`, `verify`, `export` and `clean` over small real runs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from runs_cases import begin, call, flip, point
from safetensors.torch import load_file

from offload.aio import open_engine
from offload.export.folder import work_folder
from offload.store import RunReader, Store


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No colours, wide enough that no word is broken, and an environment that the test gives back."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


@pytest.fixture
def drives(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    return paths


@pytest.fixture
def run(drives: list[Path]) -> str:
    return begin(drives)


def tree(*roots: Path) -> dict[str, object]:
    """Names and contents below `roots`; of a lock only the name, since it holds who came last."""
    found: dict[str, object] = {}
    for root in roots:
        for path in sorted(root.rglob("*")):
            link = os.readlink(path) if path.is_symlink() else None
            found[str(path)] = link or (path.is_file() and path.name != "lock" and path.read_bytes())
    return found


# -- runs --------------------------------------------------------------------------------------------


def test_runs_are_listed(capsys, drives, run):
    before = tree(*drives)
    code, out, _ = call(capsys, "runs", *drives)
    assert code == 0
    header, row, folders = out.splitlines()
    assert header.split() == ["run", "model", "step", "generation", "size", "committed", "state"]
    assert row.split()[:4] == [run, "Sequential", "2", "3"]
    assert row.endswith("complete")
    assert folders == f"  folders: {drives[0]}/run-{run}, {drives[1]}/run-{run}"
    assert tree(*drives) == before


def test_runs_for_other_programs(capsys, drives, run):
    code, out, _ = call(capsys, "runs", "--json", *drives)
    (found,) = json.loads(out)["runs"]
    assert (code, found["run_id"], found["state"], found["step"], found["generation"]) == (
        0,
        run,
        "complete",
        2,
        3,
    )
    assert [folder["drive"] for folder in found["folders"]] == [0, 1]
    assert (found["snapshots"], found["pid"], found["nbytes"] > 0) == ([], None, True)


@pytest.mark.parametrize("argument", ["output", "parent", "folder"])
def test_a_run_is_found_by_what_names_it(capsys, tmp_path, drives, run, argument):
    output = point(tmp_path / "outputs" / "first", run, drives, model_name_or_path="/models/Smol")
    named = {"output": output, "parent": output.parent, "folder": drives[0] / f"run-{run}"}[argument]
    _, out, _ = call(capsys, "runs", "--json", named)
    (found,) = json.loads(out)["runs"]
    assert found["run_id"] == run
    assert found["state"] == ("drive missing" if argument == "folder" else "complete")
    if argument != "folder":
        assert (found["output_dir"], found["model"]) == (str(output), "Smol")


def test_an_output_directory_whose_run_is_gone_says_so(capsys, tmp_path, run, drives):
    missing = "00010203-0405-4607-8809-0a0b0c0d0e0f"
    output = point(tmp_path / "out", missing, [tmp_path / "unmounted"])
    code, out, _ = call(capsys, "runs", output)
    assert (code, f"nothing of it is in {tmp_path}/unmounted" in out) == (0, True)


def test_a_run_in_use_and_a_directory_without_runs(capsys, tmp_path, drives, run):
    with open_engine("threads") as engine, Store.open(drives, engine=engine, run_id=run):
        _, out, _ = call(capsys, "runs", *drives)
    assert f"being used by process {os.getpid()}" in out
    (tmp_path / "empty").mkdir()
    assert call(capsys, "runs", tmp_path / "empty")[1] == f"no runs in {tmp_path}/empty\n"


@pytest.mark.parametrize("command", ["runs", "verify", "export", "clean"])
def test_a_directory_that_is_not_there_is_one_message(capsys, tmp_path, command):
    more = ["--to", tmp_path / "x"] if command == "export" else []
    code, out, err = call(capsys, command, tmp_path / "gone", *more)
    assert (code, out) == (74, "")
    assert err.startswith(f"error: {tmp_path}/gone is not a directory")


def test_names_cannot_steer_a_terminal(capsys, tmp_path, drives):
    evil = tmp_path / "a\x1b[2J"
    evil.mkdir()
    begin([evil])
    _, out, _ = call(capsys, "runs", evil)
    assert "\x1b" not in out


# -- verify ------------------------------------------------------------------------------------------


def test_a_sound_run_verifies(capsys, drives, run):
    before = tree(*drives)
    code, out, _ = call(capsys, "verify", *drives)
    assert code == 0
    assert f"run {run} (Sequential, step 2)" in out
    assert "generation 3 is whole" in out
    assert tree(*drives) == before


def spoil(drives: list[Path], run: str, record: str, *, generation: str = "newest") -> tuple[str, int]:
    """Flip a bit in a record's first chunk; return the file and where the chunk begins."""
    with open_engine("threads") as engine, RunReader.open(drives, engine=engine, run_id=run) as reader:
        _, path, offset = getattr(reader, generation).place(record, 0)
    flip(Path(path), offset + 11, 3)
    return path, offset


def test_damage_is_named_with_its_tensor_and_the_way_back(capsys, drives, run):
    path, offset = spoil(drives, run, "1:weights")
    code, out, _ = call(capsys, "verify", *drives)
    assert code == 76
    assert "generation 3 is damaged in 1 chunks:" in out
    assert f"{path}, offset {offset:,}: chunk 0 of 1:weights (1.0.weight" in out
    assert "the generation before is whole: 'offload verify " in out
    code, out, _ = call(capsys, "verify", "--json", *drives)
    (found,) = json.loads(out)["runs"]
    (damaged,) = found["newest"]["damaged"]
    assert (code, damaged["path"], damaged["offset_bytes"]) == (76, path, offset)
    assert (damaged["unit"], damaged["record"], damaged["chunk"]) == ("1", "1:weights", 0)
    assert damaged["tensors"][0] == "1.0.weight"
    assert (found["older"]["generation"], found["older"]["damaged"]) == (2, [])


def test_a_run_goes_back_and_says_so(capsys, drives, run):
    spoil(drives, run, "1:weights")
    code, out, _ = call(capsys, "verify", "--fall-back", *drives)
    assert code == 0
    assert "gone back: generation 4 is generation 2 again, step 1; the run goes on from there" in out
    assert call(capsys, "verify", *drives)[0] == 0
    assert json.loads(call(capsys, "runs", "--json", *drives)[1])["runs"][0]["step"] == 1


def test_nothing_to_go_back_to(capsys, drives, run):
    spoil(drives, run, "1:weights")
    spoil(drives, run, "1:weights", generation="older")
    code, out, err = call(capsys, "verify", *drives)
    assert (code, "there is no whole generation before it" in out) == (76, True)
    code, out, err = call(capsys, "verify", "--fall-back", *drives)
    assert (code, "is damaged too" in err) == (76, True)


def test_a_damaged_manifest_is_named(capsys, drives, run):
    flip(drives[1] / f"run-{run}" / "manifest-3", 200)
    code, out, _ = call(capsys, "verify", *drives)
    assert code == 76
    assert f"damaged: {drives[1]}/run-{run}/manifest-3 fails its checksum" in out
    assert "mends that" in out


def test_a_run_in_use_is_not_checked(capsys, drives, run):
    with open_engine("threads") as engine, Store.open(drives, engine=engine, run_id=run):
        code, out, _ = call(capsys, "verify", *drives)
    assert (code, f"locked by process {os.getpid()}" in out) == (74, True)


def test_one_of_several_runs_is_chosen_by_its_id(capsys, drives, run):
    other = begin(drives, steps=1)
    spoil(drives, other, "1:weights")
    assert call(capsys, "verify", *drives)[0] == 76
    assert call(capsys, "verify", *drives, "--run", run[:8])[0] == 0
    code, _, err = call(capsys, "verify", *drives, "--fall-back")
    assert (code, "holds 2 runs: say which with --run" in err) == (2, True)
    code, _, err = call(capsys, "verify", *drives, "--run", "0000000")
    assert (code, "no run whose id begins with 0000000" in err) == (2, True)
    code, _, err = call(capsys, "verify", *drives, "--run", run[:2])
    assert (code, "4 characters" in err) == (2, True)


# -- export ------------------------------------------------------------------------------------------


def test_a_run_is_exported_with_its_models_files(capsys, tmp_path, drives, run):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"dtype": "bfloat16", "mine": 1}))
    (model / "tokenizer.json").write_text("{}")
    output = point(tmp_path / "out", run, drives, model_name_or_path=str(model))
    before = tree(*drives)
    code, out, _ = call(capsys, "export", output, "--to", tmp_path / "final")
    assert (code, f"the model is in {tmp_path}/final" in out) == (0, True)
    assert tree(*drives) == before
    assert json.loads((tmp_path / "final" / "config.json").read_text()) == {"dtype": "bfloat16", "mine": 1}
    assert (tmp_path / "final" / "tokenizer.json").exists()
    (value,) = {str(tensor.dtype) for tensor in load_file(tmp_path / "final/model.safetensors").values()}
    assert value == "torch.bfloat16"


def test_an_export_in_shards_and_another_dtype(capsys, tmp_path, drives, run):
    flags = ["--dtype", "float16", "--max-shard-size", "6KiB"]
    code, _, err = call(capsys, "export", *drives, "--to", tmp_path / "final", *flags)
    assert (code, "without config.json" in err) == (0, True)
    index = json.loads((tmp_path / "final" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--dtype", "bfloat17"], 2, "'bfloat17' is none of bfloat16"),
        (["--max-shard-size", "huge"], 2, "--max-shard-size"),
        (["--model", "/nonexistent"], 2, "has no config.json"),
        (["--run", "ffffffff"], 2, "no run whose id begins"),
    ],
)
def test_a_mistake_in_an_export_is_one_message(capsys, tmp_path, drives, run, flags, code, message):
    got, _, err = call(capsys, "export", *drives, "--to", tmp_path / "final", *flags)
    assert (got, message in err, (tmp_path / "final").exists()) == (code, True, False)


def test_an_export_refuses_what_it_must_not_touch(capsys, tmp_path, drives, run):
    folder = drives[0] / f"run-{run}"
    code, _, err = call(capsys, "export", *drives, "--to", folder / "final")
    assert (code, "the run's own folder" in err) == (2, True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    code, _, err = call(capsys, "export", *drives, "--to", tmp_path / "mine")
    assert (code, "thesis.tex" in err) == (2, True)
    with open_engine("threads") as engine, Store.open(drives, engine=engine, run_id=run):
        code, _, err = call(capsys, "export", *drives, "--to", tmp_path / "final")
    assert (code, "is locked by process" in err) == (74, True)


def test_a_damaged_run_is_exported_from_the_generation_before(capsys, tmp_path, drives, run):
    spoil(drives, run, "1:weights")
    code, _, err = call(capsys, "export", *drives, "--to", tmp_path / "final")
    assert (code, "checksum mismatch" in err, (tmp_path / "final").exists()) == (76, True, False)
    code, out, _ = call(capsys, "export", *drives, "--to", tmp_path / "final", "--older")
    assert (code, "generation 2, step 1" in out) == (0, True)


# -- clean -------------------------------------------------------------------------------------------


def test_runs_are_removed_after_asking(capsys, drives, run, monkeypatch):
    before = tree(*drives)
    code, _, err = call(capsys, "clean", *drives)
    assert (code, "add --yes" in err, tree(*drives) == before) == (2, True, True)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    code, out, _ = call(capsys, "clean", *drives)
    assert (code, "nothing was removed" in out, tree(*drives) == before) == (1, True, True)
    code, out, _ = call(capsys, "clean", *drives, "--yes")
    assert (code, f"run {run} (Sequential, step 2, " in out, tree(*drives)) == (0, True, {})


def test_only_leftovers_are_removed(capsys, tmp_path, drives, run):
    before = tree(*drives)
    for kind in ("tmp", "old"):
        left = drives[0] / f".final.offload-{kind}"
        left.mkdir()
        (left / "offload_export.json").write_text('{"format": "offload-export", "files": ["a.safetensors"]}')
        (left / "a.safetensors").write_bytes(b"half")
    blank = drives[1] / "run-00010203-0405-4607-8809-0a0b0c0d0e0f"
    blank.mkdir(mode=0o700)
    code, out, _ = call(capsys, "clean", *drives, "--leftovers", "--yes")
    assert (code, "removed 3 of 3" in out, tree(*drives) == before) == (0, True, True)
    assert call(capsys, "clean", *drives, "--leftovers", "--yes")[1] == "nothing to remove\n"


def test_a_foreign_file_keeps_a_run_and_is_named(capsys, drives, run):
    (drives[1] / f"run-{run}" / "thesis.tex").write_text("years")
    left = drives[0] / ".final.offload-tmp"
    left.mkdir()
    (left / "photo.jpg").write_text("mine")
    before = tree(*drives)
    code, out, _ = call(capsys, "clean", *drives, "--yes")
    assert code == 0
    assert "thesis.tex" in out and "photo.jpg" in out and "nothing to remove" in out
    assert tree(*drives) == before


def test_a_run_in_use_is_kept(capsys, drives, run):
    with open_engine("threads") as engine, Store.open(drives, engine=engine, run_id=run):
        code, out, _ = call(capsys, "clean", *drives, "--yes")
        assert (code, f"being used by process {os.getpid()}" in out) == (0, True)
    assert call(capsys, "verify", *drives)[0] == 0


def test_an_export_that_is_being_written_is_kept(capsys, drives):
    with work_folder(drives[0] / "final") as work:
        code, out, _ = call(capsys, "clean", drives[0], "--yes")
        assert (code, "is being written by another process" in out) == (0, True)
        assert work.is_dir()


def test_links_are_not_followed(capsys, tmp_path, drives, run):
    kept = tmp_path / "kept"
    (drives[0] / f"run-{run}").rename(kept)
    (drives[0] / f"run-{run}").symlink_to(kept)
    export = tmp_path / "export"
    export.mkdir()
    (export / "offload_export.json").write_text('{"format": "offload-export", "files": ["a"]}')
    (export / "a").write_text("mine")
    (drives[0] / ".final.offload-tmp").symlink_to(export)
    before = tree(tmp_path)
    call(capsys, "clean", *drives, "--yes")
    assert tree(tmp_path) == before


def test_a_run_with_a_missing_drive_is_removed_only_by_its_name(capsys, drives, run):
    before = tree(*drives)
    code, out, _ = call(capsys, "clean", drives[0], "--yes")
    assert (code, "--run" in out, tree(*drives) == before) == (0, True, True)
    assert call(capsys, "clean", drives[0], "--yes", "--run", run)[0] == 0
    assert list(drives[0].iterdir()) == [] and list(drives[1].iterdir()) != []


def test_an_output_directory_loses_its_state_and_keeps_its_results(capsys, tmp_path):
    state = tmp_path / "out" / "state"
    output = tmp_path / "out"
    state.mkdir(parents=True)
    run = begin([state])
    point(tmp_path / "made", run, [state])
    (tmp_path / "made" / "run.json").rename(output / "run.json")
    (output / "metrics.jsonl").write_text("{}\n")
    (output / "final").mkdir()
    code, out, _ = call(capsys, "clean", output, "--yes")
    assert (code, f"run {run} of {output}" in out) == (0, True)
    assert sorted(path.name for path in output.iterdir()) == ["final", "metrics.jsonl"]


@pytest.mark.parametrize("place", ["drive", "out/state"])
def test_an_output_directory_none_of_whose_drives_is_there(capsys, tmp_path, place):
    """What names a run on drives that are not mounted is all that leads to it; within, it is gone."""
    drive, output = tmp_path / place, tmp_path / "out"
    drive.mkdir(parents=True)
    run = begin([drive])
    point(tmp_path / "made", run, [drive])
    output.mkdir(exist_ok=True)
    (tmp_path / "made" / "run.json").rename(output / "run.json")
    drive.rename(tmp_path / "away")
    code, out, _ = call(capsys, "clean", output, "--yes", "--run", run)
    assert (code, (output / "run.json").exists()) == (0, place == "drive")
    if place == "drive":
        assert f"kept: run {run} of {output}: nothing of it is in {drive}" in out
        assert f"remove {output}/run.json where they are gone for good" in out
        (tmp_path / "away").rename(drive)
        assert call(capsys, "verify", output)[0] == 0


def copied(tmp_path: Path, state: Path) -> tuple[str, Path, Path]:
    """Train in an output directory and copy it; return the run's id and both."""
    original, copy = tmp_path / "original", tmp_path / "copy"
    state.mkdir(parents=True)
    run_id = begin([state])
    pointer = json.loads((point(tmp_path / "written", run_id, [state]) / "run.json").read_text())
    pointer["directory"] = str(original)
    original.mkdir(exist_ok=True)
    (original / "run.json").write_text(json.dumps(pointer))
    shutil.rmtree(tmp_path / "written")
    shutil.copytree(original, copy)
    return run_id, original, copy


@pytest.mark.parametrize("order", ["copy", "copy first", "original first"])
def test_a_copy_with_shared_drives_never_removes_the_originals_run(capsys, tmp_path, order):
    run_id, original, copy = copied(tmp_path, tmp_path / "drive")
    named = {"copy": [copy], "copy first": [copy, original], "original first": [original, copy]}[order]
    code, out, _ = call(capsys, "clean", "--yes", *named)
    assert code == 0
    assert (tmp_path / "drive" / f"run-{run_id}").exists() == (order == "copy")
    assert (copy / "run.json").exists()
    if order == "copy":
        assert f"{copy} is a copy of {original}, whose run this is" in out


def test_a_copy_with_its_state_within_is_a_run_of_its_own(capsys, tmp_path):
    run_id, original, copy = copied(tmp_path, tmp_path / "original" / "state")
    code, out, _ = call(capsys, "runs", "--json", tmp_path)
    listed = json.loads(out)["runs"]
    assert code == 0
    assert {run["output_dir"]: [folder["path"] for folder in run["folders"]] for run in listed} == {
        str(output): [str(output / "state" / f"run-{run_id}")] for output in (original, copy)
    }
    assert call(capsys, "clean", "--yes", copy)[0] == 0
    assert not (copy / "state").exists()
    assert (original / "state" / f"run-{run_id}").exists()
    assert call(capsys, "verify", original)[0] == 0


def test_a_moved_output_directory_has_its_run_with_it(capsys, tmp_path):
    _, original, copy = copied(tmp_path, tmp_path / "original" / "state")
    shutil.rmtree(original)
    assert call(capsys, "verify", copy)[0] == 0
    assert call(capsys, "clean", "--yes", copy)[0] == 0
    assert not (copy / "state").exists()
