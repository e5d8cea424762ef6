"""Reading and writing records from several threads at once."""

from __future__ import annotations

import threading

from store_content import content

from offload.aio import open_engine
from offload.store import RecordSpec, Store

CHUNK = 8192


def test_threads_write_and_read_their_own_records(dirs):
    specs = [RecordSpec(f"r{i}", 6 * CHUNK) for i in range(4)]
    failures = []

    def work(store, name):
        try:
            for generation in range(1, 16):
                data = content(name, generation, 6 * CHUNK)
                ticket = store.write(name, data)
                buffer = bytearray(6 * CHUNK)
                store.read(name, buffer).wait()
                ticket.wait()
                assert bytes(buffer) == data
        except BaseException as error:
            failures.append(error)
            raise

    with (
        open_engine() as engine,
        Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as store,
    ):
        threads = [threading.Thread(target=work, args=(store, spec.name)) for spec in specs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        store.commit({})
        assert store.verify().ok


def test_threads_that_share_a_record_see_whole_chunks(dirs):
    """One writes, others read the same chunks: every read is one write's bytes and verifies."""
    spec = RecordSpec("w", 2 * CHUNK)
    versions = {bytes([i]) * CHUNK for i in range(40)}
    failures = []

    def read(store):
        try:
            for _ in range(60):
                buffer = bytearray(CHUNK)
                store.read("w", buffer, offset=0, nbytes=CHUNK).wait()
                assert bytes(buffer) in versions
        except BaseException as error:
            failures.append(error)
            raise

    with (
        open_engine() as engine,
        Store.create(dirs, [spec], engine=engine, chunk_nbytes=CHUNK) as store,
    ):
        store.write("w", bytes(2 * CHUNK)).wait()
        threads = [threading.Thread(target=read, args=(store,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for i in range(1, 40):
            store.write("w", bytes([i]) * CHUNK, nbytes=CHUNK)
            if i % 10 == 0:
                store.write("w", bytes(CHUNK), offset=CHUNK)
                store.commit({})
        for thread in threads:
            thread.join()
        assert not failures
