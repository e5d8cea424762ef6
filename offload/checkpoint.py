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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from .errors import ConfigError, DiskFullError, StateError, StorageError
from .shards import Shard, header_bytes, plan_shards
from .sizes import format_bytes

__all__ = [
    "MARKER_NAME",
    "ExportOptions",
    "check_export_target",
    "export",
    "persistent_buffers",
    "pretrained_directory",
    "write_json",
]

MARKER_NAME = "offload_export.json"
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

    work = target.with_name(f".{target.name}.offload-tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_export(work)
        _require_space(target.parent, sum(shard.data_nbytes for shard in shards))
        work.mkdir()
        files = [shard.file_name for shard in shards] + [asset.name for asset in assets]
        files += ["config.json"] * (config is not None) + [INDEX_NAME] * (len(shards) > 1)
        write_json(work / MARKER_NAME, {"format": "offload-export", "version": 1, "files": sorted(files)})
        for asset in assets:
            shutil.copyfile(asset, work / asset.name)
        if config is not None:
            config = {key: value for key, value in config.items() if key != "torch_dtype"}
            write_json(work / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
        _write_shards(work, shards, _one_by_one(units, buffers), on_written)
        if len(shards) > 1:
            weight_map = {slot.name: shard.file_name for shard in shards for slot in shard.slots}
            total = {"total_size": sum(shard.data_nbytes for shard in shards)}
            write_json(work / INDEX_NAME, {"metadata": total, "weight_map": weight_map})
        for name in files:
            _sync_path(work / name)
        _sync_path(work)
        _put_in_place(work, target)
    except OSError as error:
        _remove_export(work)
        if isinstance(error, StorageError):
            raise
        _raise_storage_error(error, target)
    except BaseException:
        _remove_export(work)
        raise
    return target


def check_export_target(directory: str | os.PathLike[str]) -> None:
    """Raise `ConfigError` unless an export may be put at `directory`, and change nothing.

    It may when the path is absent, an empty directory, or holds exactly what an earlier export of
    ours wrote.
    """
    target = Path(directory)
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise ConfigError(f"cannot export to {target}: it is not a directory; name another one")
    present = {entry.name for entry in target.iterdir()}
    ours = _marked_files(target)
    if not present or (ours is not None and present <= ours):
        return
    foreign = ", ".join(sorted(present - (ours or set()))[:3])
    raise ConfigError(
        f"cannot export to {target}: it holds files that an export of ours did not write ({foreign}); "
        "nothing was changed; name another directory or move these files away"
    )


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


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path` and sync the file; the name appears only when it is whole."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True, ensure_ascii=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync_path(path.parent)


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
            f"no room to export to {parent}: {format_bytes(nbytes)} needed, {format_bytes(free_nbytes)} "
            "free; nothing was written; free space or export to another directory",
            errno=errno.ENOSPC,
            path=str(parent),
            asked_nbytes=nbytes,
            got_nbytes=free_nbytes,
        )


def _marked_files(directory: Path) -> set[str] | None:
    """Return the names an export of ours put into `directory`, or None when it has no marker."""
    try:
        marker = json.loads((directory / MARKER_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(marker, dict) or marker.get("format") != "offload-export":
        return None
    return {MARKER_NAME, *map(str, marker.get("files", ()))}


def _remove_export(directory: Path) -> None:
    """Remove an export of ours, finished or not, file by file; anything else stays."""
    files = _marked_files(directory)
    if files is None:
        # An export that was killed before its marker was whole left at most the marker's part.
        unmarked = f".{MARKER_NAME}.part"
        if directory.is_dir() and {entry.name for entry in directory.iterdir()} <= {unmarked}:
            (directory / unmarked).unlink(missing_ok=True)
            directory.rmdir()
        return
    for name in sorted(files - {MARKER_NAME}):
        if name == os.path.basename(name):
            (directory / name).unlink(missing_ok=True)
            (directory / f".{name}.part").unlink(missing_ok=True)
    # The marker goes last, so that an interrupted removal can be told from a foreign directory.
    (directory / MARKER_NAME).unlink()
    directory.rmdir()


def _put_in_place(work: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.offload-old")
    _remove_export(old)
    if target.exists():
        check_export_target(target)
        os.rename(target, old)
    os.rename(work, target)
    _sync_path(target.parent)
    _remove_export(old)


def _sync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _raise_storage_error(error: OSError, target: Path) -> NoReturn:
    path = str(error.filename or target)
    text = f"export to {target} failed: {error.strerror or error}"
    text += f" ({path})" if path != str(target) else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = f"{text}; nothing was left there; free space, then run the same command again"
        raise DiskFullError(message, errno=error.errno, path=path) from error
    message = f"{text}; nothing was left there; check that the directory can be written"
    raise StorageError(message, errno=error.errno or 0, path=path) from error
