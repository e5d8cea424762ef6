"""Which I/O setting a run uses: the one asked for, else the one that was measured, else the default.

It reads `machine.json` and logs what it chose and where that comes from. It measures nothing, and what is
wrong with the file is a warning: a run must not fail over a figure that only makes it faster.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence

from ..errors import ConfigError
from ..machine import IoSetting, default_machine_path, file_system_id, load_machine
from ..sizes import MIB, format_bytes
from .options import RuntimeOptions, is_queue_depth, is_segment_size

__all__ = ["choose_io_setting"]

# Without a measurement: 32 operations of 1 MiB saturate the drives measured.
_DEFAULT = IoSetting(segment_nbytes=MIB, queue_depth=32)

_log = logging.getLogger("offload")


def choose_io_setting(options: RuntimeOptions) -> IoSetting:
    """Return how to open the engine for the drives of `options`, each part chosen for itself.

    No memory depends on it: segments are parts of the leases that requests read and write.
    """
    depth, segment_nbytes, origin = options.queue_depth, options.segment_nbytes, "as asked for"
    if depth is None or segment_nbytes is None:
        found, origin = _measured([os.fspath(path) for path in options.disk])
        depth = found.queue_depth if depth is None else depth
        segment_nbytes = found.segment_nbytes if segment_nbytes is None else segment_nbytes
    _log.info("I/O setting: segments of %s, queue depth %d, %s", format_bytes(segment_nbytes), depth, origin)
    return IoSetting(segment_nbytes=segment_nbytes, queue_depth=depth)


def _measured(directories: Sequence[str]) -> tuple[IoSetting, str]:
    """Return the setting of machine.json or the default, and where it comes from."""
    again = shlex.join(["offload", "bench", *directories])
    try:
        path = default_machine_path()
        setting = load_machine(path).setting_for(tuple(map(file_system_id, directories)))
    except FileNotFoundError:
        return _DEFAULT, f"the default; '{again}' measures the best one"
    except ImportError as error:
        return _DEFAULT, f"the default, since machine.json cannot be read: {error}"
    except (ConfigError, OSError) as error:
        _log.warning("the measured I/O setting is not used: %s; '%s' mends it", error, again)
        return _DEFAULT, "the default"
    if setting is None:
        return _DEFAULT, f"the default, since {path} does not hold these drives; '{again}' measures them"
    if not (is_queue_depth(setting.queue_depth) and is_segment_size(setting.segment_nbytes)):
        _log.warning("the measured I/O setting is not used: %s: %s; '%s' mends it", path, setting, again)
        return _DEFAULT, "the default"
    return setting, f"measured, from {path}"
