"""Tab-separated tables and other text files that replace their predecessors whole."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path


def write_table(
    path: str | os.PathLike, columns: Sequence[str], rows: Sequence[Sequence[object]]
) -> None:
    """Writes tab-separated rows below a row of column names, atomically.

    White space within a cell becomes one space, so that every row is one line.
    """
    stream = io.StringIO()
    writer = csv.writer(
        stream, delimiter="\t", quoting=csv.QUOTE_NONE, lineterminator="\n", quotechar=None
    )
    writer.writerow(columns)
    writer.writerows([" ".join(str(cell).split()) for cell in row] for row in rows)
    write_text(path, stream.getvalue())


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file in UTF-8, atomically: a reader sees the old one or the new one."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
