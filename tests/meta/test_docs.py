"""The documents tell the truth: snippets run, commands and links exist, every command is described."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
README = ROOT / "README.md"

# One file a command; names that begin with an underscore are shared by several.
COMMANDS = sorted(
    path.stem for path in (ROOT / "offload" / "cli").glob("*.py") if not path.stem.startswith("_")
)

# Directories of the README stand for the reader's own; the test puts temporary ones in their place.
PLACEHOLDERS = ("/mnt/nvme0", "/mnt/nvme1", "/mnt/nvme")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, *languages: str) -> list[str]:
    """The fenced blocks of a document in one of `languages`."""
    fence = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
    return [body for language, body in fence.findall(path.read_text()) if language in languages]


def shell_lines() -> list[tuple[str, list[str]]]:
    """(document, words) for each command line in the documents; comments and output are dropped."""
    lines = []
    for path in DOCUMENTS:
        for block in blocks(path, "bash", "console", "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words:
                    lines.append((name_of(path), words))
    return lines


def command_help(command: str) -> str:
    """What `offload COMMAND --help` prints."""
    done = subprocess.run(
        [sys.executable, "-c", "from offload.cli import main; main()", command, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, f"offload {command} --help failed: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize("number", range(len(blocks(README, "python"))))
def test_readme_snippet_runs(number, tmp_path, monkeypatch):
    source = blocks(README, "python")[number]
    for placeholder in PLACEHOLDERS:
        folder = tmp_path / Path(placeholder).name
        folder.mkdir()
        source = source.replace(f'"{placeholder}"', repr(str(folder)))
    monkeypatch.chdir(tmp_path)
    exec(compile(source, f"README.md, Python block {number}", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_described_and_helps(command):
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    assert f"offload {command}" in text, f"no document mentions `offload {command}`"
    assert len(command_help(command)) > 100


@pytest.mark.parametrize(
    ("document", "words"), [line for line in shell_lines() if line[1][0] == "offload" and len(line[1]) > 1]
)
def test_documented_command_line_exists(document, words):
    command = words[1]
    assert command in COMMANDS, f"{document}: there is no `offload {command}`"
    known = command_help(command)
    flags = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
    unknown = [flag for flag in flags if flag not in known and flag.replace("-", "_") not in known]
    assert not unknown, f"{document}: `offload {command}` has no {unknown}"


@pytest.mark.parametrize(
    ("document", "words"),
    [line for line in shell_lines() if Path(line[1][0]).name in {"make", "python", "pip"}],
)
def test_documented_make_targets_files_and_packages_exist(document, words):
    tool = Path(words[0]).name
    arguments = [word for word in words[1:] if not word.startswith("-")]
    if tool == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        unknown = [word for word in arguments if "=" not in word and word not in targets]
    else:
        unknown = [
            word for word in arguments if word.endswith((".py", ".txt")) and not (ROOT / word).exists()
        ]
    assert not unknown, f"{document}: {' '.join(words)}: there is no {unknown}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
    local = [link for link in links if not link.startswith(("http://", "https://", "mailto:"))]
    broken = [link for link in local if not (path.parent / link).exists()]
    assert not broken, f"{name_of(path)} links to {broken}"


def test_readme_is_short_enough_to_be_read():
    assert len(README.read_text().splitlines()) <= 200


def test_readme_opens_with_the_two_commands():
    first = blocks(README, "bash")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


def test_dependencies_page_names_every_direct_dependency():
    page = (ROOT / "docs" / "dependencies.md").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    names = re.findall(r'^    "([A-Za-z][\w.-]*)(?:[><=].*)?",$', project, flags=re.MULTILINE)
    missing = [name for name in names if f"`{name}`" not in page]
    assert names
    assert not missing, f"docs/dependencies.md says nothing of {missing}"


def test_every_direct_dependency_is_pinned():
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text()
    names = re.findall(r'^    "([A-Za-z][\w.-]*)(?:[><=].*)?",$', project, flags=re.MULTILINE)
    assert not set(names) - set(pins)
