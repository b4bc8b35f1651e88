"""The training suite of `benchmark`: bare steps and the loop, by turns."""

import json

from binaries import run_binary


def test_the_loop_is_measured_beside_its_steps(tmp_path):
    figures = tmp_path / "training.json"
    options = ("--train_config=smoke", "--steps=3", "--repeats=2")
    result = run_binary("benchmark", "--suite=training", f"--json={figures}", *options)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(figures.read_text())
    assert (row["steps"], row["rounds"], row["batch_size"], row["clips"]) == (3, 2, 1, 20)
    for name in ("bare_ms", "loop_ms"):
        low, median, high = row[name]
        assert 0 < low <= median <= high
    assert row["overhead"][1] > 0  # a checkpoint every three steps costs more than they do
    assert 0 < row["input_wait"][1] < 1
    assert f"| 3 | 2 | {row['bare_ms'][1]:.3g}" in result.stdout
