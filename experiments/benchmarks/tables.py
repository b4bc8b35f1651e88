"""Figures as text."""

from collections.abc import Iterable, Sequence


def number(value: float | None) -> str:
    """Three digits or all before the point; a dash for None."""
    if value is None:
        return "-"
    size = abs(value)
    return f"{value:.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f}"


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> str:
    """A table whose first `left` columns are words, the others numbers."""
    marks = ["---" if i < left else "--:" for i in range(len(headings))]
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return "\n".join([lines[0], f"|{'|'.join(marks)}|", *lines[1:]])
