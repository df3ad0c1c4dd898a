"""What a store may take of a disk, and what happens when it gets no more."""

import os
import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from stored_rows import WARNING, key_of, row_of, same, shards, warnings_in

from hf_semckd.errors import InputError
from hf_semckd.teacher.cache.store import TensorStore, check_space

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
    with disk(monkeypatch, total, free), closing(TensorStore(tmp_path)) as store:
        for number in range(3):
            store.write([key_of(number)], [row_of(number)])
            store.flush()
    assert len(shards(tmp_path)) == (3 if stored else 0)
    assert len(warnings_in(caplog)) == (0 if stored else 1)
    if not stored:
        assert WARNING in caplog.text and "received" in caplog.text and "max_tokens" in caplog.text


def test_the_limit_counts_the_whole_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "somebody_elses").write_bytes(bytes(10_000))
    with closing(TensorStore(tmp_path, limit_bytes=14_000, shard_bytes=1024)) as store:
        for number in range(20):
            store.write([key_of(number)], [row_of(number)])
        store.flush()
        kept = len(store)
        store.write([key_of(99)], [row_of(99)])
        assert len(store) == kept and store.read([key_of(99)]) == [None]
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
    with closing(TensorStore(tmp_path, shard_bytes=1)) as store:
        for number in range(5):
            store.write([key_of(number)], [row_of(number)])
        store.flush()
        assert store.read([key_of(0)]) == [None]
    assert os.listdir(tmp_path) == []
    assert len(warnings_in(caplog)) == 1 and "No space left" in caplog.text


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
