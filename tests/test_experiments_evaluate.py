"""The binary, run as people run it."""

import json

import jax
import numpy as np
import pytest
from binaries import run_binary
from PIL import Image

from d4d_jax import clips
from d4d_jax.data import synthetic
from gaussians import io
from gaussians.reconstruct import ReconstructConfig, reconstruct
from gaussians.stages import Stage

FIELD = {
    "name": "hexplane",
    "spatial_resolution": 4,
    "time_resolution": 4,
    "channels": 4,
    "width": 8,
}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    clip = synthetic.make_clip(0, num_frames=4, size=24)
    clips.write_clip(clip, folder / "clip")
    config = ReconstructConfig(
        num_splats=100, capacity=100, deformation=FIELD,
        warmup=Stage(20, static_fraction=1.0), coarse=Stage(0), fine=Stage(2),
    )  # fmt: skip
    asset = reconstruct(clip, config, jax.random.key(0))
    io.save_asset(folder / "asset.npz", asset)
    arguments = (f"--asset={folder / 'asset.npz'}", f"--clip={folder / 'clip'}")
    result = run_binary("evaluate", *arguments, f"--workdir={folder / 'out'}")
    assert result.returncode == 0, result.stderr
    return folder, arguments, result


def test_the_table_says_what_the_report_says(evaluated):
    folder, _, result = evaluated
    report = json.loads((folder / "out" / "evaluation.json").read_text())
    assert list(report) == ["dynamic", "static", "front"]
    for name, entry in report.items():
        assert len(entry["frames"]["psnr"]) == 4
        for key in ("psnr", "still", "ssim", "alpha_iou", "floaters"):
            assert entry["mean"][key] == pytest.approx(np.mean(entry["frames"][key]), abs=1e-3)
        row = next(line for line in result.stdout.splitlines() if line.startswith(f"| {name} "))
        assert row.split(" | ")[2] == f"{entry['mean']['psnr']:.4g}"
    assert report["static"]["mean"]["still"] == report["static"]["mean"]["psnr"]
    assert report["static"]["frames"]["timestamp"] == [0.0] * 4
    assert report["front"]["frames"]["timestamp"] == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-4)


def test_pictures_show_every_view_set(evaluated):
    folder, _, _ = evaluated
    names = {path.name for path in (folder / "out").iterdir()}
    sheets = {f"evaluation_{name}.png" for name in ("dynamic", "static", "front")}
    assert names == {"evaluation.json", "evaluation.png", *sheets}
    sheet = np.asarray(Image.open(folder / "out" / "evaluation_front.png"))
    assert sheet.shape == (2 * 24, 4 * 24, 3)
    truth = np.asarray(Image.open(folder / "clip" / "front_frame0.png").convert("RGBA"))
    opaque = truth[..., 3] == 255
    np.testing.assert_allclose(sheet[:24, :24][opaque], truth[opaque][:, :3], atol=1)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--asset=absent.npz"], "no asset absent.npz"),
        (["--clip=absent"], "There is no capture 'absent'"),
        ([], "already holds evaluation.json"),
    ],
)
def test_mistakes_end_in_one_sentence(evaluated, extra, words):
    folder, arguments, _ = evaluated
    result = run_binary("evaluate", *arguments, f"--workdir={folder / 'out'}", *extra)
    assert result.returncode == 1 and words in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
