"""Keys: Hugging Face's names, flags over file over default, and one clear message for what is wrong."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from offload.errors import ConfigError
from offload.sizes import GIB, MIB
from offload.training.config import ALIASES, ELSEWHERE, GROUPS, FinetuneConfig, load_config

REQUIRED = {"model_name_or_path": "m", "train_file": "t.txt", "output_dir": "o"}


def load(path: Path | None = None, **flags: Any) -> FinetuneConfig:
    return load_config(path, REQUIRED | flags)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "learning_rate: 1e-5\nmax_steps: 7\nseed: 1\n")
    config = load(path, max_steps="9")
    assert (config.learning_rate, config.max_steps, config.seed, config.max_length) == (1e-5, 9, 1, 1024)


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "'1e-5'", "0.00001"])
def test_every_way_to_write_a_small_number_is_the_same(tmp_path: Path, text: str) -> None:
    assert load(write(tmp_path, f"learning_rate: {text}")).learning_rate == 1e-5


def test_sizes_have_units(tmp_path: Path) -> None:
    config = load(write(tmp_path, "host_memory: 700MiB\n"), device_memory="1.5 GiB")
    assert (config.host_memory, config.device_memory) == (700 * MIB, 3 * GIB // 2)


def test_one_file_or_many_are_a_list(tmp_path: Path) -> None:
    assert load().train_file == ["t.txt"]
    assert load(write(tmp_path, "disk: [/a, /b]")).disk == [Path("/a"), Path("/b")]
    assert load(disk="~/x").disk == [Path.home() / "x"]


def test_minus_one_steps_means_not_set() -> None:
    assert load(max_steps="-1").max_steps is None


def test_the_rows_of_a_step_are_the_product() -> None:
    assert load(per_device_train_batch_size=3, gradient_accumulation_steps=4).rows_per_step == 12


def test_dashes_are_underscores(tmp_path: Path) -> None:
    assert load(write(tmp_path, "max-length: 64")).max_length == 64


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_taken_with_one_warning(alias: str, caplog: pytest.LogCaptureFixture) -> None:
    value = {"lr_scheduler": "cosine", "warmup_ratio": "0.1", "tier": "host"}.get(alias, "8")
    flags: dict[str, Any] = {key: v for key, v in REQUIRED.items() if key != ALIASES[alias]}
    with caplog.at_level(logging.WARNING):
        config = load_config(None, flags | {alias: value})
    assert str(getattr(config, ALIASES[alias])) in (
        value,
        f"{value}.0",
        f"['{value}']",
        f"[PosixPath('{value}')]",
    )
    assert [record.getMessage() for record in caplog.records] == [
        f"{alias} in the command line is read as {ALIASES[alias]}"
    ]


def test_a_key_and_its_alias_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_length is given twice"):
        load(write(tmp_path, "max_length: 8\ncutoff_len: 9"))


def test_a_flag_wins_over_an_alias_in_the_file(tmp_path: Path) -> None:
    assert load(write(tmp_path, "cutoff_len: 9"), max_length=8).max_length == 8


def test_a_key_given_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"seed is given twice.*line 2"):
        load(write(tmp_path, "seed: 1\nseed: 2"))


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("learning_rat", "learning_rate"),
        ("max_step", "max_steps"),
        ("hostmemory", "host_memory"),
        ("disks", "disk"),
    ],
)
def test_a_typo_gets_a_suggestion(tmp_path: Path, typo: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown key {typo} in .*run\.yaml; did you mean {meant}\?"):
        load(write(tmp_path, f"{typo}: 1"))


@pytest.mark.parametrize("key", ELSEWHERE)
def test_an_expected_key_that_is_not_there_is_explained(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, f"{key}: 1"))
    assert ELSEWHERE[key] in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_length": "1"}, "max_length: '1' should be greater than or equal to 2"),
        ({"seed": "x"}, "seed: 'x' should be a valid integer"),
        ({"host_memory": "8 parrots"}, "host_memory: not a size: '8 parrots'"),
        ({"learning_rate": "-1"}, "learning_rate: '-1' should be greater than or equal to 0"),
        ({"dtype": "int8"}, "dtype: 'int8' should be 'float32' or 'bfloat16'"),
        ({"moments": "8"}, "moments: '8' should be 'float32' or '8bit'"),
        ({"io_engine": "libaio"}, "io_engine: 'libaio' should be 'uring', 'threads' or 'portable'"),
        ({"train_file": []}, "train_file: "),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: 0 should be greater than 0"),
        ({"model_name_or_path": {"a": 1}}, "model_name_or_path: "),
    ],
)
def test_a_wrong_value_is_named_with_its_key(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**flags)
    assert str(caught.value).startswith(message)


def test_missing_keys_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"output_dir": "o"})
    assert str(caught.value) == (
        "model_name_or_path is missing: give it in the YAML file or as --model_name_or_path; "
        "train_file is missing: give it in the YAML file or as --train_file"
    )


@pytest.mark.parametrize("text", ["- a\n- b", "just words", "3"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="must hold 'key: value' lines"):
        load(write(tmp_path, text))


@pytest.mark.parametrize("text", ["a: [", "a: !!python/object/apply:os.system [id]", "? [a]: b"])
def test_a_file_that_is_no_plain_yaml_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not YAML"):
        load(write(tmp_path, text))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.yaml: No such file"):
        load(tmp_path / "none.yaml")


def test_the_resolved_yaml_reads_back_the_same(tmp_path: Path) -> None:
    config = load(host_memory="700MiB", device_memory="12345", disk=["/a"], max_steps=3, trace="t.json")
    path = write(tmp_path, config.to_yaml())
    assert load_config(path, {}) == config
    assert yaml.safe_load(path.read_text())["host_memory"] == "700MiB"


def test_every_key_has_a_description_and_groups_begin_at_keys() -> None:
    fields = FinetuneConfig.model_fields
    assert [name for name, field in fields.items() if not field.description] == []
    assert next(iter(fields)) == next(iter(GROUPS))
    assert set(GROUPS) < set(fields)
