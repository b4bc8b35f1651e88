"""Bulk work: every item once, whatever happens to the others or to the run."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d4d_jax.data import bulk


@dataclasses.dataclass(frozen=True)
class Square:
    """Squares a number, notes that it did, and fails on negative ones."""

    log: str
    pause: float = 0.0

    def __call__(self, item: int) -> dict:
        with open(self.log, "a", encoding="utf-8") as stream:
            stream.write(f"{item}\n")
        time.sleep(self.pause)
        if item < 0:
            raise ValueError(f"The number {item}\nis negative.")
        return {"square": item * item, "process": os.getpid()}


@dataclasses.dataclass(frozen=True)
class KillAfter:
    """Kills its process on "bad", as soon as the outcome of "one" is in the folder."""

    folder: str

    def __call__(self, item: str) -> dict:
        if item == "bad":
            deadline = time.monotonic() + 60
            while "one" not in bulk.read(self.folder, ["one"]) and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return {"item": item}


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log.txt"


def calls(log):
    return sorted(map(int, log.read_text().split())) if log.exists() else []


ITEMS = {"three": 3, "a/b c": -2, "ü" * 300: 5}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_costs_one_item(tmp_path, log, workers):
    outcomes = bulk.run(Square(str(log)), ITEMS, folder=tmp_path / "out", workers=workers)
    assert [outcome.key for outcome in outcomes] == list(ITEMS)
    assert [outcome.value.get("square") for outcome in outcomes] == [9, None, 25]
    assert [outcome.error for outcome in outcomes] == [None, "The number -2 is negative.", None]
    assert all(outcome.seconds >= 0 for outcome in outcomes)
    here = {outcome.value["process"] for outcome in outcomes if outcome.value} == {os.getpid()}
    assert here == (workers == 1)


def test_finished_items_are_not_repeated_and_failures_only_on_request(tmp_path, log):
    work, folder = Square(str(log)), tmp_path / "out"
    first = bulk.run(work, ITEMS, folder=folder)
    kept = bulk.run(work, ITEMS, folder=folder, retry_failures=False)
    assert kept == first
    assert calls(log) == [-2, 3, 5]
    again = bulk.run(work, {**ITEMS, "new": 7}, folder=folder)
    assert calls(log) == [-2, -2, 3, 5, 7]
    assert [outcome.value.get("square") for outcome in again] == [9, None, 25, 49]
    assert bulk.read(folder, ["three", "unknown"]) == {"three": first[0]}


def test_an_outcome_is_there_whole_or_not_at_all(tmp_path, log):
    """Killed at any moment, the folder holds readable outcomes and the rest is done later."""
    folder = tmp_path / "out"
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_bulk;"
        "from d4d_jax.data import bulk;"
        "bulk.run(test_bulk.Square(sys.argv[2], 0.1), {str(i): i for i in range(40)},"
        " folder=sys.argv[3])"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(log), str(folder)]
    process = subprocess.Popen(command)
    while len(calls(log)) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert 3 <= len(before) < 40
    outcomes = bulk.run(Square(str(log)), {str(i): i for i in range(40)}, folder=folder)
    assert [outcome.value["square"] for outcome in outcomes] == [i * i for i in range(40)]
    assert len(calls(log)) <= 41  # the item that was being worked on, twice


def test_a_killed_worker_is_reported_and_nothing_lost(tmp_path):
    items = {name: name for name in ("one", "bad", "three", "four", "five")}
    with pytest.raises(RuntimeError, match=r"worker process was killed.*workers=2"):
        bulk.run(KillAfter(str(tmp_path)), items, folder=tmp_path, workers=2)
    assert bulk.read(tmp_path, items)["one"].value == {"item": "one"}


def test_progress_is_logged(tmp_path, log, caplog):
    with caplog.at_level("INFO"):
        bulk.run(Square(str(log)), ITEMS, folder=tmp_path / "out")
    assert "The number -2 is negative." in caplog.text
    assert "3 of 3 done, 1 failed" in caplog.text and "0:00 to go" in caplog.text


def test_mistakes(tmp_path, log, monkeypatch):
    with pytest.raises(ValueError, match="workers must be at least 1; got 0"):
        bulk.run(Square(str(log)), ITEMS, folder=tmp_path, workers=0)
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ValueError, match=r"d4d_jax\[beam\]"):
        bulk.run(Square(str(log)), ITEMS, folder=tmp_path, beam=[])
    assert calls(log) == []
