"""Writing without half-written files, and reading without surprises."""

import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

#: What NumPy, zipfile, JSON and our own checks raise on an archive that is not what it should be.
DAMAGE = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, AttributeError),
    *(zipfile.BadZipFile, zlib.error),
)


def replace_file(path: str | os.PathLike, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes beside the target and renames, so that the target is never half written.

    Args:
        path: the target; missing folders are made.
        write: receives the open temporary file, whose `name` is its path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
