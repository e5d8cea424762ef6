"""Text as rows of tokens, and which rows each step learns from.

Owns the finding and reading of text files, their packing into rows of equal length, and the order
of the rows. The batch of step n is a pure function of (data, seed, n), so a run resumes from its
step number alone.

Invariants: the same files, tokenizer and `max_length` give the same rows (`Rows.fingerprint`); the
order never depends on a library's random generator, only on the arithmetic written here.

Tokens are held in memory, 4 bytes each: 1 GB of text is about 1 GB. Thread rule: none of it is shared.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import ConfigError

__all__ = ["Batches", "Rows", "find_files", "pack_rows", "read_texts", "shuffled", "split_rows"]

# What a directory is searched for; a file named by the user may end otherwise.
TEXT_SUFFIXES = (".txt", ".md", ".jsonl")

# Formats with structure that would be learned as text if they were read as text.
OTHER_SUFFIXES = (".json", ".csv", ".parquet", ".arrow", ".gz", ".zst", ".zip", ".pdf", ".docx")

# 256 texts a call: enough for the tokenizer's own threads, few enough to be no burden in memory.
TEXTS_PER_CALL = 256


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed rows of tokens.

    Attributes:
        tokens: [rows, max_length] int32, every row full.
        fingerprint: sha256 of the tokens and the shape, to tell whether data changed.
    """

    tokens: npt.NDArray[np.int32]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.tokens)


class Batches:
    """The rows of every step: each epoch is a permutation of its own, cut into whole steps.

    Args:
        rows: what to learn from.
        rows_per_step: rows of one step; rows left over at the end of an epoch are left out of it.
        seed: chooses the permutations.

    Raises:
        ConfigError: there are fewer rows than one step needs.
    """

    def __init__(self, rows: Rows, *, rows_per_step: int, seed: int) -> None:
        if len(rows) < rows_per_step:
            raise ConfigError(
                f"the data gives {len(rows)} rows of {rows.tokens.shape[1]} tokens, and one step needs "
                f"{rows_per_step} (per_device_train_batch_size x gradient_accumulation_steps); "
                "add text, or lower max_length or the batch"
            )
        self.rows = rows
        self.rows_per_step = rows_per_step
        self.steps_per_epoch = len(rows) // rows_per_step
        self._seed = seed
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def batch(self, step: int) -> torch.Tensor:
        """Return the rows of step `step` (from 0) as a new int64 tensor [rows_per_step, max_length]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = shuffled(len(self.rows), self._seed, epoch)
            self._epoch = epoch
        chosen = self._order[position * self.rows_per_step : (position + 1) * self.rows_per_step]
        return torch.from_numpy(self.rows.tokens[chosen].astype(np.int64))


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that paths, directories and globs name, each once, in the order named.

    A directory means its .txt, .md and .jsonl files at any depth, by name; hidden ones are left out.

    Raises:
        ConfigError: a pattern names no file, or a format that is not text.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
            found = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
            if not found:
                raise ConfigError(f"train_file: {path} holds no {', '.join(TEXT_SUFFIXES)} file")
        else:
            found = [
                Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()
            ]
            found = [path] if path.is_file() else found
            if not found:
                raise ConfigError(f"train_file: {pattern} names no file; paths count from {Path.cwd()}")
        for file in found:
            if file.suffix.lower() in OTHER_SUFFIXES:
                raise ConfigError(
                    f"train_file: {file} is not text; give .txt or .md, or .jsonl with a 'text' in each line"
                )
            files[file] = None
    return list(files)


def read_texts(path: Path) -> Iterator[str]:
    """Yield the texts of one file: each line's `text` for .jsonl, otherwise the whole file.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, or a line is not an object with a text.
    """
    try:
        if path.suffix.lower() != ".jsonl":
            yield path.read_text(encoding="utf-8")
            return
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _text_of(line, f"{path} line {number}")
    except OSError as error:
        raise ConfigError(f"train_file: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"train_file: {path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from error


def pack_rows(
    texts: Iterable[str], tokenizer: Any, max_length: int, on_text: Callable[[int], None] | None = None
) -> Rows:
    """Tokenise texts, join them with the end-of-text token and cut the whole into equal rows.

    Args:
        texts: documents; empty ones are skipped.
        tokenizer: a Hugging Face tokenizer; its own special tokens are kept.
        max_length: tokens of a row. The last tokens, fewer than a row, are left out.
        on_text: called with the characters of each text, for a progress bar.

    Raises:
        ConfigError: there is no text, or not enough for one row.
    """
    pieces: list[npt.NDArray[np.int32]] = []
    end = tokenizer.eos_token_id
    for group in _in_groups(text for text in texts if text.strip()):
        # verbose=False: a text longer than the model's context is what packing is for.
        for ids in tokenizer(group, return_attention_mask=False, verbose=False)["input_ids"]:
            if end is not None and (not ids or ids[-1] != end):
                ids = [*ids, end]
            pieces.append(np.asarray(ids, np.int32))
        if on_text is not None:
            for text in group:
                on_text(len(text))
    if not pieces:
        raise ConfigError("train_file: the files hold no text")
    tokens = np.concatenate(pieces)
    num_rows = len(tokens) // max_length
    if num_rows == 0:
        raise ConfigError(
            f"train_file: the text has {len(tokens)} tokens, fewer than one row of max_length {max_length}; "
            "add text or lower max_length"
        )
    tokens = tokens[: num_rows * max_length].reshape(num_rows, max_length)
    return Rows(tokens, _fingerprint(tokens))


def split_rows(rows: Rows, val_size: float, seed: int) -> tuple[Rows, Rows | None]:
    """Return (rows to learn, rows held out or None), chosen by the seed.

    Args:
        val_size: number of rows, or the fraction of all rows when below 1; 0 holds none out.

    Raises:
        ConfigError: nothing would be left to learn, or a fraction is less than one row.
    """
    if val_size == 0:
        return rows, None
    count = round(val_size * len(rows)) if val_size < 1 else int(val_size)
    if not 0 < count < len(rows):
        raise ConfigError(
            f"val_size {val_size:g} holds out {count} of {len(rows)} rows; choose between 1 and less"
        )
    # Epoch -1 is never trained, so the choice is independent of every order.
    order = shuffled(len(rows), seed, -1)
    return _take(rows, order[count:]), _take(rows, order[:count])


def shuffled(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return a permutation of range(count) that depends on its arguments only, on every version.

    Source: the finalizer of splitmix64 (Steele, Lea and Flood 2014) as sort keys.
    """
    base = int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:8], "little")
    key = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(base)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(key ^ (key >> np.uint64(31)), kind="stable")


def _text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"train_file: {where} is not JSON: {error!s:.200}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = f"keys {', '.join(record):.200}" if isinstance(record, dict) else type(record).__name__
        raise ConfigError(f"train_file: {where} has no 'text' string (it has {keys})")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(
            f"train_file: {where} has half of a surrogate pair in its text, which is no character"
        )
    return text


def _in_groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    for text in texts:
        group.append(text)
        if len(group) == TEXTS_PER_CALL:
            yield group
            group = []
    if group:
        yield group


def _take(rows: Rows, chosen: npt.NDArray[np.int64]) -> Rows:
    tokens = rows.tokens[np.sort(chosen)]
    return Rows(tokens, _fingerprint(tokens))


def _fingerprint(tokens: npt.NDArray[np.int32]) -> str:
    digest = hashlib.sha256(repr(tokens.shape).encode())
    digest.update(np.ascontiguousarray(tokens, "<i4").data)
    return digest.hexdigest()
