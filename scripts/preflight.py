"""Say what this machine lacks to build offload, before anything is made. Run by `make`.

It runs under whatever `python3` is, so it keeps to syntax that old Pythons parse.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig


def main():
    """Print every missing piece with its remedy; return 1 when there is one."""
    missing = []
    if sys.version_info < (3, 11):
        missing.append(
            "Python 3.11 or newer; this is %d.%d (%s). Name another with: make PYTHON=python3.12"
            % (sys.version_info[0], sys.version_info[1], sys.executable)
        )
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        missing.append("Python's venv module. Debian and Ubuntu: apt install python3-venv")
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        missing.append("the Python headers (Python.h). Debian and Ubuntu: apt install python3-dev")
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None and shutil.which("c++") is None:
        missing.append("a C++17 compiler (%s). Debian and Ubuntu: apt install g++" % compiler)
    if not sys.platform.startswith("linux"):
        missing.append("Linux; this is %s. On Windows use WSL 2" % sys.platform)
    for line in missing:
        print("offload needs " + line, file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
