"""The data suite of `benchmark`: every store holds every clip, and the table says so."""

import json

from binaries import run_binary

from d4d_jax import clips
from d4d_jax.data import synthetic


def test_stores_are_measured_beside_each_other(tmp_path):
    for i in range(3):
        clip = synthetic.make_clip(i, num_frames=4, size=16, samples=1)
        clips.write_clip(clip, tmp_path / "clips" / f"{i}")
    figures = tmp_path / "data.json"
    options = (f"--clips={tmp_path / 'clips'}", "--repeats=2", "--seconds=1")
    result = run_binary("benchmark", "--suite=data", f"--json={figures}", *options)
    assert result.returncode == 0, result.stderr
    rows = json.loads(figures.read_text())
    assert [row["store"] for row in rows] == ["clip folders", "ArrayRecord", "TFDS"]
    for row in rows:
        assert (row["size"], row["clips"]) == (16, 3)
        low, median, high = row["clips_per_s"]
        assert 0 < low <= median <= high
        assert f"| 16 | {row['store']} | {median:.0f} [{low:.0f}, {high:.0f}] |" in result.stdout
    assert rows[0]["x"] == [1.0, 1.0, 1.0]


def test_mistakes_end_in_one_sentence(tmp_path):
    json_path = f"--json={tmp_path / 'data.json'}"
    result = run_binary("benchmark", "--suite=data", json_path, "--clips=absent")
    assert result.returncode == 1 and "no folder of clips 'absent'" in result.stderr
    result = run_binary("benchmark", "--suite=data", json_path, "--n=5")
    assert result.returncode == 1 and "--n has no part in --suite=data" in result.stderr
