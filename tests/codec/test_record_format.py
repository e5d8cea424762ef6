"""The records of a training run, byte for byte as docs/format.md shows them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from unit_records import write_parameter

from offload.codec import RecordFormat, view_optimizer_chunk
from offload.optim import Moment8bit
from offload.specs import TensorSpec, UnitLayout
from offload.tiers.records import record_sets, store_records

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text()
EXAMPLE = PAGE[PAGE.index("### Example") :]

LAYOUT = UnitLayout("layer", (TensorSpec("norm.weight", (3,), 0), TensorSpec("up.weight", (2, 1), 128)))


def rows(columns: int) -> Iterator[list[str]]:
    """The rows of the example's table with so many columns, without its head."""
    found = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in EXAMPLE.splitlines()
        if line.startswith("|") and not line.startswith("|---")
    ]
    return (row for row in [row for row in found if len(row) == columns][1:])


def documented(record: str) -> bytes:
    memory = bytearray(4096)
    for name, offset, data, _ in rows(4):
        if name == record:
            memory[int(offset) : int(offset) + len(bytes.fromhex(data))] = bytes.fromhex(data)
    return bytes(memory)


@pytest.fixture
def built() -> dict[str, bytes]:
    """The example's records, made from its table of values."""
    record_format = RecordFormat("bfloat16", moments="8bit")
    masters, exp_avg, exp_avg_sq = torch.zeros(256), torch.zeros(256), torch.zeros(256)
    for element, master, bits, first, second in rows(5):
        masters[int(element)] = float(master)
        exp_avg[int(element)], exp_avg_sq[int(element)] = float(first), float(second)
        assert f"{int(masters[int(element)].view(torch.int32)) & 0xFFFFFFFF:08x}" == bits
    weights = torch.zeros(record_format.weights_nbytes(256), dtype=torch.uint8)
    optimizer = torch.zeros(record_format.optimizer_nbytes(256), dtype=torch.uint8)
    for spec in LAYOUT.trainable:
        source = masters[spec.offset : spec.end].view(spec.shape)
        write_parameter(record_format, spec, source, weights, optimizer, 256)
    (chunk,) = record_format.optimizer_chunks(256)
    views = view_optimizer_chunk(chunk, optimizer)
    assert views.exp_avg_scales is not None and views.exp_avg_sq_scales is not None
    for moment, values in (
        (Moment8bit("exp_avg", views.exp_avg, views.exp_avg_scales), exp_avg),
        (Moment8bit("exp_avg_sq", views.exp_avg_sq, views.exp_avg_sq_scales), exp_avg_sq),
    ):
        coded = Moment8bit.of(moment.which, values)
        moment.codes.copy_(coded.codes)
        moment.scales.copy_(coded.scales)
    return {"weights": weights.numpy().tobytes(), "optimizer": optimizer.numpy().tobytes()}


@pytest.mark.parametrize("record", ["weights", "optimizer"])
def test_the_documented_records_are_those_that_are_written(record: str, built: dict[str, bytes]) -> None:
    assert any(built[record])
    assert built[record] == documented(record)


def test_the_documented_values_are_what_the_codes_stand_for() -> None:
    told = re.search(r"stand for (.*), (.*) and (.*), and for (.*), (.*) and (.*)\.\n", EXAMPLE)
    assert told is not None
    (chunk,) = RecordFormat("bfloat16", moments="8bit").optimizer_chunks(256)
    views = view_optimizer_chunk(chunk, memoryview(bytearray(documented("optimizer"))))
    assert views.exp_avg_scales is not None and views.exp_avg_sq_scales is not None
    values = torch.cat(
        [
            Moment8bit("exp_avg", views.exp_avg, views.exp_avg_scales).values()[[0, 1, 128]],
            Moment8bit("exp_avg_sq", views.exp_avg_sq, views.exp_avg_sq_scales).values()[[0, 1, 128]],
        ]
    )
    assert values.tolist() == pytest.approx([float(text) for text in told.groups()], rel=1e-4)


def test_the_documented_names_and_lengths_are_those_of_the_store() -> None:
    assert LAYOUT.trainable_numel == 256
    sets = record_sets([LAYOUT], RecordFormat("bfloat16", moments="8bit"), torch.float32)
    assert [(spec.name, spec.nbytes) for spec in store_records(sets)] == [
        ("layer:weights", 4096),
        ("layer:optimizer", 4096),
    ]
    for name in ("weights", "optimizer", "frozen"):
        assert f"| `<unit>:{name}` |" in PAGE
