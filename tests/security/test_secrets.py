"""Secrets in the environment and in a configuration reach no file and no line, whatever happens to the run.

Every command is a process of its own, as a user's would be; what it wrote and printed is searched for each
secret, plain, in base64 and as a path has it.
"""

from __future__ import annotations

import ast
import base64
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.runs_cases import begin, call
from training.conftest import make_model_directory

import offload.redaction
from offload.errors import ConfigError
from offload.redaction import MASK, holds_secret, redact, redacted_output
from offload.training.config import load_config

ROOT = Path(__file__).resolve().parents[2]

ENVIRONMENT = {
    "HF_TOKEN": "hf_canaryCANARYcanaryCANARYcanary012345",
    "WANDB_API_KEY": "0123456789abcdefcanary6789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYcanaryKEY",
    "AWS_ACCESS_KEY_ID": "AKIACANARYCANARY0000",
    "DATABASE_PASSWORD": "correct-horse-canary",
    "HTTPS_PROXY": "http://proxyuser:proxy-canary@127.0.0.1:9",
}
TOKEN = "hf_configCANARYconfigCANARYconfig012345"
PASSWORD = "url-pass-canary"
URL = f"https://someone:{PASSWORD}@example.org/data.txt"
SECRETS = [
    *(value for name, value in ENVIRONMENT.items() if name != "HTTPS_PROXY"),
    "proxy-canary",
    TOKEN,
    PASSWORD,
]


def leaks(data: bytes) -> list[str]:
    """Return the secrets that `data` holds in a form that gives them away."""
    found = []
    for secret in SECRETS:
        forms = (
            secret.encode(),
            base64.b64encode(secret.encode()).rstrip(b"="),
            secret.replace("/", "\\/").encode(),
        )
        found += [secret] if any(form in data for form in forms) else []
    return found


class Shell:
    """Runs `offload` with the secrets in its environment and keeps what it printed."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.printed: list[str] = []

    def __call__(self, *arguments: object, code: int | None = 0) -> str:
        environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1", "COLUMNS": "500", "NO_COLOR": "1"}
        environment["OFFLOAD_MACHINE"] = str(self.work / "machine.json")
        done = subprocess.run(
            [sys.executable, "-c", "from offload.cli import main; main()", *map(str, arguments)],
            cwd=self.work,
            env={**environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        text = done.stdout + done.stderr
        self.printed.append(text)
        assert code is None or done.returncode == code, text
        return text

    def check(self) -> None:
        """Search every line printed and every file written."""
        for text in self.printed:
            assert leaks(text.encode()) == [], text
        for path in self.work.rglob("*"):
            if path.is_file() and path.name not in ("run.yaml", "wrong.yaml"):
                data = path.read_bytes()
                assert leaks(gzip.decompress(data) if path.suffix == ".gz" else data) == [], path


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    work = tmp_path / "work"
    work.mkdir()
    return Shell(work)


def write_config(work: Path, *, name: str = "run.yaml", **changes: object) -> Path:
    (work / "text.txt").write_text("\n".join(f"{n} squared is {n * n}." for n in range(200)))
    values = {
        "model_name_or_path": "model",
        "train_file": "text.txt",
        "output_dir": "out",
        "device": "cpu",
        "device_memory": "64MiB",
        "host_memory": "256MiB",
        "max_length": 32,
        "max_steps": 2,
        "trace": "trace.json.gz",
        "preflight": False,
        "disk": "drive",
        **changes,
    }
    path = work / name
    # A comment is where such a thing is noted down.
    path.write_text(f"# {TOKEN} {URL}\n" + "".join(f"{key}: {value}\n" for key, value in values.items()))
    return path


def test_no_secret_of_the_environment_leaves_a_run(shell: Shell) -> None:
    work = shell.work
    make_model_directory(work / "model")
    (work / "drive").mkdir()
    config = write_config(work)
    assert "step 2/2" in shell("finetune", config, "--logging_steps", 1)
    assert "resuming run" in shell("finetune", config, "--max_steps", 3)
    shell("finetune", config, "--max_steps", 3, "--seed", 9, "--debug", code=2)
    for arguments in (["runs", "out"], ["runs", "out", "--json"], ["verify", "out"]):
        shell(*arguments)
    shell("export", "out", "--to", "again")
    run = next((work / "drive").glob("run-*"))
    (run / "manifest-3").write_bytes(b"damaged")
    shell("verify", "out", code=None)
    assert {path.suffix for path in work.rglob("*") if path.is_file()} >= {".gz", ".bin", ".jsonl", ".yaml"}
    shell.check()


def test_no_secret_of_the_environment_is_in_a_report(shell: Shell) -> None:
    (shell.work / "drive").mkdir()
    arguments = [
        "--size",
        "8MiB",
        "--block",
        "1MiB",
        "--depth",
        "2",
        "--runtime",
        "0.05",
        "--plot",
        "page.html",
    ]
    shell("bench", "drive", *arguments, "--json", code=None)
    shell.check()


WRONG: dict[str, dict[str, object]] = {
    "a token as a number": {"learning_rate": TOKEN},
    "a password as a size": {"host_memory": URL},
    "a token as the model": {"model_name_or_path": TOKEN},
    "a model at a URL": {"model_name_or_path": URL},
    "data at a URL": {"train_file": f"[text.txt, '{URL}']"},
    "a directory named by a token": {"output_dir": f"runs/{TOKEN}/out"},
    "a drive at a URL": {"disk": URL.replace("https", "s3")},
    "a trace named by a secret of the environment": {"trace": f"{ENVIRONMENT['DATABASE_PASSWORD']}.json"},
    "a key that is unknown": {"hub_token": TOKEN},
    "a password beside a mistake": {"learning_rate": f"[1, # {PASSWORD}", "password": PASSWORD},
    "an alias": {"password": f"*{PASSWORD}"},
    "a tag": {"seed": f"!!int {PASSWORD}"},
    "a value that another forbids": {"on_non_finite": "rollback", "seed": 3},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_secret_in_a_wrong_place_is_not_repeated(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: the message, and every message that it came from."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        load_config(write_config(tmp_path, name="wrong.yaml", **WRONG[what]), {})
    error: BaseException | None = caught.value
    while error is not None:
        assert leaks(str(error).encode()) == []
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_a_failing_command_repeats_no_secret(shell: Shell) -> None:
    make_model_directory(shell.work / "model")
    for what in ("a token as a number", "a model at a URL", "a password beside a mistake"):
        text = shell(
            "finetune", write_config(shell.work, name="wrong.yaml", **WRONG[what]), "--debug", code=2
        )
        assert "error: " in text
    text = shell("runs", URL, "--debug", code=74)
    assert MASK in text and "example.org" in text
    shell("verify", f"/{TOKEN}", code=74)
    shell("finetune", f"{URL}.yaml", code=2)
    assert not (shell.work / "out").exists()
    shell.check()


def test_an_error_that_nobody_expected_repeats_no_secret() -> None:
    script = (
        "import sys, offload.cli as cli\n"
        "def broken(): raise RuntimeError(f'cannot log in with {sys.argv[1]} at {sys.argv[2]}')\n"
        "cli._make_app = broken\n"
        "cli.main([])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, TOKEN, URL], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "RuntimeError: cannot log in with [redacted] at https://[redacted]@example.org" in done.stderr
    assert leaks(done.stderr.encode()) == []


@pytest.mark.parametrize(
    "text",
    [
        "hf_" + "a1" * 17,
        "https://a:b@c.d/e",
        "https:/a:b@c.d/e",
        "s3://key@bucket",
        "https://h/x?a=1&X-Amz-Signature=abcdef01",
        "xoxb-123456789012-abcdefghijkl",
        "sk-proj-" + "xY1" * 16,
        "sk-" + "x" * 40,
        "ghp_" + "x" * 36,
        "AKIA" + "A" * 16,
    ],
)
def test_what_looks_like_a_secret_is_one(text: str) -> None:
    assert holds_secret(f"before {text} behind")
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "/data/hf_models/llama",
        "/mnt/nvme0/run-00010203-0405-4607-8809-0a0b0c0d0e0f/manifest-3",
        "models--x/snapshots/0123456789abcdef0123456789abcdef01234567",
        "user@host:/mnt/a",
        "at 12:30/4 me@x",
        "the tokenizer gives token 300 and the model knows 257",
        "https://github.com/a/b?page=2",
        "/data/sk-finetune-smollm2-135m-run1/task-sk-learning-rate-3e-4-warmup",
        "/mnt/hf_SmolLM2135MInstruct/xoxs-experiments-1/lr=1e-4?key=3",
        "crc32c 854c5354, its first line says 00000000",
    ],
)
def test_what_looks_like_none_is_kept(text: str) -> None:
    assert redact(text) == text


def test_a_secret_is_known_by_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for value in ENVIRONMENT.values():
        assert leaks(redact(f"<{value}>").encode()) == []
    monkeypatch.setenv("SSH_KEY", str(tmp_path))
    monkeypatch.setenv("MAX_TOKENS", "4096000000000000")
    monkeypatch.setenv("RUN_KEY", "baseline-01")
    assert not holds_secret(f"{tmp_path} 4096000000000000 baseline-01")


@pytest.mark.parametrize("value", ['quo"ted-back\\slash', "umlaut-\u00fc-secret", "line\nbreak-secret"])
@pytest.mark.parametrize("encode", [json.dumps, repr, lambda text: json.dumps(text, ensure_ascii=False)])
def test_a_secret_is_known_as_json_and_repr_have_it(
    monkeypatch: pytest.MonkeyPatch, value: str, encode: Callable[[str], str]
) -> None:
    monkeypatch.setenv("STORE_PASSWORD", value)
    for text in (f"before {value} behind", f"\n{TOKEN} \x1b{TOKEN} \u00fc{TOKEN}"):
        shown = redact(encode(text))
        assert ast.literal_eval(shown) == text.replace(value, MASK).replace(TOKEN, MASK)


def test_json_for_other_programs_is_redacted_and_stays_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = 'a"secret\u00fc\\directory'
    drive = tmp_path / f"{secret}-{TOKEN}"
    drive.mkdir()
    run = begin([drive])
    monkeypatch.setenv("STORE_PASSWORD", secret)
    code, out, _ = call(capsys, "runs", "--json", drive)
    (found,) = json.loads(out)["runs"]
    assert (code, found["run_id"]) == (0, run)
    assert [folder["path"] for folder in found["folders"]] == [f"{tmp_path}/{MASK}-{MASK}/run-{run}"]


def test_the_environment_is_read_once_for_a_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    real = offload.redaction._secret_values
    monkeypatch.setattr(offload.redaction, "_secret_values", lambda: reads.append(1) or real())
    monkeypatch.setenv("STORE_PASSWORD", "correct-horse-canary")
    with redacted_output():
        for _ in range(3):
            print("correct-horse-canary")
    assert capsys.readouterr().out == f"{MASK}\n" * 3
    assert reads == [1]


def test_streams_are_redacted_and_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    log: Callable[[str], object] = sys.stderr.write
    with redacted_output():
        print(f"a {TOKEN}")
        print(f"b {URL}", file=sys.stderr)
        sys.stdout.writelines([TOKEN, "\n"])
        assert not sys.stdout.isatty()
    log("c\n")
    assert (sys.stdout, sys.stderr) == before
    out, err = capsys.readouterr()
    assert out == f"a {MASK}\n{MASK}\n"
    assert err == f"b https://{MASK}@example.org/data.txt\nc\n"
