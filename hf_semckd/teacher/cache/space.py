"""Whether there is room on a disk, and below a limit, for what is to be stored."""

import contextlib
import os
import shutil
from pathlib import Path

from ...errors import InputError

# What a store leaves free on its disk: checkpoints and everybody else's files need room too.
RESERVE_BYTES = 2**30
RESERVE_SHARE = 0.02

ADVICE = (
    'lower max_tokens, name fewer teacher_layers, set teacher_cache_dtype="float16", raise '
    "teacher_cache_limit_gb, or choose a folder on another disk."
)


def check_space(folder: str | os.PathLike[str], needed_bytes: int, limit_bytes: int | None) -> None:
    """Raise `InputError` unless what is still to be written fits on the disk and, with the rest, below the limit."""
    folder = Path(folder)
    existing = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    disk = shutil.disk_usage(existing)
    reserve = max(RESERVE_BYTES, int(RESERVE_SHARE * disk.total))
    if limit_bytes is not None and (used := _folder_bytes(folder)) + needed_bytes > limit_bytes:
        received = f"about {_readable(needed_bytes)} to be written, beside {_readable(used)} that {folder} holds"
        expected = f"no more than teacher_cache_limit_gb in total, that is {_readable(limit_bytes)}"
    elif needed_bytes > disk.free - reserve:
        received = f"about {_readable(needed_bytes)} to be written below {folder}"
        expected = f"no more than the {_readable(disk.free)} free on its disk, less {_readable(reserve)} reserve"
    else:
        return
    what = "The teacher's outputs do not fit where they are to be stored"
    raise InputError(what, received=received, expected=expected, todo=ADVICE)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        # A file may go while the folder is being read.
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _readable(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
