"""The binary `benchmark`, run as people run it, on a scene of a hundred splats."""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from binaries import run_binary

from experiments.benchmarks import measure, peers, rasterizer, scenes

KEYS = {
    "implementation", "n", "size", "forward_ms", "forward_backward_ms", "peak_mb", "compile_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    result = run_binary(
        "benchmark",
        *("--suite=rasterizer", f"--json={folder / 'new' / 'rows.json'}", "--n=100", "--sizes=32"),
        *(f"--markdown={folder / 'table.md'}", "--repeats=2", "--seconds=0.1"),
        "--implementations=tiled,gsplat_torch",
    )
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "new" / "rows.json").read_text()), folder, result


def test_rows_are_complete(finished):
    rows, folder, _ = finished
    assert [path.name for path in (folder / "new").iterdir()] == ["rows.json"]
    assert all(set(row) == KEYS and (row["n"], row["size"]) == (100, 32) for row in rows)
    assert rows[0]["implementation"] == "tiled" and len(rows) in (1, 2)
    for row in rows:
        given = [row[key] for key in KEYS - {"implementation"} if row[key] is not None]
        assert all(math.isfinite(value) and value >= 0 for value in given)
        assert row["forward_ms"] > 0 and row["forward_backward_ms"] > 0
    assert rows[0]["compile_s"] > 0


def test_the_table_is_written_and_names_what_is_missing(finished):
    rows, folder, result = finished
    text = (folder / "table.md").read_text()
    assert text.strip() == result.stdout.strip() and rasterizer.table(rows) in text
    assert "jax" in text.splitlines()[0] and "threads" in text.splitlines()[0]
    assert ("`gsplat_torch` did not run" in text) == (len(rows) == 1)


def test_ratios_are_those_of_the_rows():
    def row(name, n, forward, both):
        return {
            "implementation": name, "n": n, "size": 64, "forward_ms": forward,
            "forward_backward_ms": both, "peak_mb": None, "compile_s": 1.25,
        }  # fmt: skip

    rows = [row("tiled", 10, 2.0, 8.0), row("gsplat_torch", 10, 5.0, 100.0), row("tiled", 9, 1, 2)]
    lines = [line.strip("| ").split(" | ") for line in rasterizer.table(rows).splitlines()[2:]]
    assert lines[0] == ["10", "64²", "`tiled`", "2.00", "2.50", "8.00", "12.5", "-", "1.25"]
    assert [line[4] for line in lines] == ["2.50", "1.00", "-"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--suite=network"], 2, "rasterizer"),
        (["--n=ten"], 2, "whole numbers above 0"),
        (["--words=fast"], 1, "--words has no part in --suite=rasterizer"),
        (["--implementations=tyled"], 1, "There is no rasterizer 'tyled'"),
        (["--markdown={tmp}"], 1, "is a folder"),
    ],
)
def test_mistakes_end_in_one_sentence_and_keep_the_file(arguments, code, words, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text("[]")
    result = run_binary(
        "benchmark",
        *("--suite=rasterizer", f"--json={file}", "--n=100"),
        *(text.format(tmp=tmp_path) for text in arguments),
    )
    assert result.returncode == code, result.stderr
    assert words in result.stderr and "Traceback" not in result.stderr
    assert file.read_text() == "[]"


def test_peers_that_cannot_run_are_left_out(monkeypatch):
    def absent(scene):
        raise ModuleNotFoundError("No module named 'absent'")

    monkeypatch.setitem(peers.PEERS, "absent", absent)
    cell = rasterizer.run(["absent"], "ball", 10, 16, repeats=1, seconds=0)
    assert cell.rows == [] and cell.failures == {
        "absent": "ModuleNotFoundError: No module named 'absent'."
    }


def test_the_first_image_is_what_the_others_must_show():
    image = np.zeros((4, 4, 3))
    assert rasterizer._difference("a", image, image) == 0.0
    with pytest.raises(ValueError, match="a draws another image"):
        rasterizer._difference("a", image + 0.01, image)
    with pytest.raises(ValueError, match="a draws another image"):
        rasterizer._difference("a", image + np.nan, image)


def test_capacity_grows_until_nothing_is_missing(monkeypatch):
    def draw(name, scene, capacity, splats, camera):
        missing = 5000 if capacity is None else max(5000 - capacity, 0)
        return types.SimpleNamespace(overflow=missing)

    monkeypatch.setattr(rasterizer, "_draw", draw)
    monkeypatch.setattr(rasterizer.jax, "jit", lambda function: function)
    assert rasterizer._capacity("tiled", scenes.ball("ball", 100, 16)) == 8192


def test_peak_memory_is_what_a_call_adds():
    peak = measure.in_fresh_process(_peak_of_100_mb)
    assert peak is None or peak == pytest.approx(100, abs=2)


def test_every_call_has_its_turn_in_every_round():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = measure.rounds(calls, repeats=3, seconds=60)
    assert "".join(order) == 3 * "aabb"
    assert all(len(times) == 3 and min(times) >= 0 for times in samples.values())
    assert {*measure.in_turn(calls, repeats=9, seconds=0)} == {"a", "b"}
    assert "".join(order[12:]) == "aabb"  # one round, however short the time


def test_a_spread_is_of_quartiles():
    assert measure.Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)


def test_memory_of_a_program_counts_what_is_donated_once():
    shape = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    plain = jax.jit(lambda x: x + 1).lower(shape).compile()
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(shape).compile()
    assert measure.program_mb(plain) == pytest.approx(8, abs=0.1)
    assert measure.program_mb(donated) == pytest.approx(4, abs=0.1)


def test_the_peak_of_a_process_is_its_own():
    held = np.ones(800_000_000, np.uint8)
    before, after = measure.in_fresh_process(_peaks_around_100_mb)
    if before is not None:  # where /proc tells
        assert measure.process_peak_mb() > held.nbytes / 1e6 > before
        assert after - before == pytest.approx(100, abs=20)


def _peaks_around_100_mb():
    before = measure.process_peak_mb()
    return before, (np.ones(100_000_000, np.uint8), measure.process_peak_mb())[1]


def _peak_of_100_mb():
    return measure.peak_mb(lambda: np.ones(100_000_000, np.uint8), on_host=True)
