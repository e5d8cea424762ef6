"""Records on drives: reserved, striped, checksummed, committed as generations; see `offload.store.store`."""

from .fallback import FallBack, fall_back
from .format import RecordSpec
from .meter import DriveLoad, DriveMeter
from .reading import Generation, RunReader
from .runs import FoundRun, RunInfo, RunState, check_removable, find_runs, list_runs, remove_run
from .snapshot_files import SnapshotInfo, list_snapshots
from .store import Store
from .ticket import Ticket
from .verify import DamagedChunk, RunReport, VerifyReport, verify_reader

__all__ = [
    "DamagedChunk",
    "DriveLoad",
    "DriveMeter",
    "FallBack",
    "FoundRun",
    "Generation",
    "RecordSpec",
    "RunInfo",
    "RunReader",
    "RunReport",
    "RunState",
    "SnapshotInfo",
    "Store",
    "Ticket",
    "VerifyReport",
    "check_removable",
    "fall_back",
    "find_runs",
    "list_runs",
    "list_snapshots",
    "remove_run",
    "verify_reader",
]
