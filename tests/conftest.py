"""What every test shares: fixed seeds, one thread per test process, the `cuda` fixture."""

from __future__ import annotations

import os

# One thread: the tensors of the tests are tiny, and two processes that spin on two cores wait for
# each other. It is read when torch is first imported, and inherited by the processes tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing in the tests comes from a hub; a mistake must fail at once instead of trying the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No measurement of the developer's own machine steers a test, and no test writes one; there is no such
# folder, in the processes that tests start as well.
os.environ["OFFLOAD_MACHINE"] = "/nonexistent/offload/machine.json"

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from own_mounts import leave_shared_mounts

# A shell starts what it puts into the background with Ctrl-C ignored, and children inherit that: tests that
# send one to a child would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, and no deadline: a loaded machine is not a failure.
settings.register_profile("offload", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("offload")

ROOT = Path(__file__).resolve().parents[1]
SEED = 20


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Seed every generator before each test. torch only where the test has imported it."""
    random.seed(SEED)
    np.random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)


@pytest.fixture(scope="session")
def own_mounts() -> None:
    """Give this process mounts of its own (own_mounts.py); skips where mounting is not allowed."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount")
    try:
        leave_shared_mounts()
    except OSError as error:
        pytest.skip(f"mounting needs root: {error}")


@pytest.fixture
def cuda():
    """The CUDA device, for tests marked `gpu`; skips where there is none."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.fixture
def run_python():
    """Run source text in a fresh interpreter at the repository's root and return what it printed."""

    def run(source: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run
