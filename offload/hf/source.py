"""The weights of a model directory as a source of single tensors, under the model's own names.

Owns which files a directory must have and which checkpoint tensors a parameter is made of:
transformers' own renamings and conversions, tied weights, base-model prefixes. No pickle is read.

Invariants: every parameter of the model has float tensors in the files, and where it is one tensor
it has the model's shape; both are checked from the headers when the source is opened.

Thread rule: a source may be read from one thread at a time.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..errors import ConfigError, CorruptionError, StateError

__all__ = ["PretrainedSource"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# A shard is a file beside its index and nothing else: no separators, no "..", no hidden file.
SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}")

# Dense float formats; others (fp8, int8) mean something only together with scales.
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_LOG = logging.getLogger(__name__)


class PretrainedSource:
    """Initial values from the safetensors files of a model directory, one tensor at a time.

    Args:
        directory: the model directory; its files must not change while the source is open.
        model: the model whose names are asked for; parameters on any device.

    Raises:
        ConfigError: a shard is missing or badly named, a parameter has no tensor or another shape.
        CorruptionError: a file is not readable as safetensors.
    """

    def __init__(self, directory: Path, model: torch.nn.Module) -> None:
        self.directory = directory
        self._model = model
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        try:
            self._key_files = self._open_shards()
            self._recipes = self._match(model)
            self._check(model)
        except BaseException:
            self._stack.close()
            raise

    def load(self, name: str) -> torch.Tensor:
        """Return the full value of the parameter or buffer `name`, on the CPU, as stored.

        The tensor may be a view of the mapped file: copy it before the source is closed.

        Raises:
            StateError: no such parameter, or the source is closed.
        """
        if not self._files:
            raise StateError(f"cannot load {name}: the source of {self.directory} is closed")
        recipe = self._recipes.get(name)
        if recipe is None:
            raise StateError(f"{self.directory} holds no tensor for {name}")
        if recipe.converter is None:
            return self._read(recipe.parts[0][0])
        converter = copy.deepcopy(recipe.converter)
        for key, pattern in recipe.parts:
            # add_tensor takes what it will call: the tensor is read when the conversion needs it.
            converter.add_tensor(recipe.target, key, pattern, lambda key=key: self._read(key))
        result = converter.convert(
            recipe.target, model=self._model, config=getattr(self._model, "config", None)
        )
        value = result[name]
        converted: torch.Tensor = value[0] if isinstance(value, list) else value
        return converted

    @property
    def numel(self) -> int:
        """Elements of the parameters, each shared one counted once."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the files' tensors, by the first of them."""
        return self._read_slice(next(iter(self._key_files)))[1]

    def close(self) -> None:
        """Close the files; tensors that were not copied become invalid. Closing twice is harmless."""
        self._files.clear()
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_shards(self) -> dict[str, str]:
        """Open every shard and return checkpoint key -> file name."""
        key_files: dict[str, str] = {}
        for file_name in _shard_names(self.directory):
            path = self.directory / file_name
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise CorruptionError(
                    f"{path} cannot be read as safetensors: {error!s:.300}; copy it again from its origin",
                    path=str(path),
                ) from error
            self._files[file_name] = file
            key_files |= dict.fromkeys(file.keys(), file_name)
        return key_files

    def _match(self, model: torch.nn.Module) -> dict[str, _Recipe]:
        """Return parameter or buffer name -> recipe, following transformers' own key mapping."""
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix = model.base_model_prefix
        targets = model.state_dict()
        parts: dict[str, list[tuple[str, str]]] = {}
        matched: dict[str, Any] = {}
        unused = []
        for key in sorted(self._key_files, key=_natural_order):
            name, pattern = rename_source_key(key, renamings, converters, prefix, targets)
            if name not in targets and key in targets:
                name, pattern = rename_source_key(key, [], [], prefix, targets)
            if name not in targets:
                unused.append(key)
                continue
            parts.setdefault(name, []).append((key, pattern or key))
            matched[name] = by_pattern[pattern] if pattern is not None else None
        recipes: dict[str, _Recipe] = {}
        for name, sources in parts.items():
            converter = matched[name]
            recipe = _Recipe(name, tuple(sources), converter)
            for target in converter.target_patterns if converter is not None else ():
                recipes[name.replace(converter.target_patterns[0], target)] = recipe
            recipes[name] = recipe
        for group in _tied_names(model):
            found = next((recipes[name] for name in group if name in recipes), None)
            if found is not None:
                recipes |= dict.fromkeys(group, found)
        self._report_unused(model, unused)
        return recipes

    def _report_unused(self, model: torch.nn.Module, keys: list[str]) -> None:
        ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        left = [key for key in keys if not any(pattern.search(key) for pattern in ignored)]
        if left:
            _LOG.warning(
                "%s holds %d tensors that this model does not use, first %s",
                self.directory,
                len(left),
                ", ".join(f"{key!r:.80}" for key in left[:3]),
            )

    def _check(self, model: torch.nn.Module) -> None:
        """Raise unless every parameter has a float tensor of its shape; headers only are read."""
        missing = [name for name, _ in model.named_parameters() if name not in self._recipes]
        if missing:
            raise ConfigError(
                f"{self.directory} lacks {len(missing)} tensors that its config.json asks for: "
                f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; "
                "the files are incomplete or belong to another model"
            )
        for name, parameter in model.named_parameters():
            recipe = self._recipes[name]
            for key, _ in recipe.parts:
                shape, _ = self._read_slice(key)
                if recipe.converter is None and shape != tuple(parameter.shape):
                    raise ConfigError(
                        f"{self.directory / self._key_files[key]}: {key} has shape {shape}, and the model "
                        f"built from config.json wants {tuple(parameter.shape)} for {name}; "
                        "config.json and the weights do not belong together"
                    )

    def _read_slice(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        view = self._files[self._key_files[key]].get_slice(key)
        name = view.get_dtype()
        if name not in FLOAT_DTYPES:
            raise ConfigError(
                f"{self.directory / self._key_files[key]}: {key} is stored as {name}; full fine-tuning needs "
                "dense float weights: save the model dequantized as float32, bfloat16 or float16"
            )
        return tuple(view.get_shape()), FLOAT_DTYPES[name]

    def _read(self, key: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[self._key_files[key]].get_tensor(key)
        return tensor


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How one parameter is made: renamed from one checkpoint tensor, or converted from several."""

    target: str  # the parameter the first tensor matched; a conversion may have several
    parts: tuple[tuple[str, str], ...]  # (checkpoint key, the converter's pattern for it)
    converter: Any = None


def _shard_names(directory: Path) -> list[str]:
    """Return the names of the safetensors files, from the index where there is one."""
    if (directory / INDEX_NAME).is_file():
        try:
            weight_map = json.loads((directory / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
            names = sorted({str(name) for name in weight_map.values()})
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ConfigError(f"{directory / INDEX_NAME} is not an index: {error!r:.300}") from error
        for name in names:
            if SHARD_NAME.fullmatch(name) is None:
                raise ConfigError(
                    f"{directory / INDEX_NAME} names {name!r}; a shard must lie beside its index"
                )
            if not (directory / name).is_file():
                raise ConfigError(
                    f"{directory / INDEX_NAME} names {name}, which is not there; the download is incomplete"
                )
        if names:
            return names
    if (directory / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    pickles = sorted(entry.name for entry in directory.iterdir() if entry.suffix in {".bin", ".pt", ".pth"})
    if pickles:
        raise ConfigError(
            f"{directory} holds pickled weights only ({pickles[0]}), which can run code when read, so "
            "offload does not read them; where you trust them, load the model with transformers and save it "
            "with save_pretrained"
        )
    raise ConfigError(f"{directory} is not a model directory: it has neither {SINGLE_NAME} nor {INDEX_NAME}")


def _tied_names(model: torch.nn.Module) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _natural_order(key: str) -> list[tuple[int, int, str]]:
    """Sort `experts.10` after `experts.9`: conversions stack tensors in the order they come."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]
