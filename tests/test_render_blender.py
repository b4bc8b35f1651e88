"""Rendering with the real Blender: `python -m experiments.render --setup=FOLDER` makes its Python.

Its path is in the environment variable D4D_BLENDER_PYTHON.
"""

import csv
import dataclasses
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d4d_jax import cameras, clips
from d4d_jax.data import render, render_list, render_process
from d4d_jax.data.render_settings import Settings

pytestmark = pytest.mark.blender

ASSETS = Path(__file__).parent / "assets"
SIZE = 48
ALL = Settings(
    resolution=SIZE,
    samples=4,
    frames=5,
    views="dynamic,static,fixed",
    passes="depth,mask",
    elevation="5,30",
    azimuth_augmentation=True,
    seed=1,
)


@pytest.fixture(scope="module")
def command():
    return tuple(render_process.blender_command(os.environ["D4D_BLENDER_PYTHON"]))


@pytest.fixture(scope="module")
def rendered(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    renderer = render.Renderer(str(out), command, ALL, at_most=2)
    count, failures = render.render(render_list.find_assets(ASSETS), renderer)
    assert (count, failures) == (3, [])
    return out


def pixels(path):
    return np.asarray(Image.open(path))


def folders(out):
    return sorted(path.parent for path in out.glob("*/clip.json"))


def test_the_manifest_knows_loops_and_captions(rendered):
    with open(rendered / "manifest.tsv", encoding="utf-8", newline="") as stream:
        rows = {row["clip"]: row for row in csv.DictReader(stream, delimiter="\t")}
    cube = rows["AnimatedMorphCube-Square"]
    assert cube["loop"] == "yes" and float(cube["frames"]) == pytest.approx(4.2 * 24, abs=1)
    assert cube["caption"] == "a morph cube, square"
    levers = [row for name, row in rows.items() if name.startswith("Lever-")]
    assert len(levers) == 2 and all(row["loop"] == "no" for row in levers)
    assert all(float(row["motion"]) > 1 for row in rows.values())


def test_the_same_seed_gives_the_same_bytes(rendered, command, tmp_path):
    again = render.Renderer(str(tmp_path), command, ALL, at_most=2)
    render.render(render_list.find_assets(ASSETS), again)
    for folder in folders(rendered):
        for path in folder.glob("*.*"):
            if path.name != "clip.json":  # which says how many seconds it took
                assert path.read_bytes() == (tmp_path / folder.name / path.name).read_bytes()
    drawn = {json.loads((f / "clip.json").read_text())["azimuth"] for f in folders(rendered)}
    assert len(drawn) == 3


def test_silhouettes_and_depths_lie_in_the_projected_boxes(rendered):
    """By our own cameras, read from the files; the standing object fills the unit cube."""
    for folder in folders(rendered):
        for i in range(ALL.frames):
            record = json.loads((folder / f"static{i}.json").read_text())
            camera = cameras.from_json(record, SIZE, SIZE)
            low, high = np.array(record["bbox"])
            assert (high - low).max() == pytest.approx(1, abs=1e-4)
            grid = np.stack(np.meshgrid(*zip(low, high, strict=True)), -1).reshape(-1, 3)
            pose, lens = np.asarray(camera.world_to_camera), np.asarray(camera.intrinsics)
            corners = grid @ pose[:3, :3].T + pose[:3, 3]
            places = (corners @ lens.T)[:, :2] / corners[:, 2:]
            rows, columns = np.nonzero(pixels(folder / f"multi_static_frame{i}.png")[..., 3])
            box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            (left, top), (right, bottom) = places.min(0), places.max(0)
            assert left - 1 <= box[0] and top - 1 <= box[1]
            assert box[2] <= right + 1 and box[3] <= bottom + 1
            assert box[3] - box[1] > 0.3 * (bottom - top)  # It is not just anywhere in there.
            mask = pixels(folder / f"multi_static_mask{i}.png") > 0
            depth = pixels(folder / f"multi_static_depth{i}.png") / 65535 * record["max_depth"]
            assert np.all((depth > 0) == mask)
            assert corners[:, 2].min() - 0.01 <= depth[mask].min()
            assert depth[mask].max() <= corners[:, 2].max() + 0.01
            alpha = pixels(folder / f"multi_static_frame{i}.png")[..., 3] > 127
            assert np.mean(alpha == mask) > 0.99


def test_the_clip_is_read_and_its_orbit_is_the_drawn_one(rendered):
    for folder in folders(rendered):
        facts = json.loads((folder / "clip.json").read_text())
        clip = clips.read_clip(folder)
        elevation, azimuth = (np.deg2rad(facts[key]) for key in ("elevation", "azimuth"))
        orbit = cameras.orbit(5, elevation=elevation, azimuth=azimuth, width=SIZE, height=SIZE)
        assert 5 <= facts["elevation"] <= 30
        np.testing.assert_allclose(clip.camera.world_to_camera, orbit.world_to_camera, atol=1e-4)
        # Frame 0 of the orbit is the front's; its quarter turn, while nothing moves, is right's.
        first = pixels(folder / "multi_frame0.png")
        np.testing.assert_array_equal(first, pixels(folder / "front_frame0.png"))
        np.testing.assert_array_equal(first, pixels(folder / "multi_static_frame4.png"))
        for view in ("right", "back", "left"):
            assert len(list(folder.glob(f"{view}_frame*.png"))) == 5


def test_broken_files_are_named_by_blender_too(command, tmp_path):
    """What only an import finds out: an accessor of a buffer view that is not there."""
    data = (ASSETS / "Lever.glb").read_bytes()
    size = int.from_bytes(data[12:16], "little")
    scene = json.loads(data[20 : 20 + size])
    scene["accessors"][0]["bufferView"] = 999
    text = json.dumps(scene).encode()
    text += b" " * (-len(text) % 4)
    rest = struct.pack("<II4s", 20 + len(text) + len(data) - 20 - size, len(text), b"JSON")
    folder = tmp_path / "glb"
    folder.mkdir()
    (folder / "broken lever ü.glb").write_bytes(data[:8] + rest + text + data[20 + size :])
    (folder / "cube.glb").write_bytes((ASSETS / "AnimatedMorphCube.glb").read_bytes())
    quick = dataclasses.replace(ALL, passes="", views="static", samples=1)
    renderer = render.Renderer(str(tmp_path / "out"), command, quick, at_most=1)
    count, failures = render.render(render_list.find_assets(folder), renderer)
    assert count == 1 and [asset for asset, _, _ in failures] == ["broken lever ü.glb"]
    assert failures[0][2].strip()
