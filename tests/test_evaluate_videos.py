"""`experiments.evaluate_videos`: its scores against our own sums, its table, its mistakes."""

import json

import jax
import numpy as np
import pytest
from binaries import run_binary
from model_folders import towers
from test_fvd import random_state

from d4d_jax import clips, conversion, metrics
from d4d_jax.data import synthetic
from d4d_jax.data.pipeline import ClipSource
from d4d_jax.pipeline import EMBEDDED
from experiments import evaluate_videos


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two clips of 24 frames, and CLIP's image tower with random weights."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(2):
        clips.write_clip(synthetic.make_clip(i, num_frames=24, size=64), root / "clips" / str(i))
    conversion.save(root / "image.safetensors", towers()["image"])
    np.savez(root / "i3d.npz", **random_state())
    return root


@pytest.fixture(scope="module")
def evaluated(root):
    result = run_binary(
        *("evaluate_videos", f"--data={root / 'clips'}", f"--checkpoint={EMBEDDED}"),
        *("--motions=0,12", "--w2=0,1", "--steps=3", f"--workdir={root / 'out'}"),
        *(f"--clip_weights={root / 'image.safetensors'}", "--clip_variant=tiny"),
        f"--i3d_weights={root / 'i3d.npz'}",
    )
    assert result.returncode == 0, result.stderr
    return root / "out", result.stdout


def test_every_prompt_has_its_rows_and_motion_is_measured(evaluated):
    folder, printed = evaluated
    rows = json.loads((folder / "evaluation.json").read_text())
    kinds = {(row["clip"], row["w2"], row["asked"]) for row in rows}
    assert len(rows) == len(kinds) == 8
    still = [row["motion"] for row in rows if row["asked"] == 0 and row["w2"] == 0]
    assert max(still) < 1e-3  # the orbit at m = 0 is the static one
    moving = {row["w2"]: row["motion"] for row in rows if (row["clip"], row["asked"]) == (0, 12)}
    assert 0 < moving[0] < moving[1]  # away from the static object is more motion
    assert "w2 = 1.0: 2 of 2 clips move more at 12 than at 0." in printed
    assert "Absent, since no weights were given: lpips." in printed
    assert (folder / "evaluation.md").read_text().strip() in printed
    distances = {(row["w2"], row["asked"]): row["fvd"] for row in rows}
    assert len(set(distances.values())) == 4 and min(distances.values()) > 0
    assert f" {distances[1, 12]:.4g} |" in printed
    for name in ("evaluation.png", "sheet.png"):
        assert (folder / name).stat().st_size > 1000


def test_scores_are_those_of_the_metrics_and_of_the_tower(root):
    true, made = np.random.default_rng(0).random((2, 3, 64, 64, 3)).astype(np.float32)
    scores = evaluate_videos.make_scores(None, str(root / "image.safetensors"), "tiny")
    assert set(scores) == {"psnr", "ssim", "clip_f", "clip_o"}
    assert scores["psnr"](made, true) == pytest.approx(float(metrics.psnr(made, true).mean()))
    assert scores["clip_o"](true, true) == pytest.approx(1.0, abs=1e-5)
    similar = evaluate_videos.clip_similarity(str(root / "image.safetensors"), "tiny")
    assert scores["clip_f"](made, true) == pytest.approx(float(similar(made, true)[0]), abs=1e-5)
    assert scores["clip_o"](made, true) < 0.9999


def test_clips_come_from_folders(root):
    found = evaluate_videos.read_clips(str(root / "clips"), ["test"], 32)
    assert len(found) == 2 and found[0]["dynamic"].shape == (24, 32, 32, 4)
    expected = ClipSource(root / "clips", size=32)[1]
    jax.tree.map(np.testing.assert_array_equal, found[1], expected)


def test_mistakes_end_in_one_sentence(root, evaluated):
    base = ("evaluate_videos", f"--data={root / 'clips'}", f"--checkpoint={EMBEDDED}")
    again = run_binary(*base, f"--workdir={root / 'out'}")
    assert again.returncode == 1 and "already holds evaluation.md" in again.stderr
    wrong = run_binary(*base, f"--workdir={root / 'new'}", "--motions=fast")
    assert wrong.returncode == 1 and "--motions is a list of numbers, not 'fast'" in wrong.stderr
