"""What a measurement may be asked: illegal values are refused where they are made."""

from __future__ import annotations

import math

import pytest

from offload.errors import ConfigError
from offload.probe.options import BenchOptions
from offload.sizes import KIB, MIB


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size_nbytes": MIB}, "size: 1.0 MiB is too little"),
        ({"patterns": ()}, "nothing to measure"),
        ({"patterns": ("reed",)}, "'reed' is none of read, write, mixed"),
        ({"patterns": ("read", "read")}, "named twice"),
        ({"block_nbytes": (3 * MIB,)}, "no power of two"),
        ({"block_nbytes": (2 * KIB,)}, "from 4KiB"),
        ({"block_nbytes": (128 * MIB,)}, "to 64MiB"),
        ({"block_nbytes": ()}, "an empty list"),
        ({"depths": (0,)}, "depth: 0 is not from 1"),
        ({"depths": (5000,)}, "to 4096"),
        ({"rounds": 0}, "rounds: 0"),
        ({"sample_s": -1.0}, "sample: -1.0 s"),
        ({"sample_s": math.nan}, "sample: nan s"),
        ({"sustained_s": 0.0}, "not positive"),
        ({"buffer_nbytes": MIB}, "buffers: 1.0 MiB"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        BenchOptions(**changes)


def test_the_defaults_are_legal():
    assert BenchOptions().patterns == ("read", "write", "mixed")
