"""Rows of tokens and their order: pure functions of files, seed and step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import ConfigError
from offload.training.data import Batches, Rows, find_files, pack_rows, read_texts, shuffled, split_rows


class LetterTokenizer:
    """One token a letter; 0 ends a text."""

    eos_token_id: int | None = 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def rows_of(count: int, length: int = 4) -> Rows:
    return Rows(np.arange(count * length, dtype=np.int32).reshape(count, length), "x")


def test_texts_are_joined_with_the_end_token_and_cut_into_full_rows() -> None:
    rows = pack_rows(["abc", "", " \n", "defg"], LetterTokenizer(), 4)
    assert rows.tokens.tolist() == [[97, 98, 99, 0], [100, 101, 102, 103]]


def test_an_end_token_that_is_there_is_not_doubled() -> None:
    tokenizer = LetterTokenizer()
    tokenizer.eos_token_id = ord("c")
    assert pack_rows(["abc", "abc"], tokenizer, 6).tokens.tolist() == [[97, 98, 99, 97, 98, 99]]


def test_the_fingerprint_tells_rows_apart() -> None:
    def fingerprint(text: str, length: int = 4) -> str:
        return pack_rows([text], LetterTokenizer(), length).fingerprint

    assert fingerprint("abcdefgh") == fingerprint("abcdefgh")
    assert len({fingerprint("abcdefgh"), fingerprint("abcdefgi"), fingerprint("abcdefgh", 8)}) == 3


def test_many_texts_are_all_read_and_reported() -> None:
    lengths: list[int] = []
    rows = pack_rows((f"{n:03d}" for n in range(600)), LetterTokenizer(), 4, lengths.append)
    assert (len(rows), sum(lengths)) == (600, 1800)


def test_no_text_and_too_little_text_are_refused() -> None:
    with pytest.raises(ConfigError, match="hold no text"):
        pack_rows([" ", ""], LetterTokenizer(), 4)
    with pytest.raises(ConfigError, match="has 3 tokens, fewer than one row of max_length 4"):
        pack_rows(["ab"], LetterTokenizer(), 4)


@pytest.mark.parametrize("step", [0, 2, 3, 7, 100])
def test_a_batch_depends_on_its_step_alone(step: int) -> None:
    walked = Batches(rows_of(10), rows_per_step=3, seed=1)
    for earlier in range(step):
        walked.batch(earlier)
    jumped = Batches(rows_of(10), rows_per_step=3, seed=1)
    assert torch.equal(walked.batch(step), jumped.batch(step))
    assert jumped.batch(step).dtype == torch.int64


def test_an_epoch_shows_every_row_once() -> None:
    batches = Batches(rows_of(12), rows_per_step=3, seed=1)
    first = torch.cat([batches.batch(step) for step in range(4)])
    second = torch.cat([batches.batch(step) for step in range(4, 8)])
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist()) == list(range(0, 48, 4))
    assert not torch.equal(first, second)


def test_changing_a_batch_does_not_change_the_data() -> None:
    batches = Batches(rows_of(3), rows_per_step=3, seed=1)
    batches.batch(0).zero_()
    assert batches.batch(0).sum() > 0


def test_fewer_rows_than_a_step_are_refused() -> None:
    with pytest.raises(ConfigError, match="gives 2 rows of 4 tokens, and one step needs 3"):
        Batches(rows_of(2), rows_per_step=3, seed=1)


@given(st.integers(0, 200), st.integers(0, 2**63), st.integers(-1, 50))
def test_shuffled_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled(count, seed, epoch).tolist()) == list(range(count))


def test_the_order_is_the_same_for_ever() -> None:
    # Written down: a run must resume with the same data order on any version of anything.
    assert shuffled(8, 42, 0).tolist() == GOLDEN_ORDER
    assert shuffled(8, 42, 1).tolist() != GOLDEN_ORDER
    assert shuffled(8, 43, 0).tolist() != GOLDEN_ORDER


GOLDEN_ORDER = [5, 1, 7, 2, 3, 6, 0, 4]


@pytest.mark.parametrize(("val_size", "held"), [(3, 3), (0.25, 5), (1, 1)])
def test_held_out_rows_are_not_learned(val_size: float, held: int) -> None:
    train, val = split_rows(rows_of(20), val_size, seed=1)
    assert val is not None
    assert (len(val), len(train)) == (held, 20 - held)
    assert sorted([*val.tokens[:, 0], *train.tokens[:, 0]]) == list(range(0, 80, 4))


def test_no_val_size_holds_nothing_out() -> None:
    rows = rows_of(4)
    assert split_rows(rows, 0, seed=1) == (rows, None)


@pytest.mark.parametrize("val_size", [20, 21, 0.01])
def test_a_val_size_that_leaves_nothing_is_refused(val_size: float) -> None:
    with pytest.raises(ConfigError, match=r"val_size .* of 20 rows"):
        split_rows(rows_of(20), val_size, seed=1)


def make_tree(root: Path) -> None:
    (root / "sub").mkdir()
    (root / ".hidden").mkdir()
    for name in ("b.txt", "a.md", "sub/c.jsonl", "x.py", ".hidden/d.txt", ".e.txt"):
        (root / name).write_text("text")


def test_a_directory_means_its_text_files(tmp_path: Path) -> None:
    make_tree(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in find_files([str(tmp_path)])] == [
        "a.md",
        "b.txt",
        "sub/c.jsonl",
    ]


def test_globs_and_files_are_found_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert find_files(["b.txt", "*.txt", "x.py", "**/*.md"]) == [Path("b.txt"), Path("x.py"), Path("a.md")]


def test_a_file_whose_name_looks_like_a_glob_is_found(tmp_path: Path) -> None:
    path = tmp_path / "[a].txt"
    path.write_text("x")
    assert find_files([str(path)]) == [path]


@pytest.mark.parametrize("pattern", ["none.txt", "*.none"])
def test_a_pattern_without_files_is_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match="names no file"):
        find_files([str(tmp_path / pattern)])


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no \.txt"):
        find_files([str(tmp_path)])


def test_formats_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ConfigError, match="is not text"):
        find_files([str(tmp_path / "a.parquet")])


def test_jsonl_gives_the_text_of_each_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one\ntwo", "id": 1}) + "\n\n" + json.dumps({"text": "three"}))
    assert list(read_texts(path)) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        (
            '{"prompt": "a", "completion": "b"}',
            r"line 2 has no 'text' string \(it has keys prompt, completion\)",
        ),
        ('{"text": 3}', "line 2 has no 'text' string"),
        ("[1]", r"line 2 has no 'text' string \(it has list\)"),
    ],
)
def test_a_line_without_text_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ConfigError, match=message):
        list(read_texts(path))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"abc\xff")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 3\)"):
        list(read_texts(tmp_path / name))


def test_a_file_that_vanished_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*No such file"):
        list(read_texts(tmp_path / "a.txt"))
