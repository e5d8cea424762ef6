"""A run, its resume, its checks and its exports read and write no pickle, and put no secret into a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Everything after the imports, which themselves run no code of ours: torch's own modules use pickle's names.
SCRIPT = """
import pickle, sys
from pathlib import Path
import torch
from toy_models import SETTINGS, build, train
import offload
from offload.aio import open_engine
from offload.export.contents import read_contents
from offload.export.run import export_run
from offload.store import RunReader, fall_back, list_runs, verify_reader

seen = []

def listen(event, arguments):
    if event == "pickle.find_class":
        seen.append(event)
    if event == "open" and str(arguments[0]).endswith((".pkl", ".pt", ".pth", ".bin")):
        if not str(arguments[0]).endswith("data.bin"):
            seen.append(f"open {arguments[0]}")

def refuse(*arguments, **settings):
    seen.append("pickle")
    raise AssertionError("pickle was used")

drive, work = Path(sys.argv[1]), Path(sys.argv[2])
for name in ("rng_state.pth", "optimizer.pt", "pytorch_model.bin", "training_args.bin"):
    for directory in (drive, work):
        (directory / name).write_bytes(b"cposix\\nsystem\\n(S'touch canary'\\ntR.")
settings = {**SETTINGS, "disk": [drive]}
model, again = build("mlp"), build("mlp")  # torch's parametrizations copy modules by pickle's protocol
sys.addaudithook(listen)
for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
    setattr(pickle, name, refuse)
torch.save = torch.load = refuse
torch.manual_seed(7)
with offload.attach(model, **settings) as runtime:
    train("mlp", runtime, model, range(3))
    run_id = runtime.run_id
    runtime.export(work / "runtime")
with offload.attach(again, **settings, run_id=run_id, resume=True) as runtime:
    train("mlp", runtime, again, range(3, 4))
with open_engine("threads") as engine:
    with RunReader.open([drive], engine=engine, run_id=run_id) as reader:
        assert verify_reader(reader).ok
        export_run(reader.newest, read_contents(reader.newest.identity), work / "closed")
    fall_back([drive], engine=engine, run_id=run_id)
assert list_runs(drive)[0].problem is None
print("seen", seen)
"""


def test_nothing_is_pickled_and_no_secret_is_written(tmp_path: Path) -> None:
    drive, work = tmp_path / "drive", tmp_path / "work"
    drive.mkdir()
    work.mkdir()
    canary = "hf_canaryCANARYcanary0123456789"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "tests"),
        "HF_TOKEN": canary,
        "WANDB_API_KEY": canary,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(drive), str(work)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "seen []"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 8
    assert not [path for path in written if canary.encode() in path.read_bytes()]
    assert canary not in done.stdout + done.stderr
