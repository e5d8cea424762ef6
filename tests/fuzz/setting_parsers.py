"""Harnesses over what a user, or a program in their name, writes: configuration, machine.json, data."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from fuzz.harness import Finding, Harness
from report.bench_results import machine

from offload.machine import load_machine, save_machine
from offload.training.config import load_config
from offload.training.data import find_files, read_texts

__all__ = ["HARNESSES"]

CONFIG = b"""model_name_or_path: models/small
train_file: [a.txt, b.jsonl]
output_dir: out
max_steps: 100
learning_rate: 1e-5
device_memory: 8GiB
host_memory: 512_000_000
disk: [/mnt/a, /mnt/b]
num_train_epochs: 2.5
on_non_finite: skip
save_steps: 1
lr_scheduler: cosine
seed: 7
"""


def _parse_config(data: bytes, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_bytes(data)
    config = load_config(path, {})
    # What a run writes for the user to start from again means the same.
    path.write_text(config.to_yaml(), encoding="utf-8")
    if load_config(path, {}) != config:
        raise Finding(f"the configuration is not what is written again: {config}")


def _parse_machine(data: bytes, folder: Path) -> None:
    path = folder / "machine.json"
    path.write_bytes(data)
    found = load_machine(path)
    for drive in found.drives:
        found.setting_for((drive.device,))
    found.setting_for(tuple(drive.device for drive in found.drives))
    save_machine(found, path)
    if load_machine(path) != found:
        raise Finding(f"the machine is not what is written again: {found}")


def _parse_data(data: bytes, folder: Path) -> None:
    path = folder / "data.jsonl"
    path.write_bytes(data)
    for file in find_files([str(path)]):
        for text in read_texts(file):
            text.encode("utf-8")  # what a tokenizer does first


HARNESSES = (
    Harness(name="config", kind="yaml", parse=_parse_config, seeds=lambda: [CONFIG]),
    Harness(name="machine", parse=_parse_machine, seeds=lambda: [json.dumps(asdict(machine())).encode()]),
    Harness(
        name="data",
        parse=_parse_data,
        seeds=lambda: [b'{"text": "one", "id": 1}', b'{"text": "two"}\n\n{"text": "\\u00e9"}\n'],
    ),
)
