"""Files that are whole or absent, whatever ends their writer. Imports no torch.

The crash argument. The bytes are on disk before the file has its name, and the rename replaces
whole files only; so after a crash at any point the path is absent, the old file, or the whole new
one. The directory's fsync makes the new name outlast a power cut.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomically(path: Path, content: bytes | str) -> None:
    """Make or replace the file; text as UTF-8. On failure the temporary file is removed.

    Raises: OSError where the disk fails; the old file is as it was then.
    """
    with replacing(path) as temporary:
        write_durably(temporary, content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name under which the new file is to be written, durably; at the end it becomes `path`.

    Raises: OSError where the disk fails; the old file is as it was then.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def write_durably(path: Path, content: bytes) -> None:
    """A new file, on disk on return; not atomic. Raises: FileExistsError where there is one."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def temporary_name(path: Path) -> Path:
    """Beside `path`, hidden, of no other process or attempt.

    Without the name of `path`: TensorBoard reads every file that has "tfevents" in its name.
    """
    return path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")


def sync_directory(path: Path) -> None:
    """Names that were made, renamed or removed in `path` outlast a power cut from here on."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
