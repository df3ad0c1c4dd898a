"""The store of teacher outputs: the same bits back, files that anybody can read, and damage that costs nothing."""

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hf_semckd.errors import InputError
from hf_semckd.teacher.cache import store as store_module
from hf_semckd.teacher.cache.store import TensorStore, check_space, read_manifest, write_manifest

NOBODY = 65534
WARNING = "not stored any more"


def key_of(number: int) -> bytes:
    return number.to_bytes(20, "big")


def row_of(number: int, width: int = 100) -> dict[str, Tensor]:
    return {"logits": torch.arange(width, dtype=torch.float32) + number, "count": torch.tensor(number)}


def same(got: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> bool:
    if got is None or list(got) != list(expected):
        return False
    return all(
        got[name].dtype == value.dtype and got[name].shape == value.shape and bits(got[name]) == bits(value)
        for name, value in expected.items()
    )


def bits(value: Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def filled(folder: Path, count: int = 6, **settings: int) -> list[Path]:
    """Write rows 0, 1, ... and return the files."""
    with TensorStore(folder, **settings) as store:
        store.write([key_of(number) for number in range(count)], [row_of(number) for number in range(count)])
    return shards(folder)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


ODD_ROWS = [
    {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "flags": torch.tensor([True, False, True])},
    {"half": torch.randn(3, 5).half(), "brain": torch.randn(7).bfloat16(), "long": torch.arange(5) - 2},
    {"half": torch.randn(4, 5).half(), "brain": torch.randn(1).bfloat16(), "long": torch.arange(9) - 2},
    {"nan": torch.tensor([float("nan"), -0.0, float("inf")]), "complex": torch.randn(3, dtype=torch.complex128)},
    {"turned": torch.randn(4, 6).t(), "byte": torch.arange(3, dtype=torch.uint8), "wide": torch.randn(1).double()},
    {"eight": torch.randn(5).to(torch.float8_e4m3fn), "learned": torch.randn(2, requires_grad=True).detach()},
    {"nothing": torch.empty(0, dtype=torch.int16)},
    {},
]


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("shard_bytes", [1, 200, 2**20])
def test_every_row_comes_back_bit_equal(tmp_path: Path, shard_bytes: int, flushed: bool) -> None:
    keys = [key_of(number) for number in range(len(ODD_ROWS))]
    store = TensorStore(tmp_path, shard_bytes=shard_bytes)
    store.write(keys, ODD_ROWS)
    if flushed:
        store.close()
        store = TensorStore(tmp_path)
    order = [5, 2, 7, 0, 1, 3, 6, 4]
    got = store.read([keys[number] for number in order])
    assert all(same(row, ODD_ROWS[number]) for row, number in zip(got, order, strict=True))
    assert (store.hits, store.misses, len(store)) == (8, 0, 8)
    store.close()


def test_values_are_those_at_the_time_of_writing(tmp_path: Path) -> None:
    row = {"logits": torch.zeros(4, requires_grad=True)}
    with TensorStore(tmp_path) as store:
        store.write([key_of(1)], [row])
        with torch.no_grad():
            row["logits"].fill_(7)
        store.read([key_of(1)])[0]["logits"].fill_(9)  # what a reader does to a buffered row does not count either
        store.flush()
        assert store.read([key_of(1)])[0]["logits"].tolist() == [0, 0, 0, 0]


def test_files_are_plain_aligned_safetensors(tmp_path: Path) -> None:
    rows = [row_of(0, 3), row_of(1, 3), row_of(2, 50)]
    with TensorStore(tmp_path) as store:
        store.write([key_of(number) for number in range(3)], rows)
    (path,) = shards(tmp_path)
    with safe_open(path, framework="pt") as file:
        layouts = json.loads(file.metadata()["layouts"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert len(layouts) == 2  # the first two rows are laid out alike
    assert tensors["keys"].numpy().tobytes() == b"".join(key_of(number) for number in range(3))
    raw = path.read_bytes()
    data = 8 + int.from_bytes(raw[:8], "little")
    for number, row in enumerate(rows):
        first, length = int(tensors["offsets"][number]), int(tensors["lengths"][number])
        blob = tensors["rows"][first : first + length].numpy().tobytes()
        assert (data + first) % 64 == 0
        assert raw[data + first : data + first + length] == blob
        layout = layouts[int(tensors["layouts"][number])]
        assert json.loads(layout) == [["logits", "float32", [row["logits"].numel()]], ["count", "int64", []]]
        checksum = zlib.crc32(key_of(number) + layout.encode() + blob)
        assert checksum == int(tensors["checksums"][number])
        assert blob[: row["logits"].numel() * 4] == bits(row["logits"])
        assert blob[-64:-56] == bits(row["count"])


def test_rows_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    (path,) = filled(tmp_path)
    store = TensorStore(tmp_path)
    first, second = (store.read([key_of(3)])[0]["logits"] for _ in range(2))
    assert first.data_ptr() == second.data_ptr()
    assert first.data_ptr() % 64 == 0
    assert not [name for name in os.listdir("/proc/self/fd") if fd_target(name) == str(path)]  # thousands may be open


def fd_target(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""


def test_a_later_row_replaces_an_earlier_one(tmp_path: Path) -> None:
    with TensorStore(tmp_path) as store:
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


def test_a_full_shard_is_written_without_a_flush(tmp_path: Path) -> None:
    store = TensorStore(tmp_path, shard_bytes=1024)
    store.write([key_of(number) for number in range(9)], [row_of(number) for number in range(9)])  # 512 bytes each
    deadline = time.monotonic() + 10
    while len(shards(tmp_path)) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(shards(tmp_path)) == 4  # two rows each; the ninth row is still buffered
    assert all(same(row, row_of(number)) for number, row in enumerate(store.read([key_of(n) for n in range(9)])))


def test_buffers_are_bounded_while_the_disk_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, entered = threading.Event(), threading.Event()
    write = store_module.write_atomically

    def slow(*arguments: object) -> None:
        entered.set()
        assert gate.wait(10)
        write(*arguments)

    monkeypatch.setattr(store_module, "write_atomically", slow)
    store = TensorStore(tmp_path, shard_bytes=1)
    done = []

    def fill() -> None:
        for number in range(8):
            store.write([key_of(number)], [row_of(number)])
            done.append(number)

    writer = threading.Thread(target=fill, daemon=True)
    writer.start()
    assert entered.wait(10)
    writer.join(0.3)
    assert len(done) == store_module.WAITING_BUFFERS + 1
    # Neither what is being written nor what waits is out of sight.
    assert all(row is not None for row in store.read([key_of(number) for number in done]))
    gate.set()
    writer.join(10)
    store.flush()
    assert len(done) == 8 and len(shards(tmp_path)) == 8


# The package is imported without its __init__, which costs seconds.
ALONE = """
import sys, threading, types
import torch
folder, root = sys.argv[1:3]
package = types.ModuleType("hf_semckd")
package.__path__ = [root + "/hf_semckd"]
sys.modules["hf_semckd"] = package
from hf_semckd.teacher.cache import store as store_module
"""
WRITER = (
    ALONE
    + """
first = int(sys.argv[3])
with store_module.TensorStore(folder, shard_bytes=4096) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(first, first + 150):
        row = {"logits": torch.arange(100, dtype=torch.float32) + number, "count": torch.tensor(number)}
        store.write([number.to_bytes(20, "big")], [row])
"""
)
ABANDONER = (
    ALONE
    + """
store_module.write_atomically = lambda *arguments: threading.Event().wait()
store = store_module.TensorStore(folder, shard_bytes=1)
store.write([bytes(20), bytes(19) + b"1"], [{"a": torch.ones(9)}, {"a": torch.ones(9)}])
print("written", len(store))
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
    assert [process.wait(60) for process in processes] == [0, 0]
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
    with TensorStore(tmp_path) as writer:
        writer.write([key_of(77)], [row_of(77)])
    monkeypatch.setattr(store_module, "REFRESH_SECONDS", 1000)
    assert reader.read([key_of(77)]) == [None]  # not at every unknown key
    reader.refresh()
    assert same(reader.read([key_of(77)])[0], row_of(77))


def test_refresh_lists_the_folder_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    os.utime(tmp_path, (1, 1))
    store = TensorStore(tmp_path)
    listed: list[object] = []
    listing = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or listing(path))
    store.refresh()
    assert listed == []
    (tmp_path / "new").touch()
    store.refresh()
    store.refresh()  # a time of just now is not trusted
    assert len(listed) == 2


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda raw: raw[:-1], id="last byte gone"),
        pytest.param(lambda raw: raw[: len(raw) // 2], id="half gone"),
        pytest.param(lambda raw: raw[:20], id="header cut"),
        pytest.param(lambda raw: b"", id="empty"),
        pytest.param(lambda raw: b"\xff" * 8 + raw[8:], id="header length"),
        pytest.param(lambda raw: raw.replace(b'"offsets"', b'"0ffsets"'), id="table missing"),
        pytest.param(lambda raw: raw.replace(b'"I64"', b'"F64"', 1), id="table of another type"),
        pytest.param(lambda raw: raw.replace(b'"layouts": "[', b'"layouts": "{'), id="layouts no list"),
        pytest.param(lambda raw: raw.replace(b'{"__metadata__"', b'{"__netadata__"'), id="no metadata"),
    ],
)
def test_an_unreadable_file_is_absent_and_made_again(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = filled(tmp_path)
    whole = path.read_bytes()
    assert damage(whole) != whole
    path.write_bytes(damage(whole))
    with TensorStore(tmp_path) as store:
        store.refresh()
        assert store.read([key_of(0), key_of(5)]) == [None, None]
        assert (len(store), store.misses) == (0, 2)
        assert len(warnings_in(caplog)) == 1 and path.name in caplog.text
        assert not path.exists()
        store.write([key_of(0)], [row_of(0)])
    assert same(TensorStore(tmp_path).read([key_of(0)])[0], row_of(0))


def test_a_file_cut_while_it_is_mapped_is_absent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = filled(tmp_path)
    store = TensorStore(tmp_path)
    assert same(store.read([key_of(0)])[0], row_of(0))
    os.truncate(path, 100)  # whoever touches the map now is killed
    assert store.read([key_of(number) for number in range(6)]) == [None] * 6
    assert len(store) == 0 and not path.exists()
    assert len(warnings_in(caplog)) == 1


def test_a_file_deleted_by_another_run_stays_readable(tmp_path: Path) -> None:
    (path,) = filled(tmp_path)
    store = TensorStore(tmp_path)
    path.unlink()
    assert same(store.read([key_of(1)])[0], row_of(1))


def flip(path: Path, position: int, mask: int = 1) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= mask
    path.write_bytes(raw)


def test_a_damaged_row_is_absent_and_a_later_one_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = filled(tmp_path)
    for damaged in (3, 4):
        flip(path, path.read_bytes().index(bits(row_of(damaged)["logits"])) + 50)
    with TensorStore(tmp_path) as store:
        rows = store.read([key_of(number) for number in range(6)])
        assert [number for number in range(6) if not same(rows[number], row_of(number))] == [3, 4]
        assert rows[3:5] == [None, None] and key_of(3) not in store and key_of(2) in store
        assert (store.hits, store.misses) == (4, 2)
        assert len(warnings_in(caplog)) == 1 and "damaged" in caplog.text
        store.write([key_of(3)], [row_of(3)])
        store.flush()
        assert same(store.read([key_of(3)])[0], row_of(3))
    assert same(TensorStore(tmp_path).read([key_of(3)])[0], row_of(3))


def test_no_flipped_bit_gives_wrong_rows_or_an_error(tmp_path: Path) -> None:
    """Each byte in turn: header, layouts, tables, keys, rows."""
    rows = {key_of(0): {"a": torch.arange(6.0).reshape(2, 3)}, key_of(1): {"a": torch.arange(6.0).reshape(3, 2)}}
    with TensorStore(tmp_path / "good") as store:
        store.write(list(rows), list(rows.values()))
    (path,) = shards(tmp_path / "good")
    whole = path.read_bytes()
    copy = tmp_path / "bad" / path.name
    copy.parent.mkdir()
    logging.disable(logging.WARNING)
    lost = 0
    try:
        for position in range(len(whole)):
            for mask in (0x01, 0x80):
                copy.write_bytes(whole[:position] + bytes([whole[position] ^ mask]) + whole[position + 1 :])
                got = TensorStore(copy.parent).read(list(rows))
                lost += got.count(None)
                assert all(row is None or same(row, rows[key]) for key, row in zip(rows, got, strict=True)), position
    finally:
        logging.disable(logging.NOTSET)
    assert lost > len(whole)


def test_foreign_files_and_old_leftovers(tmp_path: Path) -> None:
    (path,) = filled(tmp_path)
    foreign = [tmp_path / name for name in ("model.safetensors", "rows-v2-1.safetensors", "notes.partial")]
    old, young, old_manifest = (
        tmp_path / f"{name}.{'0' * 31}{digit}.partial"
        for digit, name in enumerate((path.name, path.name, "manifest.json"))
    )
    for file in (*foreign, old, young, old_manifest):
        file.write_bytes(b"nothing readable")
    for file in (*foreign, old, old_manifest):
        os.utime(file, (time.time() - 2 * 86400,) * 2)
    store = TensorStore(tmp_path)
    assert len(store) == 6
    assert all(file.exists() for file in (*foreign, young))
    assert not old.exists() and not old_manifest.exists()


Usage = namedtuple("Usage", "total used free")


@contextmanager
def disk(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> Iterator[None]:
    with monkeypatch.context() as context:
        # As the real one, it knows nothing of a folder that does not exist.
        context.setattr(shutil, "disk_usage", lambda path: os.stat(path) and Usage(total, total - free, free))
        yield


@pytest.mark.parametrize(
    ("total", "free", "stored"),
    [
        (10 * 2**30, 2**30 + 10_000, True),
        (10 * 2**30, 2**30 + 1_000, False),
        (1000 * 2**30, 19 * 2**30, False),
        (1000 * 2**30, 21 * 2**30, True),
    ],
)
def test_a_full_disk_ends_the_storing_with_one_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    total: int,
    free: int,
    stored: bool,
) -> None:
    with disk(monkeypatch, total, free), TensorStore(tmp_path) as store:
        for number in range(3):
            store.write([key_of(number)], [row_of(number)])
            store.flush()
    assert len(shards(tmp_path)) == (3 if stored else 0)
    assert len(warnings_in(caplog)) == (0 if stored else 1)
    if not stored:
        assert WARNING in caplog.text and "received" in caplog.text and "max_tokens" in caplog.text


def test_the_limit_counts_the_whole_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "somebody_elses").write_bytes(bytes(10_000))
    with TensorStore(tmp_path, limit_bytes=14_000, shard_bytes=1024) as store:
        for number in range(20):
            store.write([key_of(number)], [row_of(number)])
        store.flush()
        kept = len(store)
        store.write([key_of(99)], [row_of(99)])
        assert key_of(99) not in store
        assert all(
            same(row, row_of(number)) for number, row in enumerate(store.read([key_of(n) for n in range(kept)]))
        )
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    size = shards(tmp_path)[0].stat().st_size
    assert 14_000 - size < total <= 14_000
    assert kept == 2 * len(shards(tmp_path)) > 0
    assert len(warnings_in(caplog)) == 1 and "teacher_cache_limit_gb" in caplog.text


def test_an_error_of_the_disk_ends_the_storing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with TensorStore(tmp_path, shard_bytes=1) as store:
        for number in range(5):
            store.write([key_of(number)], [row_of(number)])
        store.flush()
        assert store.read([key_of(0)]) == [None]
    assert os.listdir(tmp_path) == []
    assert len(warnings_in(caplog)) == 1 and "No space left" in caplog.text


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
        flip(filled(folder)[0], 9)  # an unreadable file, which cannot be deleted
        folder.chmod(0o555)
        try:
            with powerless():
                with pytest.raises(OSError):
                    (folder / "probe").touch()
                with TensorStore(folder) as store:
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
    with TensorStore(tmp_path / "file" / "store") as store:
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
        assert key_of(500 + number) not in self.store  # a copy only reads
        row = self.store.read([key_of(number)])[0]
        return number, os.getpid(), torch.tensor(-1.0) if row is None else row["logits"].sum()


def test_forked_workers_of_a_data_loader_read(tmp_path: Path) -> None:
    filled(tmp_path, shard_bytes=1024)
    with TensorStore(tmp_path) as store:
        assert store.read([key_of(0)])[0] is not None  # a map is open
        store.write([key_of(6)], [row_of(6)])  # buffered here alone
        # One of the parent's threads holds the lock for as long as the workers live.
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            with store._changed:
                held.set()
                release.wait(60)

        holder = threading.Thread(target=hold, daemon=True)
        holder.start()
        assert held.wait(10)
        loader = DataLoader(Stored(store), num_workers=2, multiprocessing_context="fork", timeout=30)
        try:
            got = {int(number): (int(process), float(total)) for number, process, total in loader}
        finally:
            release.set()
            holder.join(10)
        assert {number: total for number, (_, total) in got.items()} == {
            **{number: float(row_of(number)["logits"].sum()) for number in range(6)},
            6: -1.0,
        }
        assert len({process for process, _ in got.values()} - {os.getpid()}) == 2
        assert same(store.read([key_of(6)])[0], row_of(6))
    assert len(TensorStore(tmp_path)) == 7


def test_a_pickled_copy_reads_and_does_not_write(tmp_path: Path) -> None:
    filled(tmp_path)
    with TensorStore(tmp_path, limit_bytes=2**30, shard_bytes=1024) as store:
        store.write([key_of(50)], [row_of(50)])
        with pickle.loads(pickle.dumps(store)) as copy:
            assert (copy.limit_bytes, copy.shard_bytes, copy.hits, len(copy)) == (2**30, 1024, 0, 6)
            copy.write([key_of(60)], [row_of(60)])
            assert copy.read([key_of(50), key_of(60)]) == [None, None]
            assert same(copy.read([key_of(4)])[0], row_of(4))
    assert len(shards(tmp_path)) == 2


def fork_and_flush(store: TensorStore, answers: "multiprocessing.SimpleQueue[int]") -> None:
    store.flush()
    store.close()
    answers.put(1)


def test_a_forked_child_does_not_wait_for_the_parents_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, entered = threading.Event(), threading.Event()
    write = store_module.write_atomically

    def slow(*arguments: object) -> None:
        entered.set()
        assert gate.wait(60)
        write(*arguments)

    monkeypatch.setattr(store_module, "write_atomically", slow)
    store = TensorStore(tmp_path, shard_bytes=1)
    store.write([key_of(0), key_of(1)], [row_of(0), row_of(1)])
    assert entered.wait(10)
    store.write([key_of(0)], [row_of(2)])
    assert same(store.read([key_of(0)])[0], row_of(2))  # the newest of several that wait
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=fork_and_flush, args=(store, answers))
    child.start()
    child.join(20)
    alive = child.is_alive()
    if alive:
        child.kill()
        child.join()
    assert not alive and child.exitcode == 0
    assert shards(tmp_path) == []
    gate.set()
    store.close()
    assert len(TensorStore(tmp_path)) == 2
    assert same(TensorStore(tmp_path).read([key_of(0)])[0], row_of(2))


def test_the_interpreter_exits_without_close(tmp_path: Path) -> None:
    done = subprocess.run(python(ABANDONER, tmp_path), timeout=60, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "written 2\n")


def test_check_space_compares_with_the_limit_and_with_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "not" / "yet"
    with disk(monkeypatch, total=100 * 2**30, free=12 * 2**30):
        check_space(folder, 10 * 2**30, None)  # the reserve is two per cent
        check_space(folder, 10 * 2**30, 10 * 2**30)
        with pytest.raises(InputError, match=r"11\.0 GiB to be written(.|\n)*12\.0 GiB free(.|\n)*2\.0 GiB reserve"):
            check_space(folder, 11 * 2**30, None)
        with pytest.raises(
            InputError, match=r"10\.0 GiB to be(.|\n)*limit_gb(.|\n)*9\.0 GiB(.|\n)*what to do"
        ) as told:
            check_space(folder, 10 * 2**30, 9 * 2**30)
        folder.mkdir(parents=True)
        (folder / "held").write_bytes(bytes(2048))
        with pytest.raises(InputError, match=r"2\.0 KiB that"):
            check_space(folder, 4096, 4096 + 2047)
        check_space(folder, 4096, 4096 + 2048)
    for remedy in (
        "max_tokens",
        "teacher_layers",
        'teacher_cache_dtype="float16"',
        "teacher_cache_limit_gb",
        "disk",
    ):
        assert remedy in str(told.value)
    check_space(tmp_path, 0, None)


def test_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    assert read_manifest(folder) is None
    write_manifest(folder, {"layers": [1, 2], "dtype": "float16"})
    assert read_manifest(folder) == {"layers": [1, 2], "dtype": "float16"}
    write_manifest(folder, {"layers": []})
    assert read_manifest(folder) == {"layers": []}
    assert os.listdir(folder) == ["manifest.json"]
    for damaged in (b'{"layers": [', b"\xff\xfe", b"[1]", b""):
        (folder / "manifest.json").write_bytes(damaged)
        assert read_manifest(folder) is None
