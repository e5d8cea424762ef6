"""Records on drives: reserved, striped, checksummed, committed as generations; see `offload.store.store`."""

from .format import RecordSpec
from .runs import RunInfo, list_runs, remove_run
from .store import Store
from .ticket import Ticket
from .verify import VerifyReport

__all__ = ["RecordSpec", "RunInfo", "Store", "Ticket", "VerifyReport", "list_runs", "remove_run"]
