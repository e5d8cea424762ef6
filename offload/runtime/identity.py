"""What a run is, as its manifests keep it: what the bytes of its records mean, and what they hold.

A resume must have the same meaning; what it differs in is named with both values. What the records hold
(`contents.py`) is for those who read the run without its model, and is not compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ConfigError
from ..export.checkpoint import persistent_buffers, pretrained_directory
from ..export.contents import CONTENTS_KEY, Contents, describe_contents
from ..store import Store
from ..tiers.records import RecordSet, store_records
from .options import RuntimeOptions

__all__ = ["check_same_run", "has_records", "run_identity"]


def run_identity(
    model: torch.nn.Module, options: RuntimeOptions, records: Mapping[str, RecordSet]
) -> dict[str, Any]:
    """Return what a new run of `model` says of itself."""
    directory = pretrained_directory(model)
    contents = Contents(
        records,
        type(model).__name__,
        None if directory is None else str(directory.resolve()),
        tuple(persistent_buffers(model)),
    )
    return {**_meaning(options, records), CONTENTS_KEY: describe_contents(contents)}


def has_records(store: Store, records: Mapping[str, RecordSet]) -> bool:
    """Return whether an open run has records of these names, so that it was cut into these units."""
    return set(store.records) == {spec.name for spec in store_records(records)}


def check_same_run(store: Store, options: RuntimeOptions, records: Mapping[str, RecordSet]) -> None:
    """Raise unless the records of an open run mean what they would mean in a new one.

    Raises:
        ConfigError: says what differs, and what the run was begun with.
    """
    wanted = _meaning(options, records)
    if store.in_place == options.commit:
        begun, meant = ("off", "False") if store.in_place else ("on", "True")
        raise ConfigError(
            f"run {store.run_id} was begun with commit: {begun}, and its records are laid out for that:"
            f" resume with commit: {begun} (commit={meant})"
        )
    # Formats first: another one makes records of other sizes, which would not say why.
    _check_same_formats(store, wanted)
    _check_same_records(store, records)
    _check_same_layout(store, wanted)


def _meaning(options: RuntimeOptions, records: Mapping[str, RecordSet]) -> dict[str, Any]:
    """Return what the bytes of the records mean: records of one size may hold other things."""
    layout = hashlib.sha256()
    for record in records.values():
        for trainable, specs in ((True, record.layout.trainable), (False, record.layout.frozen)):
            for spec in specs:
                layout.update(repr((record.owner, trainable, spec.name, spec.shape, spec.offset)).encode())
    return {
        "dtype": options.dtype,
        "moments": options.moments,
        "compute_dtype": options.compute_dtype,
        "chunk_numel": options.chunk_numel,
        "layout": layout.hexdigest(),
    }


def _check_same_formats(store: Store, wanted: Mapping[str, Any]) -> None:
    for name, found in store.identity.items():
        # Runs begun before an entry existed do not have it.
        if name != "layout" and wanted.get(name, found) != found:
            raise ConfigError(
                f"run {store.run_id} was begun with {name}={found!r:.80}, not {wanted[name]!r}, and its"
                f" records are laid out for that; resume with {name}={found!r:.80}"
            )


def _check_same_records(store: Store, records: Mapping[str, RecordSet]) -> None:
    wanted = {spec.name: spec.nbytes for spec in store_records(records)}
    found = {name: spec.nbytes for name, spec in store.records.items()}
    if wanted != found:
        differing = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        name = differing[0]
        raise ConfigError(
            f"run {store.run_id} is of another model or format: {len(differing)} records differ, the first"
            f" is {name!r} with {found.get(name, 'no')} bytes in the run and {wanted.get(name, 'no')} here;"
            " resume with the model it began with"
        )


def _check_same_layout(store: Store, wanted: Mapping[str, Any]) -> None:
    if store.identity.get("layout", wanted["layout"]) != wanted["layout"]:
        raise ConfigError(
            f"run {store.run_id} holds the same amount of other parameters: names, shapes, or what is frozen"
            " (requires_grad) differ; resume with the model it began with"
        )
