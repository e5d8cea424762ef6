"""Which I/O setting a run uses: the one asked for, else the one that was measured, else the default.

It logs what it chose and where that comes from. A measured setting that no engine takes is a warning.
"""

from __future__ import annotations

import logging

from ..machine import IoSetting
from ..sizes import MIB, format_bytes
from .measured import MeasuredDrives
from .options import RuntimeOptions, is_queue_depth, is_segment_size

__all__ = ["choose_io_setting"]

# Without a measurement: 32 operations of 1 MiB saturate the drives measured.
_DEFAULT = IoSetting(segment_nbytes=MIB, queue_depth=32)

_log = logging.getLogger("offload")


def choose_io_setting(options: RuntimeOptions, measured: MeasuredDrives) -> IoSetting:
    """Return how to open the engine for the drives of `options`, each part chosen for itself.

    No memory depends on it: segments are parts of the leases that requests read and write.
    """
    depth, segment_nbytes, origin = options.queue_depth, options.segment_nbytes, "as asked for"
    if depth is None or segment_nbytes is None:
        found, origin = _measured_setting(measured)
        depth = found.queue_depth if depth is None else depth
        segment_nbytes = found.segment_nbytes if segment_nbytes is None else segment_nbytes
    _log.info("I/O setting: segments of %s, queue depth %d, %s", format_bytes(segment_nbytes), depth, origin)
    return IoSetting(segment_nbytes=segment_nbytes, queue_depth=depth)


def _measured_setting(measured: MeasuredDrives) -> tuple[IoSetting, str]:
    """Return the setting of machine.json or the default, and where it comes from."""
    if measured.machine is None:
        return _DEFAULT, f"the default, since {measured.origin}"
    setting = measured.machine.setting_for(measured.devices)
    if setting is None:
        lacks = f"{measured.origin} does not hold these drives; '{measured.command}' measures them"
        return _DEFAULT, f"the default, since {lacks}"
    if not (is_queue_depth(setting.queue_depth) and is_segment_size(setting.segment_nbytes)):
        _log.warning(
            "the measured I/O setting is not used: %s: %s; '%s' mends it",
            measured.origin,
            setting,
            measured.command,
        )
        return _DEFAULT, "the default"
    return setting, f"measured, from {measured.origin}"
