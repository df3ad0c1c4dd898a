"""Shards: the same bits back, files that anybody can read, and damage that costs nothing."""

import io
import json
import logging
import os
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from stored_rows import bits, filled, flip, key_of, row_of, same, shards, warnings_in

from hf_semckd.teacher.cache.shard import row_bytes
from hf_semckd.teacher.cache.store import TensorStore

ODD_ROWS = [
    {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "flags": torch.tensor([True, False, True])},
    {"half": torch.randn(3, 5).half(), "brain": torch.randn(7).bfloat16(), "long": torch.arange(5) - 2},
    {"half": torch.randn(4, 5).half(), "brain": torch.randn(1).bfloat16(), "long": torch.arange(9) - 2},
    {"nan": torch.tensor([float("nan"), -0.0, float("inf")]), "complex": torch.randn(3, dtype=torch.complex128)},
    {"turned": torch.randn(4, 6).t(), "byte": torch.arange(3, dtype=torch.uint8), "wide": torch.randn(1).double()},
    {"eight": torch.randn(5).to(torch.float8_e4m3fn), "learned": torch.randn(2, requires_grad=True).detach()},
    {"nothing": torch.empty(0, dtype=torch.int16)},
    {},
    {"same everywhere": torch.randn(1, 3).expand(4, 3), "conjugate": torch.randn(2, dtype=torch.complex64).conj()},
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
    order = [5, 2, 7, 0, 1, 8, 3, 6, 4]
    got = store.read([keys[number] for number in order])
    assert all(same(row, ODD_ROWS[number]) for row, number in zip(got, order, strict=True))
    assert len(store) == 9
    store.close()


def test_rows_are_on_the_cpu_whatever_the_default_device(tmp_path: Path) -> None:
    with closing(TensorStore(tmp_path)) as store:
        store.write([key_of(0)], ODD_ROWS[:1])
    with torch.device("meta"):
        assert same(TensorStore(tmp_path).read([key_of(0)])[0], ODD_ROWS[0])


def test_files_are_plain_arrow(tmp_path: Path) -> None:
    rows = [row_of(0, 3), row_of(1, 3), row_of(2, 50)]
    with closing(TensorStore(tmp_path)) as store:
        store.write([key_of(number) for number in range(3)], rows)
    (path,) = shards(tmp_path)
    table = pa.ipc.open_file(path.read_bytes()).read_all().to_pydict()
    assert list(table) == ["key", "layout", "checksum", "row"]
    assert table["key"] == [key_of(number) for number in range(3)]
    for number, row in enumerate(rows):
        layout, blob, width = table["layout"][number], table["row"][number], row["logits"].numel()
        assert json.loads(layout) == [["logits", "float32", [width]], ["count", "int64", []]]
        assert zlib.crc32(key_of(number) + layout.encode() + blob) == table["checksum"][number]
        assert blob[: 4 * width] == bits(row["logits"]) and blob[-8:] == bits(row["count"])
        assert path.read_bytes().index(blob) % 8 == 0 and len(blob) % 8 == 0
        assert row_bytes(row) == len(blob) + 20 + 4 + 4 + 8
    # The rows are most of a large file, so that the estimate holds.
    (large,) = filled(tmp_path / "many", 1000)
    assert large.stat().st_size == pytest.approx(1000 * row_bytes(row_of(0)), rel=0.01)


def test_rows_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    (path,) = filled(tmp_path)
    whole = path.read_bytes()
    store = TensorStore(tmp_path)
    first, second = (store.read([key_of(3)])[0]["logits"] for _ in range(2))
    assert first.data_ptr() == second.data_ptr()
    assert first.data_ptr() % 8 == 0
    assert not [name for name in os.listdir("/proc/self/fd") if fd_target(name) == str(path)]  # thousands may be open
    first.zero_()  # not what a reader should do, but nobody else gets to know
    assert path.read_bytes() == whole
    file = io.BytesIO()
    torch.save(second, file)
    assert len(file.getvalue()) < len(whole), "a saved view takes the whole file along"


def fd_target(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""


def renamed(raw: bytes, old: bytes, new: bytes) -> bytes:
    assert raw.count(old) == 2 and len(old) == len(new)  # the schema stands at both ends of the file
    return raw.replace(old, new)


def rewritten(change: Callable[[pa.Table], list[pa.Table]]) -> Callable[[bytes], bytes]:
    def rewrite(raw: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        tables = change(pa.ipc.open_file(raw).read_all())
        with pa.ipc.new_file(sink, tables[0].schema) as writer:
            for table in tables:
                writer.write_table(table)
        return sink.getvalue().to_pybytes()

    return rewrite


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda raw: raw[:-1], id="last byte gone"),
        pytest.param(lambda raw: raw[: len(raw) // 2], id="half gone"),
        pytest.param(lambda raw: raw[:20], id="head only"),
        pytest.param(lambda raw: b"", id="empty"),
        pytest.param(lambda raw: b"no Arrow at all, but long enough to be", id="another format"),
        pytest.param(lambda raw: raw[:-10] + b"\xff\xff\xff\x7f" + raw[-6:], id="length of the footer"),
        pytest.param(lambda raw: raw[:-10] + bytes(4) + raw[-6:], id="no footer"),
        pytest.param(lambda raw: renamed(raw, b"checksum", b"checksun"), id="a column missing"),
        pytest.param(rewritten(lambda table: [table.cast(schema_with(checksum=pa.int64()))]), id="another type"),
        pytest.param(rewritten(lambda table: [table, table]), id="two batches"),
        pytest.param(rewritten(lambda table: [table.slice(0, 0)]), id="no batch"),
        pytest.param(rewritten(lambda table: [without_values(table, "checksum")]), id="no checksums"),
        pytest.param(rewritten(lambda table: [without_values(table, "layout")]), id="no layouts"),
    ],
)
def test_an_unreadable_file_is_absent_and_made_again(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = filled(tmp_path)
    whole = path.read_bytes()
    assert damage(whole) != whole
    path.write_bytes(damage(whole))
    with closing(TensorStore(tmp_path)) as store:
        store.refresh()
        assert store.read([key_of(0), key_of(5)]) == [None, None]
        assert len(store) == 0
        assert len(warnings_in(caplog)) == 1 and path.name in caplog.text
        assert not path.exists()
        store.write([key_of(0)], [row_of(0)])
    assert same(TensorStore(tmp_path).read([key_of(0)])[0], row_of(0))


def schema_with(**types: pa.DataType) -> pa.Schema:
    plain = {
        "key": pa.binary(20),
        "layout": pa.dictionary(pa.int32(), pa.string()),
        "checksum": pa.uint32(),
        "row": pa.large_binary(),
    }
    return pa.schema({**plain, **types})


def without_values(table: pa.Table, name: str) -> pa.Table:
    kind = table.schema.field(name).type
    return table.set_column(table.schema.get_field_index(name), name, pa.nulls(len(table), kind))


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


def test_a_damaged_row_is_absent_and_a_later_one_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = filled(tmp_path)
    for damaged in (3, 4):
        flip(path, path.read_bytes().index(bits(row_of(damaged)["logits"])) + 50)
    with closing(TensorStore(tmp_path)) as store:
        rows = store.read([key_of(number) for number in range(6)])
        assert [number for number in range(6) if not same(rows[number], row_of(number))] == [3, 4]
        assert rows[3:5] == [None, None] and len(store) == 4
        assert len(warnings_in(caplog)) == 1 and "damaged" in caplog.text
        store.write([key_of(3)], [row_of(3)])
        store.flush()
        assert same(store.read([key_of(3)])[0], row_of(3))
    assert same(TensorStore(tmp_path).read([key_of(3)])[0], row_of(3))


def test_no_flipped_bit_gives_wrong_rows_or_an_error(tmp_path: Path) -> None:
    """Each byte in turn: schema, layouts, keys, checksums, offsets, rows, footer."""
    rows = {key_of(1): {"a": torch.arange(6.0).reshape(2, 3)}, key_of(2): {"a": torch.arange(6.0).reshape(3, 2) + 9}}
    with closing(TensorStore(tmp_path / "good")) as store:
        store.write(list(rows), list(rows.values()))
    (path,) = shards(tmp_path / "good")
    whole = path.read_bytes()
    table = pa.ipc.open_file(whole).read_all()
    held = {
        key: (key, layout.encode(), blob) for key, layout, _, blob in zip(*table.to_pydict().values(), strict=True)
    }
    # Where each row's key, layout and bytes are: nothing there may change unseen.
    vital = {
        key: {place for part in parts for place in range(whole.index(part), whole.index(part) + len(part))}
        for key, parts in held.items()
    }
    copy = tmp_path / "bad" / path.name
    copy.parent.mkdir()
    logging.disable(logging.WARNING)
    try:
        for position in range(len(whole)):
            for mask in (0x01, 0x80):
                copy.write_bytes(whole[:position] + bytes([whole[position] ^ mask]) + whole[position + 1 :])
                got = TensorStore(copy.parent).read(list(rows))
                for key, row in zip(rows, got, strict=True):
                    assert row is None or same(row, rows[key]), position
                    assert row is None or position not in vital[key], position
    finally:
        logging.disable(logging.NOTSET)
