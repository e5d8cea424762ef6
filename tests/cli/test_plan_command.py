"""`offload plan` as people type it: tables, JSON, what-ifs, refusals with commands that work, typos."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from offload.cli import main
from offload.machine import MACHINE_VARIABLE

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "machines"
FOUR = str(EXAMPLES / "workstation-4090-4-drives.json")
ONE = str(EXAMPLES / "workstation-4090-1-drive.json")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv(MACHINE_VARIABLE, str(tmp_path / "none.json"))
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["plan", *map(str, arguments)])
    printed = capsys.readouterr()
    code = end.value.code
    return (code if isinstance(code, int) else 0), printed.out, printed.err


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model directory with a configuration and nothing else."""
    folder = tmp_path / "model"
    LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    return folder


def test_a_directory_with_a_configuration_alone_is_planned(capsys, directory):
    for model in (directory, directory / "config.json"):
        code, out, _ = call(capsys, model, "--machine", ONE, "--home", "disk", "--tbw", "600TB")
        assert code == 0
        assert out.splitlines()[0].startswith("Plan for ")
        assert out.count("<- slowest") == out.count("<- chosen") == 1
        assert "steps until drives rated for 600 TB" in out
    assert [path.name for path in directory.iterdir()] == ["config.json"]


def test_json_has_the_figures_of_the_table(capsys):
    code, out, _ = call(capsys, "llama-65b", "--machine", FOUR, "--json")
    found = json.loads(out)
    assert (code, found["format"], found["fits_without_offload"]) == (0, "offload-plan-1", False)
    plan = found["plan"]
    assert (
        plan["bottleneck"]
        == max((link for link in plan["links"] if link["part_of"] is None), key=lambda link: link["seconds"])[
            "name"
        ]
    )
    assert plan["step_s"] == pytest.approx(max(link["seconds"] for link in plan["links"]))
    assert plan["tokens_per_s"] == pytest.approx(16 * 1024 / plan["step_s"])
    low, high = plan["bytes"]["disk_read_at_least"], plan["bytes"]["disk_read_at_most"]
    assert low <= plan["bytes"]["disk_read"] <= high
    assert plan["settings"]["home"] == "disk"


def test_explain_puts_the_numbers_in(capsys):
    _, without, _ = call(capsys, "llama-65b", "--machine", FOUR)
    _, out, _ = call(capsys, "llama-65b", "--machine", FOUR, "--explain")
    assert out.startswith(without.rstrip("\n"))
    assert "(8 P B + 16 L a s B) / F" in out and "120.0 TFLOP/s" in out
    assert "R / r + W / w" in out and "28.00 GB/s" in out


def test_what_if_shows_both_side_by_side(capsys):
    code, out, _ = call(capsys, "llama-65b", "--machine", ONE, "--what-if", "disks=4,host=256GiB")
    assert code == 0
    lines = out.splitlines()
    header = next(line for line in lines if "as it is" in line)
    assert "disks=4,host=256GiB" in header
    rate = next(line.split() for line in lines if line.strip().startswith("tokens/s"))
    assert int(rate[2].replace(",", "")) > 3 * int(rate[1].replace(",", ""))


def test_what_if_can_mend_a_refusal(capsys):
    code, out, _ = call(
        capsys, "llama-65b", "--machine", ONE, "--home", "host", "--what-if", "host=1200GiB", "--json"
    )
    found = json.loads(out)
    assert (code, found["as_it_is"]["plan"]) == (0, None)
    assert found["what_if"]["plan"]["settings"]["home"] == "host"


def test_a_refusal_names_the_tier_the_bytes_and_commands_that_work(capsys):
    code, out, err = call(capsys, "llama-65b", "--machine", ONE, "--home", "host")
    assert (code, out) == (3, "")
    assert re.search(r"host memory lacks 62\d\.\d GiB: it needs 73\d\.\d", err)
    commands = [line.strip() for line in err.splitlines() if line.strip().startswith("offload plan ")]
    assert len(commands) >= 2
    for command in commands:
        code, out, _ = call(capsys, *shlex.split(command)[2:])
        assert code == 0, command
        assert "tokens/s" in out


def test_a_refusal_in_json_keeps_its_exit_code(capsys):
    code, out, err = call(capsys, "llama-65b", "--machine", ONE, "--home", "device", "--json")
    found = json.loads(out)
    assert code == 3 and found["plan"] is None and err.startswith("error: no plan fits llama-65b")
    assert {one["lacks"]["tier"] for one in found["outcomes"] if one["home"] == "device"} == {"device"}


def test_what_fits_without_offload_is_told_and_nothing_else(capsys):
    code, out, _ = call(capsys, "smollm2-135m", "--machine", FOUR)
    assert code == 0
    assert out.startswith("It fits without offload") and "Plan for" not in out
    code, out, _ = call(capsys, "smollm2-135m", "--machine", FOUR, "--home", "disk")
    assert code == 0 and "Plan for smollm2-135m" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lama-65b", "--machine", FOUR], "did you mean llama-65b?"),
        (["models/none", "--machine", FOUR], "models/none does not exist"),
        (["llama-7b"], "offload bench DIR"),
        (["llama-7b", "--machine", FOUR.replace("4-drives", "4-drive")], "4-drives.json?"),
        (["llama-7b", "--machine", str(EXAMPLES)], "is a directory"),
        (["llama-7b", "--machine", FOUR, "--home", "dsk"], "did you mean disk?"),
        (["llama-7b", "--machine", FOUR, "--moments", "8bits"], "did you mean 8bit?"),
        (["llama-7b", "--machine", FOUR, "--host-memory", "many"], "--host-memory: not a size"),
        (["llama-7b", "--machine", FOUR, "--host-memory", "4TiB"], "--what-if host=SIZE"),
        (["llama-7b", "--machine", FOUR, "--device-memory", "80GiB"], "lower it"),
        (["llama-7b", "--machine", FOUR, "--batch", "0"], "batch must be positive"),
        (["llama-7b", "--machine", FOUR, "--rows", "17"], "rows must be 1 to 16"),
        (["llama-7b", "--machine", FOUR, "--tflops", "-1"], "--tflops must be positive"),
        (["llama-7b", "--machine", FOUR, "--max-grad-norm", "0"], "max_grad_norm must be positive"),
        (["llama-7b", "--machine", FOUR, "--gradient-dtype", "bfloat16"], "set max_grad_norm"),
        (["llama-7b", "--machine", FOUR, "--what-if", "disk=4"], "did you mean disks?"),
        (["llama-7b", "--machine", FOUR, "--what-if", "host"], "is not NAME=VALUE"),
        (["llama-7b", "--machine", FOUR, "--what-if", "disks=x"], "--what-if disks:"),
        (["llama-7b", "--machine", FOUR, "--what-if", "batch=-2"], "must be positive"),
    ],
    ids=lambda value: " ".join(Path(word).name for word in value) if isinstance(value, list) else "",
)
def test_what_is_mistyped_is_one_message_with_the_cure(capsys, arguments, message):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err and "Traceback" not in err


def test_a_damaged_configuration_is_one_message(capsys, tmp_path):
    file = tmp_path / "config.json"
    for text in ("{", "[]", '{"model_type": "nonsense"}', '{"model_type": "llama", "hidden_size": "wide"}'):
        file.write_text(text)
        code, out, err = call(capsys, tmp_path, "--machine", FOUR)
        assert (code, out) == (2, ""), text
        assert err.startswith("error: ") and "Traceback" not in err


def test_a_measured_machine_without_a_gpu_plans_on_its_links_and_says_so(capsys, tmp_path, monkeypatch):
    measured = json.loads(Path(ONE).read_text()) | {
        "device": None,
        "measured_at": "2026-01-02T03:04:05+00:00",
    }
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(measured))
    monkeypatch.setenv(MACHINE_VARIABLE, str(path))
    code, out, _ = call(capsys, "llama-13b", "--batch", "4")
    assert code == 0
    assert "give --tflops" in out and "not known" in out
    code, out, _ = call(capsys, "llama-13b", "--batch", "4", "--tflops", "2")
    assert code == 0 and "--tflops" not in out


def test_the_help_teaches(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for word in ("Examples:", "--what-if", "examples/machines", "exit code 3"):
        assert word in out
