"""The exception tree: its shape, what each error carries, and that all of it survives a pickle."""

from __future__ import annotations

import copy
import errno
import importlib
import pickle
import pkgutil
import re

import pytest

import offload
from offload import errors
from offload.errors import (
    CapacityError,
    ConfigError,
    CorruptionError,
    DiskFullError,
    LockedError,
    OffloadError,
    PlanError,
    RequestTimeoutError,
    StateError,
    StorageError,
    UnitError,
)

ATTRIBUTES = {
    "errno": errno.EIO,
    "path": "/mnt/nvme0/data.0",
    "offset_bytes": 4096,
    "asked_nbytes": 65536,
    "got_nbytes": 12288,
}


def family(root: type) -> list[type]:
    """`root` and every class derived from it, in a stable order."""
    return [root, *(cls for child in sorted(root.__subclasses__(), key=repr) for cls in family(child))]


def test_every_exception_of_the_package_is_in_the_tree():
    for module in pkgutil.walk_packages(offload.__path__, "offload."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert {cls.__name__ for cls in family(OffloadError)} == set(errors.__all__)


def test_the_docstring_draws_every_class():
    assert set(errors.__all__) <= set(re.findall(r"[A-Z]\w+Error", errors.__doc__))


@pytest.mark.parametrize("cls", [cls for cls in family(OffloadError) if issubclass(cls, StorageError)])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_storage_errors_pickle_with_their_attributes(cls, protocol):
    error = cls("short read: 12,288 of 65,536 bytes", **ATTRIBUTES)
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is cls
    assert str(again) == str(error)
    assert {name: getattr(again, name) for name in ATTRIBUTES} == ATTRIBUTES


@pytest.mark.parametrize("cls", [cls for cls in family(OffloadError) if not issubclass(cls, StorageError)])
def test_other_errors_pickle_with_their_message(cls):
    again = pickle.loads(pickle.dumps(cls("needs 9.0 GiB, has 8.0 GiB")))
    assert type(again) is cls
    assert str(again) == "needs 9.0 GiB, has 8.0 GiB"


def test_a_copied_storage_error_keeps_what_was_added_to_it():
    error = StorageError("write failed", **ATTRIBUTES)
    error.add_note("unit model.layers.3")
    again = copy.copy(error)
    assert again.errno == errno.EIO
    assert again.__notes__ == ["unit model.layers.3"]


@pytest.mark.parametrize(
    ("cls", "natural"),
    [
        (StorageError, OSError),
        (DiskFullError, OSError),
        (CorruptionError, OSError),
        (LockedError, OSError),
        (RequestTimeoutError, TimeoutError),
        (CapacityError, MemoryError),
        (PlanError, ValueError),
        (UnitError, ValueError),
        (ConfigError, ValueError),
        (StateError, RuntimeError),
    ],
)
def test_each_error_is_also_the_natural_builtin(cls, natural):
    assert issubclass(cls, natural)
    assert issubclass(cls, OffloadError)


def test_a_storage_error_prints_its_message_alone():
    assert str(StorageError("read failed", errno=errno.EIO, path="/x")) == "read failed"


def test_a_storage_error_without_details_has_defaults_that_say_so():
    error = StorageError("read failed")
    assert (error.errno, error.path, error.offset_bytes, error.asked_nbytes, error.got_nbytes) == (
        0,
        "",
        None,
        None,
        None,
    )


def test_exit_codes_tell_the_kinds_apart():
    codes = {cls.__name__: cls.exit_code for cls in family(OffloadError)}
    assert codes == {
        "OffloadError": 1,
        "StateError": 1,
        "PlanError": 2,
        "UnitError": 2,
        "ConfigError": 2,
        "CapacityError": 3,
        "StorageError": 74,
        "LockedError": 74,
        "RequestTimeoutError": 74,
        "DiskFullError": 75,
        "CorruptionError": 76,
    }
