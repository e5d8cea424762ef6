"""A trained model as a plain Hugging Face directory, written tensor by tensor.

The directory holds config.json, the tokenizer's files and safetensors with an index when there are
several shards; transformers loads it where `offload` is not installed.

Invariants:
- An export appears whole or not at all: it is written to a sibling directory, synced and renamed.
- Memory is bounded by the unit the caller hands over plus one conversion chunk: `shards.py` plans
  the place of every tensor from its shape, so it is written there the moment it arrives.
- Only what an earlier export wrote (its marker lists the files) is ever replaced or removed.

Thread rule: two threads may not export to the same directory. It does not know the store, the
runtime or transformers; what else belongs to a resume point is in `rng.py`.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..errors import DiskFullError, StateError, StorageError
from ..sizes import format_bytes
from .folder import MARKER_NAME, check_export_target, mark, sync_path, work_folder, write_json
from .shards import Shard, header_bytes, plan_shards

__all__ = [
    "MARKER_NAME",
    "ExportOptions",
    "check_export_target",
    "export",
    "persistent_buffers",
    "pretrained_directory",
    "write_json",
]

INDEX_NAME = "model.safetensors.index.json"

# 4 Mi elements: 16 MiB of fp32, large enough that a write costs its bandwidth and not its call.
CHUNK_NUMEL = 4 << 20

# What a tokenizer or a generation default may be called in a model directory.
ASSET_PATTERNS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "chat_template.json",
    "spiece.model",
    "sentencepiece*.model",
)


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How an export is written.

    Attributes:
        dtype: of the parameters in the files; None keeps the dtype named by the config of
            `assets_from` or of the model, and float32 where neither names one. Buffers keep theirs.
        max_shard_nbytes: largest safetensors file; a larger single tensor gets a file of its own.
            5 GB is what transformers writes on machines with little memory.
        assets_from: the model directory from which config.json and the tokenizer files are copied.
            None takes the one a transformers model was loaded from, and where there is none, the
            config of the model object, if it has one.
    """

    dtype: torch.dtype | None = None
    max_shard_nbytes: int = 5 * 10**9
    assets_from: Path | None = None


def export(
    directory: str | os.PathLike[str],
    units: Iterable[tuple[str, Mapping[str, torch.Tensor]]],
    shapes: Mapping[str, Sequence[int]],
    *,
    model: torch.nn.Module | None = None,
    options: ExportOptions | None = None,
    on_written: Callable[[int], None] | None = None,
) -> Path:
    """Write a model directory that `from_pretrained` loads where offload is not installed.

    Args:
        directory: must not exist, be empty, or be an earlier export of ours, which is replaced.
        units: (unit name, {parameter name: value}); consumed one unit at a time, values on any
            device, borrowed until the next unit is asked for.
        shapes: every parameter's full name and shape, in the order the files shall follow. Shared
            parameters appear once, under the name `named_parameters` gives them.
        model: gives persistent buffers, and the config where `options.assets_from` is None.
        options: see `ExportOptions`.
        on_written: called with the bytes of each piece written, for a progress bar.

    Returns:
        The directory, absolute.

    Raises:
        ConfigError: the directory holds something that is not an export of ours.
        DiskFullError: the file system has less room than the export needs; checked first.
        StorageError: a file operation failed. Nothing is left under `directory` then.
        StateError: `units` lacks a parameter of `shapes`, or brings another shape.
    """
    options = options or ExportOptions()
    target = Path(directory).absolute()
    check_export_target(target)
    config, assets = _find_assets(model, options.assets_from)
    dtype = options.dtype or _named_dtype(config) or torch.float32
    buffers = persistent_buffers(model) if model is not None else {}
    layout = {name: (shape, dtype) for name, shape in shapes.items()}
    layout |= {name: (buffer.shape, buffer.dtype) for name, buffer in buffers.items()}
    shards = plan_shards(layout, options.max_shard_nbytes)

    needed_nbytes = sum(shard.data_nbytes for shard in shards)
    made: list[Path] = []
    try:
        _make_parents(target.parent, made)
        with work_folder(target) as work:
            # Behind the removal of what an interrupted export left, which may be as much.
            _require_space(target.parent, needed_nbytes)
            files = [shard.file_name for shard in shards] + [asset.name for asset in assets]
            files += ["config.json"] * (config is not None) + [INDEX_NAME] * (len(shards) > 1)
            mark(work, files)
            for asset in assets:
                shutil.copyfile(asset, work / asset.name)
            if config is not None:
                config = {key: value for key, value in config.items() if key != "torch_dtype"}
                write_json(work / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
            _write_shards(work, shards, _one_by_one(units, buffers), on_written)
            if len(shards) > 1:
                weight_map = {slot.name: shard.file_name for shard in shards for slot in shard.slots}
                index = {"metadata": {"total_size": needed_nbytes}, "weight_map": weight_map}
                write_json(work / INDEX_NAME, index)
            for name in files:
                sync_path(work / name)
            sync_path(work)
    except BaseException as error:
        for directory in reversed(made):
            # Something else may have been put there meanwhile; then it stays.
            with suppress(OSError):
                directory.rmdir()
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            _raise_storage_error(error, target, needed_nbytes)
        raise
    return target


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that belong into a checkpoint, by full name, each once; not copied."""
    buffers: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            buffers[f"{prefix}.{name}" if prefix else name] = buffer
    return buffers


def _find_assets(
    model: torch.nn.Module | None, assets_from: Path | None
) -> tuple[dict[str, Any] | None, list[Path]]:
    """Return the config to write, or None, and the files to copy beside it."""
    if assets_from is None:
        assets_from = pretrained_directory(model)
    if assets_from is not None:
        config: dict[str, Any] = json.loads((assets_from / "config.json").read_text(encoding="utf-8"))
        entries = sorted(entry for entry in assets_from.iterdir() if entry.is_file())
        return config, [e for e in entries if any(fnmatch.fnmatch(e.name, p) for p in ASSET_PATTERNS)]
    to_json = getattr(getattr(model, "config", None), "to_json_string", None)
    if to_json is None:
        return None, []
    config = json.loads(to_json())
    if not config.get("architectures"):
        config["architectures"] = [type(model).__name__]
    return config, []


def pretrained_directory(model: torch.nn.Module | None) -> Path | None:
    """Return the local directory a transformers model came from, where it still is one."""
    name = getattr(model, "name_or_path", "")
    directory = Path(name) if isinstance(name, str) and name else None
    return directory if directory is not None and (directory / "config.json").is_file() else None


def _named_dtype(config: Mapping[str, Any] | None) -> torch.dtype | None:
    if config is None:
        return None
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def _one_by_one(
    units: Iterable[tuple[str, Mapping[str, torch.Tensor]]], buffers: Mapping[str, torch.Tensor]
) -> Iterable[tuple[str, torch.Tensor]]:
    for _, tensors in units:
        yield from tensors.items()
    yield from buffers.items()


def _write_shards(
    work: Path,
    shards: Sequence[Shard],
    tensors: Iterable[tuple[str, torch.Tensor]],
    on_written: Callable[[int], None] | None,
) -> None:
    places = {slot.name: (number, slot) for number, shard in enumerate(shards) for slot in shard.slots}
    fds: list[int] = []
    starts: list[int] = []
    try:
        for shard in shards:
            header = header_bytes(shard)
            fds.append(os.open(work / shard.file_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            starts.append(len(header))
            # Reserved at once: a full disk is met here and not after an hour of writing.
            os.posix_fallocate(fds[-1], 0, len(header) + shard.data_nbytes)
            _write_at(fds[-1], header, 0)
        for name, tensor in tensors:
            place = places.pop(name, None)
            if place is None:
                raise StateError(f"cannot export {name}: it came twice or is not among the planned tensors")
            number, slot = place
            if tuple(tensor.shape) != slot.shape:
                raise StateError(
                    f"cannot export {name}: its shape is {tuple(tensor.shape)}, wanted {slot.shape}"
                )
            offset = starts[number] + slot.begin
            flat = tensor.detach().reshape(-1)
            for piece in torch.split(flat, CHUNK_NUMEL) if flat.numel() else ():
                data = piece.to("cpu", slot.dtype).contiguous().view(torch.uint8).numpy().data
                _write_at(fds[number], data, offset)
                offset += data.nbytes
                if on_written is not None:
                    on_written(data.nbytes)
        if places:
            names = ", ".join(list(places)[:3])
            raise StateError(f"cannot export: {len(places)} parameters were not delivered, first {names}")
    finally:
        for fd in fds:
            os.close(fd)


def _write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        # 1 GiB a call: Linux transfers at most 2 GiB - 4 KiB at once.
        count = os.pwrite(fd, view[: 1 << 30], offset)
        view = view[count:]
        offset += count


def _require_space(parent: Path, nbytes: int) -> None:
    free_nbytes = shutil.disk_usage(parent).free
    if nbytes > free_nbytes:
        raise DiskFullError(
            f"no room to export to {parent}: {format_bytes(nbytes)} needed ({nbytes:,} bytes),"
            f" {format_bytes(free_nbytes)} free ({free_nbytes:,} bytes); nothing was written; free space or"
            " export to another directory",
            errno=errno.ENOSPC,
            path=str(parent),
            asked_nbytes=nbytes,
            got_nbytes=free_nbytes,
        )


def _make_parents(directory: Path, made: list[Path]) -> None:
    """Make what is missing of a path, noting in `made` what to take back when the export fails."""
    for path in reversed([path for path in (directory, *directory.parents) if not path.exists()]):
        path.mkdir()
        made.append(path)
    if not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))


def _raise_storage_error(error: OSError, target: Path, needed_nbytes: int) -> NoReturn:
    path = str(error.filename or target)
    text = f"export to {target} failed: {error.strerror or error}"
    text += f" ({path})" if path != str(target) else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free_nbytes = _free_nbytes(target)
        raise DiskFullError(
            f"{text}; {format_bytes(needed_nbytes)} needed ({needed_nbytes:,} bytes),"
            f" {format_bytes(free_nbytes)} free ({free_nbytes:,} bytes); nothing was left there; free space,"
            " then run the same command again",
            errno=error.errno,
            path=path,
            asked_nbytes=needed_nbytes,
            got_nbytes=free_nbytes,
        ) from error
    message = f"{text}; nothing was left there; check that the directory can be written"
    raise StorageError(message, errno=error.errno or 0, path=path) from error


def _free_nbytes(target: Path) -> int:
    """Return what is free where `target` would lie, which is not there itself."""
    there = next(path for path in (target, *target.parents) if path.exists())
    return shutil.disk_usage(there).free
