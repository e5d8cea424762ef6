"""Build the two C++ extensions; everything else about the package is in pyproject.toml.

The extensions need a C++17 compiler, the Python headers and pybind11: no torch, no CUDA, no
liburing. SIMD is chosen at run time, so one translation unit per instruction set is compiled with
its own flags and the rest is built for the baseline of the architecture.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
MACHINE = platform.machine().lower()

# No -ffast-math anywhere: results must not depend on the compiler's taste. FP contraction is off so
# that a multiply and an add fuse only where the source says fma. pybind11's headers are -isystem:
# they do not pass -Wshadow.
COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    f"-isystem{pybind11.get_include()}",
]
LINK_FLAGS = ["-pthread"]
if os.environ.get("OFFLOAD_WERROR") == "1":
    COMMON_FLAGS.append("-Werror")

# What gcc's -fsanitize takes; scripts/sanitize.py sets it and builds into a folder of its own. -g1:
# lines for the reports, and no more, because full debug information doubles the time of the build.
SANITIZERS = os.environ.get("OFFLOAD_SANITIZE")
if SANITIZERS:
    COMMON_FLAGS += ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZERS}"]
    LINK_FLAGS.append(f"-fsanitize={SANITIZERS}")

# Flags per translation unit, by file name suffix: `adamw_avx2.cc` is built with AVX2 and FMA. The two
# warnings are about gcc's own avx512fintrin.h (its bug 105593): `__Y = __Y` stands for any value.
UNIT_FLAGS = {
    "_avx2.cc": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512.cc": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    ],
    "_sse42.cc": ["-msse4.2", "-mpclmul"],
    "_vpclmul256.cc": ["-mavx2", "-mpclmul", "-mvpclmulqdq"],
    "_vpclmul512.cc": ["-mavx512f", "-mpclmul", "-mvpclmulqdq", "-Wno-uninitialized"],
    "_neon.cc": [],  # every AArch64 processor has it
}

# The suffixes that an architecture builds; a file without any of these suffixes is for all.
UNITS = {
    **dict.fromkeys(
        ("x86_64", "amd64"), ("_avx2.cc", "_avx512.cc", "_sse42.cc", "_vpclmul256.cc", "_vpclmul512.cc")
    ),
    **dict.fromkeys(("aarch64", "arm64"), ("_neon.cc",)),
}


class BuildPerUnitFlags(build_ext):
    """`build_ext` that adds the flags of UNIT_FLAGS to the files they name."""

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def compile_with_flags(obj, src, ext, cc_args, extra_postargs, pp_opts):  # type: ignore[no-untyped-def]
            extra = [flag for suffix, flags in UNIT_FLAGS.items() if src.endswith(suffix) for flag in flags]
            return compile_one(obj, src, ext, cc_args, [*extra_postargs, *extra], pp_opts)

        self.compiler._compile = compile_with_flags
        super().build_extensions()


def sources(folder: str) -> list[str]:
    """Return the translation units of one extension, leaving out those of other architectures."""
    units = sorted(str(path) for path in (CSRC / folder).glob("*.cc"))
    own = UNITS.get(MACHINE, ())
    return [unit for unit in units if unit.endswith(own) or not unit.endswith(tuple(UNIT_FLAGS))]


def extension(module: str, folder: str) -> Extension:
    return Extension(
        f"offload.{module}",
        sources(folder),
        include_dirs=[str(CSRC)],
        language="c++",
        extra_compile_args=COMMON_FLAGS,
        extra_link_args=LINK_FLAGS,
        depends=sorted(str(path) for path in CSRC.rglob("*.h")),
    )


setup(
    ext_modules=[extension("_aio", "aio"), extension("_adam", "adam")],
    cmdclass={"build_ext": BuildPerUnitFlags},
)
