"""The bytes of a manifest: the example of docs/format.md, every flipped bit, hostile values."""

from __future__ import annotations

import json
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.aio import crc32c
from offload.errors import CorruptionError, StorageError
from offload.store import RecordSpec, Store
from offload.store.format import RecordEntry, decode_manifest, encode_manifest, max_manifest_nbytes
from offload.store.framing import canonical_json, chunk_seed, frame, unframe
from offload.store.owner import Owner, decode_owner, encode_owner
from offload.store.records import MAX_CHUNKS, first_manifest

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text()
RUN_ID = "00010203-0405-4607-8809-0a0b0c0d0e0f"
EXAMPLE = "\n".join(re.search(r"    (offload-manifest .*)\n    (\{.*\})\n", DOCUMENT).groups()).encode()
SNAPSHOT = "\n".join(re.search(r"    (offload-snapshot .*)\n    (\{.*\})\n", DOCUMENT).groups()).encode()


def fill(first: int, num_chunks: int) -> bytes:
    return b"".join(bytes([first + i]) * 4096 for i in range(num_chunks))


def example_body() -> dict:
    return json.loads(EXAMPLE.partition(b"\n")[2])


def test_the_documented_example_is_what_a_run_writes(dirs, engine):
    specs = [RecordSpec("layer.0/weights", 12288), RecordSpec("embed/frozen", 4096, mutable=False)]
    with Store.create(
        dirs, specs, engine=engine, run_id=RUN_ID, chunk_nbytes=4096, identity={"model": "example"}
    ) as store:
        store.write("layer.0/weights", fill(0x10, 3))
        store.write("embed/frozen", fill(0x20, 1))
        store.commit({"step": 1})
        store.write("layer.0/weights", fill(0x30, 3))
        store.commit({"step": 2})
    folders = [path / f"run-{RUN_ID}" for path in dirs]
    assert [(folder / "manifest-2").read_bytes() for folder in folders] == [EXAMPLE, EXAMPLE]
    rows = re.findall(r"^\| \d \| `(\S+)` (\d) \| (\d) \| (.*) \|$", DOCUMENT, re.M)
    assert len(rows) == 4
    for _, _, drive, places in rows:
        data = (folders[int(drive)] / "data.bin").read_bytes()
        for offset, byte in re.findall(r"(\d+): (\w\w) ", places):
            assert data[int(offset) : int(offset) + 4096] == bytes([int(byte, 16)]) * 4096


def test_the_documented_snapshot_is_what_a_run_writes(dirs, engine):
    specs = [RecordSpec("layer.0/weights", 12288), RecordSpec("embed/frozen", 4096, mutable=False)]
    with Store.create(dirs, specs, engine=engine, run_id=RUN_ID, chunk_nbytes=4096) as store:
        for generation, first in [(1, 0x10), (2, 0x30)]:
            store.write("layer.0/weights", fill(first, 3))
            store.commit({"step": generation})
        store.snapshot("a")
    folders = [path / f"run-{RUN_ID}" for path in dirs]
    assert [(folder / "snapshot-a").read_bytes() for folder in folders] == [SNAPSHOT, SNAPSHOT]
    assert (folders[0] / "snapshot-a.bin").read_bytes() == bytes([0x30]) * 4096 + bytes([0x32]) * 4096
    assert (folders[1] / "snapshot-a.bin").read_bytes() == bytes([0x31]) * 4096


def test_the_documented_checksum_is_what_the_bytes_give():
    words = re.search(r"^    ([0-9a-f]{32}) ([0-9a-f]{8}) ([0-9a-f]{8}) ([0-9a-f]{16})$", DOCUMENT, re.M)
    identity = bytes.fromhex("".join(words.groups()))
    checksum = crc32c(identity + bytes([0x31]) * 4096)
    assert f"{checksum:08x}" == "5cafa4b9"
    assert chunk_seed(UUID(RUN_ID), 0, 1, 2) == crc32c(identity)
    assert example_body()["records"][0]["crc32c"][8:16] == f"{checksum:08x}"


def test_decoding_the_example_gives_it_back():
    manifest, checksum = decode_manifest(EXAMPLE, "m")
    assert checksum == "32cec4a7"
    assert (manifest.generation, manifest.parent, manifest.state) == (2, "bac30acb", {"step": 2})
    assert manifest.records[0] == RecordEntry(
        RecordSpec("layer.0/weights", 12288),
        ((0, 0), (8192, 4096)),
        1,
        2,
        (0xB8E22A8D, 0x5CAFA4B9, 0x75954014),
    )
    assert encode_manifest(manifest) == (EXAMPLE, checksum)


def test_every_flipped_bit_is_found():
    for position in range(len(EXAMPLE)):
        for bit in range(8):
            data = bytearray(EXAMPLE)
            data[position] ^= 1 << bit
            with pytest.raises(CorruptionError):
                decode_manifest(bytes(data), "m")


def test_every_cut_is_found():
    for length in range(len(EXAMPLE)):
        with pytest.raises(CorruptionError):
            decode_manifest(EXAMPLE[:length], "m")
    with pytest.raises(CorruptionError, match="torn"):
        decode_manifest(EXAMPLE + b"\n", "m")


def test_every_flipped_bit_of_an_ownership_file_is_found():
    run_id = UUID(RUN_ID)
    data = encode_owner(Owner(run_id, 1, ("/mnt/a", "/mnt/b")))
    assert decode_owner(data, "o", run_id) == Owner(run_id, 1, ("/mnt/a", "/mnt/b"))
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            with pytest.raises(CorruptionError):
                decode_owner(bytes(changed), "o", run_id)


def test_an_ownership_file_of_another_run_is_refused():
    data = encode_owner(Owner(UUID(int=1), 0, ("/a",)))
    with pytest.raises(CorruptionError, match="belongs to run"):
        decode_owner(data, "o", UUID(RUN_ID))


def test_a_manifest_is_not_an_ownership_file():
    with pytest.raises(CorruptionError, match=r"offload-manifest file, expected offload-run"):
        decode_owner(EXAMPLE, "o", UUID(RUN_ID))


def framed(body: bytes, version: str = "1.0") -> bytes:
    line = b"offload-manifest %b nbytes=%d" % (version.encode(), len(body))
    return b"%b crc32c=%08x\n%b" % (line, crc32c(body, crc32c(line)), body)


def test_a_newer_minor_version_with_more_keys_is_read():
    body = {**example_body(), "later": 1}
    manifest, _ = decode_manifest(framed(json.dumps(body).encode(), "1.7"), "m")
    assert manifest.generation == 2


def test_a_newer_major_version_is_not_damage():
    with pytest.raises(StorageError, match=r"format version 2\.0") as error:
        decode_manifest(framed(b"{}", "2.0"), "m")
    assert not isinstance(error.value, CorruptionError)


def set_key(path, value):
    def change(body):
        *parents, last = path
        for key in parents:
            body = body[key]
        body[last] = value

    return change


HOSTILE = {
    "generation is negative": (("generation",), -1),
    "generation is huge": (("generation",), 1 << 70),
    "generation is true": (("generation",), True),
    "generation is a float": (("generation",), 2.0),
    "generation is text": (("generation",), "2"),
    "generation zero has no parent to name": (("parent",), None),
    "parent is not a checksum": (("parent",), "xyz"),
    "no drives": (("drives",), []),
    "too many drives": (("drives",), [{"nbytes": 4096}] * 65),
    "drives are numbers": (("drives",), [1, 2]),
    "a drive is not aligned": (("drives", 0, "nbytes"), 16383),
    "a drive is shorter than its extents": (("drives", 0, "nbytes"), 12288),
    "a drive is huge": (("drives", 0, "nbytes"), 1 << 60),
    "no deal": (("deal",), []),
    "a deal names a drive that is not there": (("deal",), [0, 2]),
    "a deal is too long": (("deal",), [0, 1] * 200),
    "a deal that moves chunks": (("deal",), [0]),
    "chunks are too small": (("chunk_nbytes",), 512),
    "chunks are too large": (("chunk_nbytes",), 1 << 40),
    "chunks are not aligned": (("chunk_nbytes",), 4097),
    "chunks are of another length": (("chunk_nbytes",), 8192),
    "records are text": (("records",), "records"),
    "a record is a number": (("records", 0), 3),
    "a name is empty": (("records", 0, "name"), ""),
    "a name is long": (("records", 0, "name"), "x" * 257),
    "a name has a newline": (("records", 0, "name"), "a\nb"),
    "a name is there twice": (("records", 0, "name"), "embed/frozen"),
    "a record is huge": (("records", 0, "nbytes"), 1 << 60),
    "a record is not aligned": (("records", 0, "nbytes"), 12289),
    "a record is negative": (("records", 0, "nbytes"), -4096),
    "more chunks than allowed": (("records", 1, "nbytes"), 4096 * MAX_CHUNKS),
    "mutable is a number": (("records", 0, "mutable"), 1),
    "in place with two extents": (("in_place",), "clean"),
    "in place is true": (("in_place",), True),
    "in place is another word": (("in_place",), "dirty"),
    "an extent too few": (("records", 0, "offsets"), [[0, 0]]),
    "an extent too many": (("records", 1, "offsets"), [[0, 0], [0, 0]]),
    "an offset for a drive is missing": (("records", 0, "offsets", 0), [0]),
    "an offset is negative": (("records", 0, "offsets", 0, 0), -4096),
    "an offset is not aligned": (("records", 0, "offsets", 0, 0), 512),
    "an offset is beyond the file": (("records", 0, "offsets", 1, 0), 1 << 40),
    "an extent ends beyond the file": (("records", 0, "offsets", 1, 1), 12288),
    "extents of a record overlap": (("records", 0, "offsets", 1, 0), 4096),
    "extents of two records overlap": (("records", 1, "offsets", 0, 1), 4096),
    "an extent that is not there": (("records", 0, "extent"), 2),
    "an immutable record's second extent": (("records", 1, "extent"), 1),
    "a record from the future": (("records", 0, "generation"), 3),
    "checksums are missing": (("records", 0, "crc32c"), ""),
    "checksums are too many": (("records", 0, "crc32c"), "00" * 16),
    "checksums are spaces": (("records", 0, "crc32c"), " " * 24),
    "checksums are not hexadecimal": (("records", 0, "crc32c"), "g" * 24),
    "checksums of a record never written": (("records", 0, "generation"), 0),
    "a run id that is none": (("run_id",), "../../etc"),
    "a run id in another form": (("run_id",), RUN_ID.replace("-", "")),
    "state is a list": (("state",), []),
    "identity is missing": (("identity",), None),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_value_that_no_run_has_is_refused(what):
    path, value = HOSTILE[what]
    body = example_body()
    set_key(path, value)(body)
    with pytest.raises(CorruptionError, match="^m is not a valid manifest: "):
        decode_manifest(framed(json.dumps(body).encode()), "m")


@pytest.mark.parametrize("key", example_body())
def test_a_missing_key_is_refused(key):
    body = example_body()
    del body[key]
    with pytest.raises(CorruptionError, match=f"'{key}' is NoneType"):
        decode_manifest(framed(json.dumps(body).encode()), "m")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'{"a":NaN}',
        b"{",
        b"\xff\xfe",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"generation":' + b"9" * 10_000 + b"}",
    ],
    ids=["empty", "list", "null", "nan", "cut", "binary", "deep", "long number"],
)
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(CorruptionError, match="^m "):
        decode_manifest(framed(body), "m")


@pytest.mark.parametrize("filler", [b"[],", b"{},", b"0,", b'"",'])
def test_a_hostile_body_does_not_allocate_much(filler):
    body = b'{"state":[' + filler * (8_000_000 // len(filler)) + b"0]}"
    data = framed(body)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptionError, match="more than 1,000,000 values"):
            decode_manifest(data, "m")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200))
def test_random_bytes_are_damage(data):
    with pytest.raises(CorruptionError):
        decode_manifest(data, "m")


texts = st.text(max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=50)
@given(st.dictionaries(texts, json_values, max_size=3))
def test_any_json_comes_back_out_of_a_frame(body):
    data, checksum = frame("offload-manifest", body)
    assert unframe("offload-manifest", data, "m") == (body, checksum)


@given(json_values)
def test_equal_values_have_equal_json(value):
    text = canonical_json(value, "it")
    assert text.isascii()
    assert canonical_json(json.loads(text), "it") == text


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.booleans(), st.booleans(), st.integers(1, 9)),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 3),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
)
def test_any_manifest_comes_back(records, num_drives, chunk_pages, in_place, in_use):
    specs = [RecordSpec(f"r{i}", 4096 * pages, mutable) for i, (pages, mutable, _, _) in enumerate(records)]
    first = first_manifest(
        UUID(RUN_ID),
        specs,
        num_drives=num_drives,
        chunk_nbytes=4096 * chunk_pages,
        weights=None,
        identity={"a": 1},
        in_place=in_place,
    )
    entries = tuple(
        replace(
            entry,
            generation=generation,
            checksums=tuple(range(7, 7 + -(-pages // chunk_pages))),
            extent=int(mutable and not in_place),
        )
        if written
        else entry
        for entry, (pages, mutable, written, generation) in zip(first.records, records, strict=True)
    )
    manifest = replace(first, generation=9, parent="0123abcd", records=entries, state={"s": [1]})
    manifest = replace(manifest, in_use=in_place and in_use)
    assert decode_manifest(encode_manifest(manifest)[0], "m")[0] == manifest
    assert len(encode_manifest(manifest)[0]) <= max_manifest_nbytes(first, encode_manifest(first)[0])
