"""Harnesses over a whole run and what an output directory says of one.

`run` and `resume` get every small file of a run at once, as one JSON object: the bodies of its ownership
file, manifests and snapshot are framed with right checksums, so that they are believed.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from fuzz.harness import Finding, Harness
from fuzz.store_parsers import framed
from toy_models import SETTINGS, build, train

import offload
from offload.aio import open_engine
from offload.export.contents import read_contents, tensors_at
from offload.export.folder import MARKER_NAME, check_export_target, remove_export
from offload.export.run import export_run
from offload.runtime import measured
from offload.runtime.resume_point import read_resume_point
from offload.runtime.rng import capture_rng, restore_rng
from offload.store import RunReader, find_runs, verify_reader
from offload.training.output import OutputDirectory
from offload.training.pointer import read_pointer

__all__ = ["HARNESSES"]

KINDS = {"O": "offload-run", "m": "offload-manifest", "s": "offload-snapshot"}
SMALL = {**SETTINGS, "chunk_numel": 1024, "queue_depth": 4, "segment_nbytes": 1 << 20}


@functools.cache
def _template() -> tuple[str, dict[str, bytes]]:
    """Return the id and the files of a run of two generations and a snapshot."""
    model = build("mlp")
    with tempfile.TemporaryDirectory() as name:
        with offload.attach(model, **SMALL, disk=[name]) as runtime:
            train("mlp", runtime, model, range(1))
            runtime.synchronize()
            runtime.snapshot("a")
            run_id = runtime.run_id
        assert run_id is not None
        return run_id, {path.name: path.read_bytes() for path in (Path(name) / f"run-{run_id}").iterdir()}


def _small_files() -> list[bytes]:
    files = {name: data for name, data in _template()[1].items() if not name.endswith(".bin")}
    return [
        json.dumps(
            {name: json.loads(data.partition(b"\n")[2] or data) for name, data in files.items()}
        ).encode()
    ]


def _place(data: bytes, folder: Path) -> tuple[Path, str]:
    """Write a run whose small files are those of `data`; return its drive and its id."""
    run_id, files = _template()
    drive = folder / "drive"
    shutil.rmtree(folder / "export", ignore_errors=True)
    shutil.rmtree(drive, ignore_errors=True)
    inside = drive / f"run-{run_id}"
    inside.mkdir(parents=True)
    inside.chmod(0o700)
    try:
        given = json.loads(data)
    except (ValueError, RecursionError):
        given = None
    for name, sound in files.items():
        content = sound
        if not name.endswith(".bin") and isinstance(given, dict):
            if name not in given:
                continue
            body = json.dumps(given[name]).encode("utf-8", "surrogatepass")
            content = framed(KINDS[name[0]], body) if name[0] in KINDS else body
        elif name.startswith("manifest") and given is None:
            content = framed(KINDS["m"], data)
        path = inside / name
        path.write_bytes(content)
        path.chmod(0o600)
    return drive, run_id


def _parse_run(data: bytes, folder: Path) -> None:
    """Do to a run everything that needs no model: list, open, verify, export."""
    drive, run_id = _place(data, folder)
    find_runs([drive])
    with open_engine("threads") as engine, RunReader.open([drive], engine=engine, run_id=run_id) as reader:
        contents = read_contents(reader.newest.identity)
        for chunk in verify_reader(reader).newest.damaged:
            tensors_at(contents.records, chunk.record, chunk.begin, chunk.end)
        export_run(reader.newest, contents, folder / "export")


def _parse_resume(data: bytes, folder: Path) -> None:
    """Go on with a run, go back to its snapshot, and train a step."""
    drive, run_id = _place(data, folder)
    model = build("mlp")
    # Speeds of drives are looked up there, and there are none.
    here = mock.patch.object(measured, "default_machine_path", return_value=folder / "machine.json")
    with here, offload.attach(model, **SMALL, disk=[drive], run_id=run_id, resume=True) as runtime:
        runtime.restore("a")
        train("mlp", runtime, model, range(1, 2))


def _identities() -> list[bytes]:
    return [json.dumps(json.loads(_small_files()[0])["manifest-1"]["identity"]).encode()]


def _loads(data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return {}


def _parse_contents(data: bytes, folder: Path) -> None:
    identity = _loads(data)
    if not isinstance(identity, dict):
        return
    contents = read_contents(identity)
    for owner, record in contents.records.items():
        if not 0 <= record.weights_nbytes + record.optimizer_nbytes + record.frozen_nbytes < 1 << 62:
            raise Finding(f"{owner} has impossible sizes")
        for kind in ("weights", "frozen", "optimizer"):
            tensors_at({owner: record}, f"{owner}:{kind}", 0, 4096)


def _states() -> list[bytes]:
    state = {"step": 3, "rng": capture_rng(), "user": {"step": 3, "batches": 3}, "rollbacks": 0}
    return [json.dumps(state).encode()]


def _parse_state(data: bytes, folder: Path) -> None:
    state = _loads(data)
    if not isinstance(state, dict):
        return
    point = read_resume_point(state, "run x")
    restore_rng(point.rng)
    # More than a period of words of each generator, and what a pair of normals keeps.
    for _ in range(700):
        random.getrandbits(32)
    random.gauss(0.0, 1.0)
    np.random.bytes(4 * 700)
    np.random.standard_normal(3)
    torch.randint(1 << 31, (700,))
    torch.randn(20)
    json.dumps(capture_rng(), allow_nan=False)


def _parse_pointer(data: bytes, folder: Path) -> None:
    (folder / "run.json").write_bytes(data)
    pointer = read_pointer(folder)
    if pointer is not None:
        OutputDirectory(folder).mark_exported(pointer, 7)
        again = read_pointer(folder)
        if again is None or (again.run_id, again.disk, again.exported_step) != (
            pointer.run_id,
            pointer.disk,
            7,
        ):
            raise Finding(f"the pointer is not what is written again: {pointer}, {again}")


def _pointers() -> list[bytes]:
    pointer = {
        "format": "offload-run",
        "version": 1,
        "run_id": "00010203-0405-4607-8809-0a0b0c0d0e0f",
        "disk": ["/mnt/a", "/mnt/b"],
        "identity": {"model_name_or_path": "/models/small", "seed": 7, "val_size": 0.1},
        "imported": True,
        "exported_step": None,
    }
    return [json.dumps(pointer).encode(), json.dumps({**pointer, "exported_step": 4}).encode()]


def _parse_metrics(data: bytes, folder: Path) -> None:
    output = OutputDirectory(folder)
    output.metrics.write_bytes(data)
    output.cut_metrics(5)
    # As the loop reads them: the spike detector, the evaluation, the report at the end.
    for record in output.read_metrics():
        if not 0 <= record["step"] <= 5:
            raise Finding(f"a record of step {record['step']} was not cut")
        if "loss" in record:
            json.dumps([float(record[key]) for key in ("loss", "seconds", "num_tokens")])
    output.append_metrics({"step": 6, "loss": 1.0})


def _metrics() -> list[bytes]:
    records = [
        {
            "step": step,
            "loss": 1.5,
            "seconds": 0.5,
            "num_tokens": 64,
            "disk_read_nbytes": 4,
            "disk_written_nbytes": 4,
        }
        for step in range(1, 7)
    ]
    lines = [json.dumps(record) for record in (*records, {"step": 6, "eval_loss": 1.5})]
    return ["".join(line + "\n" for line in lines).encode(), lines[0].encode() + b"\n"]


def _parse_marker(data: bytes, folder: Path) -> None:
    target = folder / "export"
    target.mkdir(exist_ok=True)
    (target / MARKER_NAME).write_bytes(data)
    (target / "config.json").write_bytes(b"{}")
    check_export_target(target)
    remove_export(target)
    if target.exists():
        raise Finding("an export that could be replaced was not removed")


HARNESSES = (
    Harness(name="run", parse=_parse_run, seeds=_small_files),
    Harness(name="resume", parse=_parse_resume, seeds=_small_files),
    Harness(name="contents", parse=_parse_contents, seeds=_identities),
    Harness(name="state", parse=_parse_state, seeds=_states),
    Harness(name="pointer", parse=_parse_pointer, seeds=_pointers),
    Harness(name="metrics", kind="yaml", refuses=False, parse=_parse_metrics, seeds=_metrics),
    Harness(
        name="marker",
        parse=_parse_marker,
        seeds=lambda: [b'{"files": ["config.json"], "format": "offload-export", "version": 1}'],
    ),
)
