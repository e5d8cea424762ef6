"""What the doctor learns of packages, extensions, and of torch, however broken that is."""

from __future__ import annotations

import os
from importlib.machinery import EXTENSION_SUFFIXES
from types import SimpleNamespace

import pytest

from offload.aio import native
from offload.doctor import software
from offload.doctor.facts import TorchFacts
from offload.doctor.software import TorchImport, look_at_extensions, look_at_packages

TORCH = """
print("a line of its own")
class version:
    cuda, hip = {cuda!r}, None
class cuda:
    is_available = staticmethod(lambda: {gpus} > 0)
    @staticmethod
    def device_count():
        {count}
__version__ = "9.9.9+fake"
"""


@pytest.fixture
def fake_torch(tmp_path, monkeypatch):
    """Makes a module torch that every Python started from here finds first."""

    def make(source: str) -> None:
        (tmp_path / "torch.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path))
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    return make


def ask(timeout_s: float = 60.0) -> TorchFacts:
    with TorchImport() as torch:
        return torch.result(timeout_s)


def test_torch_says_its_version_builds_and_gpus(fake_torch):
    fake_torch(TORCH.format(cuda="13.0", gpus=2, count="return 2"))
    assert ask() == TorchFacts(version="9.9.9+fake", cuda="13.0", num_gpus=2)


def test_a_driver_that_fails_under_torch_is_a_problem_and_the_version_is_known(fake_torch):
    fake_torch(TORCH.format(cuda="13.0", gpus=2, count="raise RuntimeError('CUDA error 803')"))
    assert ask() == TorchFacts(version="9.9.9+fake", cuda="13.0", problem="CUDA error 803")


def test_an_import_that_fails_says_why(fake_torch):
    fake_torch("raise ImportError('libcudart.so.13: cannot open shared object file')")
    found = ask()
    assert found.version is None
    assert found.problem == "ImportError: libcudart.so.13: cannot open shared object file"


def test_an_import_that_crashes_takes_nothing_along(fake_torch):
    fake_torch("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert ask().problem == "Python was ended by signal 11"


def test_an_import_that_ends_python_is_no_answer(fake_torch):
    fake_torch("import os; os._exit(3)")
    assert ask().problem == "Python ended with exit code 3 and said nothing"
    fake_torch("import os; print('bye', flush=True); os._exit(0)")
    assert "makes no sense" in ask().problem


def test_an_import_that_hangs_is_given_up_and_ended(fake_torch):
    fake_torch("import threading; threading.Event().wait()")
    with TorchImport() as torch:
        found = torch.result(0.0)
        process = torch._process
        assert process.poll() is None
    assert (found.timed_out, found.version) == (True, None)
    assert process.returncode is not None


def test_a_torch_in_the_working_directory_is_not_run(fake_torch, tmp_path, monkeypatch):
    fake_torch(TORCH.format(cuda=None, gpus=0, count="return 0"))
    (tmp_path / "here").mkdir()
    (tmp_path / "here/torch.py").write_text("raise SystemExit('planted')")
    monkeypatch.chdir(tmp_path / "here")
    assert ask() == TorchFacts(version="9.9.9+fake")


def test_packages_are_those_that_the_metadata_ask_for_without_extras(monkeypatch):
    wanted = ["torch>=2.10", "numpy", "rich (>=13.9,<99)", 'gguf>=0.17; extra == "gguf"', "absent-example>=1"]
    monkeypatch.setattr(software, "requires", lambda _: wanted)
    found = {one.name: (one.needed, one.version) for one in look_at_packages()}
    assert list(found) == ["torch", "numpy", "rich", "absent-example"]
    assert [needed for needed, _ in found.values()] == ["2.10", "", "13.9", "1"]
    assert found["absent-example"][1] is None
    assert found["numpy"][1] is not None


def test_the_real_metadata_ask_for_torch_in_a_range():
    found = {one.name: one for one in look_at_packages()}
    assert found["torch"].needed == "2.10"
    assert found["torch"].version is not None


def test_built_extensions_say_their_instructions():
    aio, adam = look_at_extensions()
    assert (aio.name, aio.problem, adam.name, adam.problem) == ("_aio", "", "_adam", "")
    assert aio.isas[-1] == adam.isas[-1] == "scalar"
    assert aio.files
    assert all(name.endswith(".so") for name in aio.files)


def test_a_missing_extension_says_what_was_built_instead(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "missing_reason", "the extension offload._aio is not built (no module)")
    (tmp_path / "_aio.cpython-399-x86_64-linux-gnu.so").touch()
    (tmp_path / "_aiomisc.so").touch()
    aio, _ = look_at_extensions(tmp_path)
    assert aio.files == ("_aio.cpython-399-x86_64-linux-gnu.so",)
    assert (aio.suffix, aio.isas) == (EXTENSION_SUFFIXES[0], ())
    assert "is not built" in aio.problem


def test_an_extension_that_is_older_than_the_package_is_unusable(monkeypatch):
    monkeypatch.setattr(native, "extension", SimpleNamespace())
    aio, _ = look_at_extensions()
    assert aio.problem == "the extension offload._aio is older than the package: it has no crc32c_isas"


def test_the_doctor_works_without_torch_and_the_extensions(run_python):
    out = run_python(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('offload._aio', 'offload._adam', 'torch', 'pynvml'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from offload.doctor.collect import collect_facts\n"
        "from offload.doctor.checks import find_problems\n"
        "from offload.doctor.screen import print_screen\n"
        "facts = collect_facts(['.'], torch_limit_s=0.0)\n"
        "print_screen(facts, find_problems(facts))\n"
    )
    assert "_aio unusable, _adam unusable" in out
    assert "engine      portable; not uring: the extension offload._aio is not built" in out
    assert "no optimizer step can be taken" in out


def test_collecting_imports_no_torch_into_the_process(run_python):
    out = run_python(
        "import sys, offload.doctor.collect, offload.doctor.checks, offload.doctor.screen\n"
        "print('torch' in sys.modules)"
    )
    assert out == "False"
