"""The documents tell the truth: snippets run, commands and links exist, every command is described."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from offload.training.config import load_config

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
README = ROOT / "README.md"

# One file a command; names that begin with an underscore are shared by several.
COMMANDS = sorted(
    path.stem for path in (ROOT / "offload" / "cli").glob("*.py") if not path.stem.startswith("_")
)

# Directories and budgets of the README stand for the reader's own; these fit a test.
DRIVES = ("/mnt/nvme0", "/mnt/nvme1", "/mnt/nvme")
BUDGETS = {"8GiB": "256MiB", "20GiB": "256MiB"}


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


@pytest.mark.timeout(30)
@pytest.mark.parametrize("number", range(len(blocks(README, "python"))))
def test_readme_snippet_runs(number, tmp_path, monkeypatch):
    source = blocks(README, "python")[number]
    for drive in DRIVES:
        folder = tmp_path / Path(drive).name
        folder.mkdir()
        source = source.replace(f'"{drive}"', repr(str(folder)))
    for stated, small in BUDGETS.items():
        source = source.replace(f'"{stated}"', f'"{small}"')
    monkeypatch.chdir(tmp_path)
    exec(compile(source, f"README.md, Python block {number}", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("number", range(len(blocks(README, "yaml"))))
def test_readme_configuration_is_accepted(number, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(blocks(README, "yaml")[number])
    assert load_config(path, {}).learning_rate == 1e-5


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_described_and_helps(command):
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    assert f"offload {command}" in text, f"no document mentions `offload {command}`"
    assert len(command_help(command)) > 100


def each_line(*tools: str):
    """Run a test once for each documented command line of one of `tools`."""
    lines = [(document, words) for document, words in shell_lines() if Path(words[0]).name in tools]
    ids = [f"{document}: {' '.join(words)}" for document, words in lines]
    return pytest.mark.parametrize(("document", "words"), lines, ids=ids)


@each_line("offload")
def test_documented_command_line_exists(document, words):
    command = words[1]
    assert command in COMMANDS, f"{document}: there is no `offload {command}`"
    known = command_help(command)
    flags = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
    unknown = [flag for flag in flags if flag not in known and flag.replace("_", "-") not in known]
    assert not unknown, f"{document}: `offload {command}` has no {unknown}"


@each_line("make")
def test_documented_make_target_exists(document, words):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    unknown = [word for word in words[1:] if "=" not in word and word not in targets]
    assert not unknown, f"{document}: {' '.join(words)}: there is no target {unknown}"


@each_line("python", "python3", "pip")
def test_documented_file_exists(document, words):
    unknown = [word for word in words[1:] if word.endswith((".py", ".txt")) and not (ROOT / word).exists()]
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


def direct_dependencies() -> set[str]:
    """The names that pyproject.toml asks for, in every group."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [
        project["build-system"]["requires"],
        project["project"]["dependencies"],
        *project["project"]["optional-dependencies"].values(),
    ]
    names = {re.match(r"[\w.-]+", requirement)[0] for group in groups for requirement in group}
    return names - {"offload"}


def test_dependencies_page_names_every_direct_dependency():
    page = (ROOT / "docs" / "dependencies.md").read_text()
    missing = [name for name in direct_dependencies() if f"`{name}`" not in page]
    assert not missing, f"docs/dependencies.md says nothing of {missing}"


def test_every_direct_dependency_is_pinned():
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    missing = {name.lower() for name in direct_dependencies()} - {name.lower() for name in pins}
    assert not missing, f"constraints.txt has no pin for {missing}"


def test_readme_names_the_commands_that_make_runs():
    recipe = (ROOT / "Makefile").read_text().replace("$(PIP)", ".venv/bin/python -m pip")
    recipe = recipe.replace("$(BIN)", ".venv/bin").replace(" --quiet", "")
    recipe = recipe.replace(" $(PARALLEL) $(ARGS)", "")
    plain = blocks(README, "bash")[1].splitlines()
    absent = [line for line in plain[1:] if line not in recipe]
    assert not absent, f"the Makefile does not run {absent}"


def test_design_page_lists_the_layers_in_their_order():
    page = (ROOT / "docs" / "design.md").read_text()
    source = ast.parse((ROOT / "tests" / "meta" / "test_layers.py").read_text())
    layers = next(
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    )
    assert re.findall(r"^\| `([\w.]+)` \|", page, flags=re.MULTILINE) == list(layers)
