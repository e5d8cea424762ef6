"""The kernels' threads: kept between calls, few, made anew after a fork, gone at the interpreter's end."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from kernel_arrays import random_arrays, update

BLOCK_NUMEL = 1 << 16

# What the children have in common; `update()` returns the bytes of updated weights.
PRELUDE = """
import os, sys, threading
import numpy as np
from offload import _adam

def update(num_threads, numel=1 << 18):
    gradient, weights, exp_avg, exp_avg_sq = (np.full(numel, 0.5, np.float32) for _ in range(4))
    _adam.adamw(gradient, weights, None, exp_avg, exp_avg_sq, lr=0.1, beta1=0.9, beta2=0.999,
                eps=1e-8, weight_decay=0.1, step=1, num_threads=num_threads)
    return weights.tobytes()

def tasks():
    return set(os.listdir("/proc/self/task"))

processors = len(os.sched_getaffinity(0))
"""

Run = Callable[[str], str]


def test_threads_are_kept_and_are_no_more_than_the_processors(run_python: Run) -> None:
    out = run_python(
        PRELUDE
        + "before = tasks(); update(16); after = tasks()\n"
        + "for _ in range(20): update(16)\n"
        + "print(len(after - before) == min(processors, 4) - 1, tasks() == after)"
    )
    assert out.split() == ["True", "True"]


def test_one_thread_starts_none(run_python: Run) -> None:
    out = run_python(PRELUDE + "before = tasks(); update(1); update(16, 100); print(tasks() == before)")
    assert out.strip() == "True"


def test_a_process_on_one_processor_starts_none(run_python: Run) -> None:
    one = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    out = run_python(PRELUDE + one + "before = tasks(); update(16); print(tasks() == before)")
    assert out.strip() == "True"


def test_helpers_take_no_signals(run_python: Run) -> None:
    out = run_python(
        PRELUDE
        + "before = tasks(); update(16)\n"
        + "status = [open(f'/proc/self/task/{t}/status').read() for t in tasks() - before]\n"
        + "blocked = [int(s.split('SigBlk:')[1].split()[0], 16) for s in status]\n"
        + "print(all(mask >> 1 & 1 and mask >> 14 & 1 for mask in blocked))"  # SIGINT 2, SIGTERM 15
    )
    assert out.strip() == "True"


def test_a_forked_child_has_threads_of_its_own(run_python: Run) -> None:
    out = run_python(
        PRELUDE
        + "want = update(16)\n"
        + "child = os.fork()\n"
        + "if child == 0:\n"
        + "    alone = len(tasks()); same = update(16) == want\n"
        + "    os._exit(0 if same and alone == 1 and len(tasks()) == min(processors, 4) else 1)\n"
        + "status = os.waitpid(child, 0)[1]\n"
        + "print(status, update(16) == want)"
    )
    assert out.split() == ["0", "True"]


def test_a_child_forked_during_an_update_can_update(run_python: Run) -> None:
    out = run_python(
        PRELUDE
        + "want = update(16)\n"
        + "stop = threading.Event()\n"
        + "def work():\n"
        + "    while not stop.is_set(): update(16)\n"
        + "thread = threading.Thread(target=work); thread.start()\n"
        + "codes = []\n"
        + "for _ in range(20):\n"
        + "    child = os.fork()\n"
        + "    if child == 0: os._exit(0 if update(16) == want else 1)\n"
        + "    codes.append(os.waitpid(child, 0)[1])\n"
        + "stop.set(); thread.join()\n"
        + "print(codes == [0] * 20)"
    )
    assert out.strip() == "True"


def test_a_child_that_ends_as_interpreters_do_does_not_wait_for_the_parents_threads(run_python: Run) -> None:
    out = run_python(
        PRELUDE
        + "update(16)\n"
        + "child = os.fork()\n"
        + "if child == 0: sys.exit(0)\n"
        + "print(os.waitpid(child, 0)[1])"
    )
    assert out.strip() == "0"


def test_the_interpreter_ends_cleanly_with_updates_under_way(run_python: Run) -> None:
    # Many threads: one that wants the GIL back while the interpreter ends was the end of the process.
    out = run_python(
        PRELUDE
        + "started = threading.Semaphore(0)\n"
        + "def work():\n"
        + "    while True: update(16); started.release()\n"
        + "for _ in range(16): threading.Thread(target=work, daemon=True).start()\n"
        + "for _ in range(16): started.acquire()\n"
        + "print('end')"
    )
    assert out.strip() == "end"


def test_after_the_end_of_the_pool_a_call_has_its_own_thread(run_python: Run) -> None:
    # Handlers run in the opposite order of their registration: this one after the pool's.
    out = run_python(
        "import atexit\n"
        + "atexit.register(lambda: print(update(16) == want and tasks() == base))\n"
        + PRELUDE
        + "base = tasks(); want = update(16)"
    )
    assert out.strip() == "True"


def test_a_thread_that_cannot_start_is_an_error_and_nothing_is_changed(run_python: Run) -> None:
    # Too little address space for a stack; as root, the limit on processes would not count.
    out = run_python(
        PRELUDE
        + "import resource\n"
        + "if processors == 1: print('refused unchanged'); sys.exit()\n"
        + "arrays = [np.full(1 << 18, 0.5, np.float32) for _ in range(4)]\n"
        + "pages = int(open('/proc/self/statm').read().split()[0])\n"
        + "limit = pages * os.sysconf('SC_PAGE_SIZE') + (1 << 20)\n"
        + "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        + "g, w, m, v = arrays\n"
        + "try:\n"
        + "    _adam.adamw(g, w, None, m, v, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8,\n"
        + "                weight_decay=0.1, step=1, num_threads=2)\n"
        + "except RuntimeError:\n"
        + "    print('refused')\n"
        + "print('unchanged' if (w == 0.5).all() else 'changed')"
    )
    assert out.split() == ["refused", "unchanged"]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_calls_at_the_same_time_do_not_meddle(num_threads: int) -> None:
    many = [random_arrays(3 * BLOCK_NUMEL + 100 * k, 40 + k) for k in range(4)]
    want = [update(arrays).bits() for arrays in many]
    got: dict[int, bool] = {}

    def work(k: int) -> None:
        got[k] = all(update(many[k], num_threads=num_threads).bits() == want[k] for _ in range(10))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == dict.fromkeys(range(4), True)
    assert np.isfinite(many[0].weights.numpy()).all()
