"""The package works where the optional packages are not installed."""

from __future__ import annotations

import pytest

# Not needed to attach a model, train it and export it: the extras, and what only the commands use.
OPTIONAL = ("accelerate", "gguf", "matplotlib", "transformers")
COMMANDS_ONLY = ("jinja2", "psutil", "pydantic", "rich", "tqdm", "typer", "yaml")

BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
{then}
"""


@pytest.mark.parametrize(
    ("blocked", "then"),
    [
        (OPTIONAL, "import offload.cli; print('ok')"),
        (OPTIONAL + COMMANDS_ONLY, "import offload; offload.attach; print('ok')"),
        (("torch", *OPTIONAL), "import offload.store, offload.aio; print('ok')"),
        (
            ("torch", *OPTIONAL),
            "import offload.cli.bench, offload.probe.run, offload.report.outputs; print('ok')",
        ),
    ],
    ids=["the command line", "attach", "the store", "measuring"],
)
def test_imports_without(blocked, then, run_python):
    assert run_python(BLOCK.format(blocked=set(blocked), then=then)) == "ok"
