"""The binary that compares configurations, run as people run it."""

import dataclasses
import json

import numpy as np
import pytest
from binaries import run_binary
from capture_files import ring, write_transforms
from PIL import Image

from d4d_jax import clips
from d4d_jax.data import synthetic
from experiments import ablate


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate")
    for i, name in enumerate(("one", "two")):
        clips.write_clip(synthetic.make_clip(i, num_frames=4, size=24), folder / name)
    as_it_is = {"turn": np.eye(3), "scale": 1.0, "shift": np.zeros(3)}
    held_out = {"test": (ring(3), np.array([0.1, 0.5, 0.9]))}
    write_transforms(folder / "two", held_out, **as_it_is)
    arguments = [f"--clips={folder / name}" for name in ("one", "two")]
    arguments += ["--words=smoke", "--words=smoke,identity", f"--workdir={folder / 'out'}"]
    result = run_binary("ablate", *arguments)
    assert result.returncode == 0, result.stderr
    return folder, arguments, result


def test_a_row_is_the_mean_of_its_reports(compared):
    folder, _, result = compared
    text = (folder / "out" / "table.md").read_text()
    assert result.stdout == text
    for words in ("smoke", "smoke,identity"):
        one = json.loads((folder / "out" / words / "one" / "0.json").read_text())
        two = json.loads((folder / "out" / words / "two" / "0.json").read_text())
        assert "test" not in one and len(two) > len(one)  # judged by its front frames
        psnr = (one["front"]["psnr"] + two["test"]["psnr"]) / 2
        still = (one["front"]["still"] + two["test"]["still"]) / 2
        row = next(line for line in text.splitlines() if line.startswith(f"| `{words}` "))
        assert row.split(" | ")[1:4] == ["2", f"{psnr:.2f}", f"{psnr - still:+.2f}"]
    assert float(two["test"]["psnr"]) == pytest.approx(two["test"]["still"], abs=1e-3)
    with Image.open(folder / "out" / "smoke" / "two" / "0.png") as image:
        assert image.height >= 2 * 24


def test_finished_runs_are_not_repeated_and_seeds_are_added(compared):
    folder, arguments, _ = compared
    report = folder / "out" / "smoke" / "one" / "0.json"
    before = report.stat().st_mtime_ns
    result = run_binary("ablate", *arguments[:2], "--words=smoke", "--seeds=2", arguments[-1])
    assert result.returncode == 0, result.stderr
    assert report.stat().st_mtime_ns == before
    again = json.loads((report.parent / "1.json").read_text())
    assert again["front"] != json.loads(report.read_text())["front"]
    row = result.stdout.splitlines()[-1]
    assert row.startswith("| `smoke` | 4 | ") and " ± " in row


def test_perceptual_distances_are_scored_and_weighed(compared, tmp_path):
    _, arguments, _ = compared
    words = ["--words=smoke", "--words=smoke,lpips", "--perceptual=stlpips"]
    result = run_binary("ablate", arguments[1], *words, f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    plain, weighed = (
        json.loads((tmp_path / name / "two" / "0.json").read_text())["test"]
        for name in ("smoke", "smoke,lpips")
    )
    assert 0 < weighed["lpips"] != plain["lpips"] > 0
    assert f" | {plain['lpips']:.3f} | " in result.stdout


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--words=quick"], "not 'quick'"),
        (["--words=smoke,lpips"], "pass --perceptual"),
        (["--clips=nowhere"], "There is no capture 'nowhere'"),
        (["--clips={0}/one/../one"], "same folder name"),
    ],
)
def test_mistakes_end_in_one_sentence_before_any_run(compared, tmp_path, extra, words):
    folder, arguments, _ = compared
    extra = [text.format(folder) for text in extra]
    result = run_binary("ablate", *arguments[:2], *extra, f"--workdir={tmp_path / 'out'}")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert words in result.stderr and not (tmp_path / "out").exists()


def test_a_clip_without_held_out_views_is_refused_before_any_run(tmp_path):
    clip = synthetic.make_clip(2, num_frames=4, size=24)
    clips.write_clip(dataclasses.replace(clip, front=None, front_alpha=None), tmp_path / "blind")
    result = run_binary(
        "ablate", f"--clips={tmp_path / 'blind'}", "--words=smoke", f"--workdir={tmp_path / 'out'}"
    )
    assert result.returncode == 1 and "no views to judge by" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match="no views to judge by"):
        ablate.held_out_of({"dynamic": None, "static": None})
