"""The store: several runs share it, the disk does not hold up training, and a crash costs little."""

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from stored_rows import WARNING, filled, flip, key_of, row_of, same, shards, warnings_in
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hf_semckd.teacher.cache import store as store_module
from hf_semckd.teacher.cache.store import TensorStore

NOBODY = 65534

# Nothing takes that long unless it hangs.
LONG = 300


class Gate:
    """Holds up the writing of files until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._open, self._entered, self._held_up = threading.Event(), threading.Event(), threading.Event()
        write, wait = store_module._write_shard, store_module.wait

        def slow(*arguments: Any) -> str:
            self._entered.set()
            assert self._open.wait(LONG)
            return write(*arguments)

        def watched(futures: Sequence[Future[str]]) -> None:
            if futures:
                self._held_up.set()
            wait(futures)

        monkeypatch.setattr(store_module, "_write_shard", slow)
        monkeypatch.setattr(store_module, "wait", watched)

    def open(self) -> None:
        self._open.set()

    def wait_for_the_disk(self) -> None:
        """Return when the background thread is about to write."""
        assert self._entered.wait(LONG)

    def wait_for_the_writer(self) -> None:
        """Return when somebody waits for the disk."""
        assert self._held_up.wait(LONG)


def test_values_are_those_at_the_time_of_writing(tmp_path: Path) -> None:
    row = {"logits": torch.zeros(4, requires_grad=True)}
    with closing(TensorStore(tmp_path)) as store:
        store.write([key_of(1)], [row])
        with torch.no_grad():
            row["logits"].fill_(7)
        store.read([key_of(1)])[0]["logits"].fill_(9)  # what a reader does to a buffered row does not count either
        store.flush()
        assert store.read([key_of(1)])[0]["logits"].tolist() == [0, 0, 0, 0]


def test_a_later_row_replaces_an_earlier_one(tmp_path: Path) -> None:
    with closing(TensorStore(tmp_path)) as store:
        for value in (1, 2):
            store.write([key_of(0)], [row_of(value)])
            assert same(store.read([key_of(0)])[0], row_of(value))
        store.flush()
        assert same(store.read([key_of(0)])[0], row_of(2))
        store.write([key_of(0)], [row_of(3)])
        assert len(store) == 1
    assert same(TensorStore(tmp_path).read([key_of(0)])[0], row_of(3))


def test_wrong_keys_are_refused(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    with pytest.raises(ValueError, match="20 bytes"):
        store.write([b"short"], [row_of(0)])
    with pytest.raises(ValueError, match="argument"):
        store.write([key_of(0)], [])


def test_a_full_shard_is_written_without_a_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, write = threading.Semaphore(0), store_module._write_shard

    def counted(*arguments: Any) -> str:
        name = write(*arguments)
        written.release()
        return name

    monkeypatch.setattr(store_module, "_write_shard", counted)
    store = TensorStore(tmp_path, shard_bytes=1024)
    store.write([key_of(number) for number in range(9)], [row_of(number) for number in range(9)])  # 444 bytes each
    assert all(written.acquire(timeout=LONG) for _ in range(4))
    assert len(shards(tmp_path)) == 4  # two rows each; the ninth row is still buffered
    assert all(same(row, row_of(number)) for number, row in enumerate(store.read([key_of(n) for n in range(9)])))


def test_buffers_are_bounded_while_the_disk_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    store = TensorStore(tmp_path, shard_bytes=1)
    done = []

    def fill() -> None:
        for number in range(8):
            store.write([key_of(number)], [row_of(number)])
            done.append(number)

    writer = threading.Thread(target=fill, daemon=True)
    writer.start()
    gate.wait_for_the_writer()
    assert len(done) == store_module.WAITING_BUFFERS + 1
    # Neither what is being written nor what waits is out of sight, and to read it takes no waiting.
    assert all(row is not None for row in store.read([key_of(number) for number in done]))
    gate.open()
    writer.join(LONG)
    store.flush()
    assert len(done) == 8 and len(shards(tmp_path)) == 8


def test_writing_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    store = TensorStore(tmp_path, shard_bytes=1)
    store.write([key_of(0)], [row_of(0)])
    store.write([key_of(1)], [row_of(1)])
    gate.wait_for_the_disk()
    store.write([key_of(2)], [row_of(2)])  # returns, though not a byte was written
    assert shards(tmp_path) == [] and len(store) == 3
    gate.open()
    store.close()
    assert len(shards(tmp_path)) == 3


def test_a_dropped_store_takes_its_thread_along(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    store = TensorStore(tmp_path, shard_bytes=1)
    store.write([key_of(0), key_of(1)], [row_of(0), row_of(1)])
    (thread,) = set(threading.enumerate()) - before
    del store
    gc.collect()
    thread.join(LONG)
    assert not thread.is_alive() and len(shards(tmp_path)) == 1  # what was handed over, it wrote


# The package is imported without its __init__, which costs seconds.
ALONE = """
import sys, threading, types
import torch
folder, root = sys.argv[1:3]
package = types.ModuleType("hf_semckd")
package.__path__ = [root + "/hf_semckd"]
sys.modules["hf_semckd"] = package
from hf_semckd.teacher.cache import store as store_module

def row_of(number):
    return {"logits": torch.arange(100, dtype=torch.float32) + number, "count": torch.tensor(number)}
"""
WRITER = (
    ALONE
    + """
first = int(sys.argv[3])
store = store_module.TensorStore(folder, shard_bytes=4096)
print("ready", flush=True)
sys.stdin.readline()
for number in range(first, first + 150):
    store.write([number.to_bytes(20, "big")], [row_of(number)])
store.close()
"""
)
ABANDONER = (
    ALONE
    + """
write = store_module._write_shard
end = threading.Event()
store_module._write_shard = lambda *arguments: end.wait() and write(*arguments)
store = store_module.TensorStore(folder, shard_bytes=1)
store.write([bytes(20), bytes(19) + b"1"], [row_of(0), row_of(1)])
print("written", len(store))

def late():
    threading.main_thread().join()
    other = store_module.TensorStore(folder + "/late", shard_bytes=1)
    other.write([bytes(20), bytes(19) + b"1"], [row_of(0), row_of(1)])
    print("writable", other.writable, len(other))

threading.Thread(target=late).start()
end.set()
"""
)
KILLED = (
    ALONE
    + """
store = store_module.TensorStore(folder, shard_bytes=1)
for number in range(3):
    store.write([number.to_bytes(20, "big")], [row_of(number)])
store.flush()

def half(batch, sink):
    if isinstance(sink, store_module.pa.OSFile):
        sink.write(b"half of it")
        sink.flush()
        print("halfway", flush=True)
        threading.Event().wait()

store_module.write = half
for number in range(3, 6):
    store.write([number.to_bytes(20, "big")], [row_of(number)])
store.flush()
"""
)


def python(script: str, *arguments: object) -> list[str]:
    root = Path(__file__).parents[3]
    return [sys.executable, "-c", script, str(arguments[0]), str(root), *map(str, arguments[1:])]


def test_two_processes_write_into_one_folder(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    # They overlap in fifty rows.
    processes = [
        subprocess.Popen(python(WRITER, tmp_path, first), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for first in (0, 100)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.close()
    assert [process.wait(LONG) for process in processes] == [0, 0]
    for process in processes:
        process.stdout.close()
    store.refresh()
    assert len(store) == 250
    rows = store.read([key_of(number) for number in range(250)])
    assert all(same(row, row_of(number)) for number, row in enumerate(rows))
    assert not list(tmp_path.glob("*.partial"))


def test_files_of_the_same_instant_do_not_replace_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    filled(tmp_path, 3, shard_bytes=1)
    assert len(shards(tmp_path)) == 3
    assert len(TensorStore(tmp_path)) == 3


def test_read_finds_what_another_store_wrote_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = TensorStore(tmp_path)
    monkeypatch.setattr(store_module, "REFRESH_SECONDS", 0)
    filled(tmp_path)
    assert same(reader.read([key_of(2)])[0], row_of(2))
    with closing(TensorStore(tmp_path)) as writer:
        writer.write([key_of(77)], [row_of(77)])
    monkeypatch.setattr(store_module, "REFRESH_SECONDS", 1000)
    assert reader.read([key_of(77)]) == [None]  # not at every unknown key
    reader.refresh()
    assert same(reader.read([key_of(77)])[0], row_of(77))


def test_refresh_opens_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    opened: list[Path] = []
    opening = store_module.open_shard
    monkeypatch.setattr(store_module, "open_shard", lambda path: opened.append(path) or opening(path))
    store = TensorStore(tmp_path)
    store.refresh()
    assert opened == shards(tmp_path)
    filled(tmp_path)
    opened.clear()
    store.refresh()
    store.refresh()
    assert opened == shards(tmp_path)[1:] and len(opened) == 1


def test_foreign_files_and_old_leftovers(tmp_path: Path) -> None:
    (path,) = filled(tmp_path)
    others = (f"manifest.json.{'0' * 32}.partial", "notes.partial")
    names = ("table.arrow", "rows-v1-1.safetensors", f"rows-v3-{path.name[8:]}", *others)
    foreign = [tmp_path / name for name in names]
    old, young = (tmp_path / f"{path.name}.{'0' * 31}{digit}.partial" for digit in range(2))
    for file in (*foreign, old, young):
        file.write_bytes(b"nothing readable")
    for file in (*foreign, old):
        os.utime(file, (time.time() - 2 * 86400,) * 2)
    store = TensorStore(tmp_path)
    assert len(store) == 6
    assert all(file.exists() for file in (*foreign, young))
    assert not old.exists()


@contextmanager
def powerless() -> Iterator[None]:
    """Be somebody whom permissions bind, where the tests run as root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_read_only_folder_is_read(caplog: pytest.LogCaptureFixture) -> None:
    with tempfile.TemporaryDirectory() as place:  # pytest's own is closed to others
        os.chmod(place, 0o755)
        folder = Path(place) / "store"
        filled(folder)
        flip(filled(folder)[0], -1)  # an unreadable file, which cannot be deleted
        folder.chmod(0o555)
        try:
            with powerless():
                with pytest.raises(OSError):
                    (folder / "probe").touch()
                with closing(TensorStore(folder)) as store:
                    assert same(store.read([key_of(5)])[0], row_of(5))
                    store.write([key_of(100)], [row_of(100)])
                    store.flush()
                    store.refresh()
                    assert store.read([key_of(100)]) == [None]
                    assert same(store.read([key_of(5)])[0], row_of(5))
        finally:
            folder.chmod(0o755)
        assert len(shards(folder)) == 2
    assert [WARNING in text for text in warnings_in(caplog)] == [False, True]


def test_a_folder_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with closing(TensorStore(tmp_path / "file" / "store")) as store:
        store.write([key_of(0)], [row_of(0)])
        assert store.read([key_of(0)]) == [None]
    assert len(warnings_in(caplog)) == 1 and WARNING in caplog.text


class Stored(Dataset):
    def __init__(self, store: TensorStore):
        self.store = store

    def __len__(self) -> int:
        return 7

    def __getitem__(self, number: int) -> tuple[int, int, Tensor]:
        self.store.write([key_of(500 + number)], [row_of(0)])
        assert self.store.read([key_of(500 + number)]) == [None]  # a copy only reads
        row = self.store.read([key_of(number)])[0]
        return number, os.getpid(), torch.tensor(-1.0) if row is None else row["logits"].sum()


def test_forked_workers_of_a_data_loader_read(tmp_path: Path) -> None:
    filled(tmp_path, shard_bytes=1024)
    with closing(TensorStore(tmp_path)) as store:
        assert store.read([key_of(0)])[0] is not None  # a map is open
        store.write([key_of(6)], [row_of(6)])  # buffered here alone
        # One of the parent's threads holds the lock for as long as the workers live.
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            with store._locked():
                held.set()
                release.wait()

        holder = threading.Thread(target=hold, daemon=True)
        holder.start()
        assert held.wait(LONG)
        loader = DataLoader(Stored(store), num_workers=2, multiprocessing_context="fork", timeout=LONG)
        try:
            got = {int(number): (int(process), float(total)) for number, process, total in loader}
        finally:
            release.set()
            holder.join(LONG)
        assert {number: total for number, (_, total) in got.items()} == {
            **{number: float(row_of(number)["logits"].sum()) for number in range(6)},
            6: -1.0,
        }
        assert len({process for process, _ in got.values()} - {os.getpid()}) == 2
        assert same(store.read([key_of(6)])[0], row_of(6))
    assert len(TensorStore(tmp_path)) == 7


def test_a_pickled_copy_reads_and_does_not_write(tmp_path: Path) -> None:
    filled(tmp_path)
    with closing(TensorStore(tmp_path, limit_bytes=2**30, shard_bytes=1024)) as store:
        store.write([key_of(50)], [row_of(50)])
        with closing(pickle.loads(pickle.dumps(store))) as copy:
            assert (copy.limit_bytes, copy.shard_bytes, len(copy)) == (2**30, 1024, 6)
            copy.write([key_of(60)], [row_of(60)])
            assert copy.read([key_of(50), key_of(60)]) == [None, None]
            assert same(copy.read([key_of(4)])[0], row_of(4))
    assert len(shards(tmp_path)) == 2


def fork_and_flush(store: TensorStore, answers: "multiprocessing.SimpleQueue[int]") -> None:
    store.flush()
    store.close()
    answers.put(1)


def test_a_forked_child_does_not_wait_for_the_parents_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    store = TensorStore(tmp_path, shard_bytes=1)
    store.write([key_of(0), key_of(1)], [row_of(0), row_of(1)])
    gate.wait_for_the_disk()
    store.write([key_of(0)], [row_of(2)])
    assert same(store.read([key_of(0)])[0], row_of(2))  # the newest of several that wait
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=fork_and_flush, args=(store, answers))
    child.start()
    child.join(LONG)
    alive = child.is_alive()
    if alive:
        child.kill()
        child.join()
    assert not alive and child.exitcode == 0
    assert shards(tmp_path) == []
    gate.open()
    store.close()
    assert len(TensorStore(tmp_path)) == 2
    assert same(TensorStore(tmp_path).read([key_of(0)])[0], row_of(2))


def test_the_interpreter_exits_without_close(tmp_path: Path) -> None:
    """A full file that waits for the disk is written, what was not full is lost; what comes later is not stored."""
    done = subprocess.run(python(ABANDONER, tmp_path), timeout=LONG, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "written 2\nwritable False 0\n")
    assert done.stderr.count(WARNING) == 1 and "Traceback" not in done.stderr
    store = TensorStore(tmp_path)
    assert len(store) == 1 and same(store.read([bytes(20)])[0], row_of(0))
    assert shards(tmp_path / "late") == []


def test_a_killed_process_loses_what_was_not_flushed(tmp_path: Path) -> None:
    process = subprocess.Popen(python(KILLED, tmp_path), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "halfway\n"
    process.kill()
    assert process.wait(LONG) == -signal.SIGKILL
    process.stdout.close()
    (leftover,) = tmp_path.glob("*.partial")
    assert leftover.read_bytes() == b"half of it"
    with closing(TensorStore(tmp_path)) as store:
        assert len(store) == 3 and leftover.exists()  # it might be at work
        rows = store.read([key_of(number) for number in range(6)])
        assert all(same(row, row_of(number)) for number, row in enumerate(rows[:3])) and rows[3:] == [None] * 3
    os.utime(leftover, (time.time() - 2 * 86400,) * 2)
    assert len(TensorStore(tmp_path)) == 3 and not leftover.exists()


def test_an_interrupted_row_does_not_shift_the_next(tmp_path: Path) -> None:
    class Broken(dict):
        def items(self) -> Iterator[tuple[str, Tensor]]:
            yield "logits", torch.ones(3)
            raise RuntimeError("out of memory")

    with closing(TensorStore(tmp_path)) as store:
        with pytest.raises(RuntimeError, match="out of memory"):
            store.write([key_of(0), key_of(1)], [row_of(0), Broken(row_of(1))])
        store.write([key_of(2)], [row_of(2)])
    store = TensorStore(tmp_path)
    rows = store.read([key_of(number) for number in range(3)])
    assert same(rows[0], row_of(0)) and rows[1] is None and same(rows[2], row_of(2))
