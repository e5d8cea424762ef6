"""What the planted bugs found: no other test met a fetch of a record that is being updated."""

from __future__ import annotations

from pathlib import Path

from toy_models import SETTINGS, build

import offload


def test_a_record_under_update_is_not_fetched_before_its_update_ends(tmp_path: Path) -> None:
    with offload.attach(build("mlp"), disk=[tmp_path], max_grad_norm=1.0, **SETTINGS) as runtime:
        transfer = runtime._parts.transfer
        updated, other, *_ = runtime._parts.records
        transfer.begin_updates([updated])
        # Its lock is held, so that the fetch thread cannot answer before this test does.
        with transfer._changed:
            transfer._queue.extend([updated, other])
            assert transfer._next_to_read(block=False) == other
            transfer._queue.remove(other)
            assert transfer._next_to_read(block=False) is None
            transfer._updating.discard(updated)
            assert transfer._next_to_read(block=False) == updated
            transfer._queue.clear()
