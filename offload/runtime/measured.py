"""What was measured of the drives of a run: the part of `machine.json` that is about its directories.

It reads the file and measures nothing. What is wrong with the file is a warning, once: a run must not fail
over figures that only make it faster.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ..errors import ConfigError
from ..machine import DriveSpeed, Machine, default_machine_path, file_system_id, load_machine

__all__ = ["MeasuredDrives"]

_log = logging.getLogger("offload")


@dataclass(frozen=True, slots=True)
class MeasuredDrives:
    """See the module.

    Attributes:
        machine: what the file holds, None where there is none that can be read.
        directories: on the drives, absolute; empty without a machine.
        devices: what the file system of each is recognised by.
        origin: the file; or why there is none, in words.
        command: that measures these drives.
    """

    machine: Machine | None
    directories: tuple[str, ...]
    devices: tuple[str, ...]
    origin: str
    command: str

    @classmethod
    def read(cls, disk: Sequence[Path | str]) -> Self:
        """Return what `machine.json` holds.

        Args:
            disk: directories, one a drive.
        """
        directories = [os.fspath(path) for path in disk]
        command = shlex.join(["offload", "bench", *directories])
        try:
            path = default_machine_path()
            machine = load_machine(path)
            devices = tuple(file_system_id(directory) for directory in directories)
        except FileNotFoundError:
            return cls(None, (), (), f"no drive was measured; '{command}' does that", command)
        except ImportError as error:
            return cls(None, (), (), f"machine.json cannot be read: {error}", command)
        except (ConfigError, OSError) as error:
            _log.warning(
                "the measured I/O setting is not used, nor are the speeds: %s; '%s' mends it", error, command
            )
            return cls(None, (), (), "machine.json cannot be used", command)
        return cls(machine, tuple(map(os.path.abspath, directories)), devices, str(path), command)

    def speeds(self) -> dict[str, DriveSpeed]:
        """Return what was measured of each directory's drive, by absolute path; those not measured lack."""
        known = {} if self.machine is None else {drive.device: drive for drive in self.machine.drives}
        return {
            directory: known[device]
            for directory, device in zip(self.directories, self.devices, strict=True)
            if device in known
        }
