"""Files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write to a temporary file beside the target and rename it, which is atomic on one file system.

    Args:
        path: File to write or replace, in a folder that exists. Until then, the file's name is followed by a unique
            number and `.partial`.
        parts: The content, piece by piece.

    Raises:
        OSError: When the file cannot be written; an old file is then left as it was, and no temporary file stays.
    """
    # Not tempfile: its files are readable by their owner only, and the rename would keep that.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(temporary, "xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
