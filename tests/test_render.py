"""Rendering many assets, with a Blender that is none: limits, failures, names, resuming."""

import csv
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gltf_files
import numpy as np
import pytest
from PIL import Image

from d4d_jax import clips
from d4d_jax.data import blender_gltf, blender_plan, render, render_list, render_process
from d4d_jax.data.render_settings import Settings

TINY = Settings(resolution=8, frames=3, views="dynamic,static")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    fake = gltf_files.fake_blender(tmp_path_factory.mktemp("blender") / "python")
    return tuple(render_process.blender_command(fake))


@pytest.fixture
def assets(tmp_path):
    """Makes assets of these names and finds them."""

    def make(*names, **options):
        for name in names:
            gltf_files.write_glb(tmp_path / "glb" / f"{name}.glb")
        return render_list.find_assets(tmp_path / "glb", **options)

    return make


@pytest.fixture
def renderer(tmp_path, command):
    return render.Renderer(str(tmp_path / "out"), command, TINY, time_limit=20.0)


def table(path):
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))


def test_every_animation_becomes_a_clip(assets, renderer, tmp_path):
    found = assets("Shiba Inu", "köttur", "deep/er/Fox")
    count, failures = render.render(found, renderer, workers=2)
    assert (count, failures) == (9, [])
    rows = table(tmp_path / "out" / "manifest.tsv")
    assert tuple(rows[0]) == render.COLUMNS
    fox = next(row for row in rows if row["clip"] == "Fox-Run")
    assert (fox["asset"], fox["action"], fox["frames"]) == ("deep/er/Fox.glb", "Rig|Run", "8")
    assert fox["caption"] == "a fox running" and fox["loop"] == "no" and float(fox["motion"]) > 0
    assert {row["clip"] for row in rows} >= {"Shiba-Inu-Walk", "kottur-Idle"}
    for row in rows:
        clip = clips.read_clip(tmp_path / "out" / row["clip"])
        assert clip.num_frames == 3 and clip.caption == row["caption"]
    assert not (tmp_path / "out" / ".partial").exists()
    assert table(tmp_path / "out" / "failures.tsv") == []


def test_a_bad_asset_costs_itself(assets, renderer, tmp_path):
    """Crashes, hangs, floods of memory and broken files are named; all the rest is there."""
    assets("good", "hang", "hog", "crash", "fails", "weird name ü")
    folder = tmp_path / "glb"
    (folder / "empty.glb").touch()
    (folder / "cut.glb").write_bytes((folder / "good.glb").read_bytes()[:-8])
    (folder / "text.glb").write_text("not binary at all, but long enough")
    (folder / "json.gltf").write_text("{")
    with (folder / "large.glb").open("wb") as stream:
        stream.truncate(200_000_000)
    gltf_files.write_glb(folder / "still.glb", animations=None)
    gltf_files.write_glb(folder / "hollow.glb", meshes=None)
    gltf_files.write_glb(folder / "bare.glb", images=[{"uri": "skin%20a.png"}])
    limited = dataclasses.replace(renderer, time_limit=3.0, memory_limit=0.5)
    count, failures = render.render(render_list.find_assets(folder), limited, workers=2)
    reasons = {asset: reason for asset, _, reason in failures}
    expected = {
        "hang.glb": "It was stopped after --time_limit=3 seconds.",
        "hog.glb": "It was stopped for using more than --memory_limit=0.5 GiB.",
        "crash.glb": "Blender was ended by SIGSEGV.",
        "fails.glb": "The asset has no extent.",
        "empty.glb": "is empty (0 bytes)",
        "cut.glb": "is cut short",
        "text.glb": "does not hold binary glTF",
        "json.gltf": "is no glTF: its JSON cannot be read",
        "large.glb": "has 200 MB, more than --max_megabytes=128",
        "still.glb": "has no animation",
        "hollow.glb": "holds no mesh",
        "bare.glb": "needs the texture file 'skin%20a.png', which is missing",
    }
    assert set(reasons) == set(expected)
    for asset, words in expected.items():
        assert words in reasons[asset]
    # Of the assets with one bad animation the others are there, also those after it.
    rows = table(tmp_path / "out" / "manifest.tsv")
    made = {row["clip"] for row in rows}
    assert {f"{a}-{b}" for a in ("crash", "fails") for b in ("Walk", "Idle")} <= made
    assert count == len(rows) == 3 + 3 + 2 + 2
    assert [(row["asset"], row["action"]) for row in table(tmp_path / "out" / "failures.tsv")] == [
        (asset, action) for asset, action, _ in failures
    ]
    assert ("fails.glb", "Rig|Run") in [(asset, action) for asset, action, _ in failures]
    inside = {path.name for path in tmp_path.iterdir()}
    assert inside == {"glb", "out"}


def test_a_run_goes_on_where_it_was_killed(assets, renderer, tmp_path):
    found = assets(*(f"slow-{i}" for i in range(3)))
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from d4d_jax.data import render, render_list; import test_render;"
        "render.render(render_list.find_assets(sys.argv[2]), render.Renderer(sys.argv[3],"
        " tuple(sys.argv[4:]), test_render.TINY))"
    )
    folders = [str(Path(__file__).parent), str(tmp_path / "glb"), renderer.out]
    process = subprocess.Popen([sys.executable, "-c", script, *folders, *renderer.command])
    while len(list(Path(renderer.out).glob("*/clip.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in Path(renderer.out).glob("*/clip.json")}
    count, failures = render.render(found, renderer)
    assert (count, failures) == (9, [])
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())


def test_what_is_there_is_kept_and_other_settings_are_refused(assets, renderer, tmp_path):
    found = assets("fox")
    render.render(found, renderer)
    kept = (tmp_path / "out" / "fox-Walk" / "clip.json").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "out" / "fox-Run")
    other = dataclasses.replace(renderer, settings=dataclasses.replace(TINY, samples=9))
    with pytest.raises(FileExistsError, match=r"--samples=8, not 9; choose another --out or add"):
        render.render(found, other)
    assert (tmp_path / "out" / "fox-Walk" / "clip.json").stat().st_mtime_ns == kept
    assert render.render(found, other, overwrite=True) == (3, [])
    assert '"samples": 9' in (tmp_path / "out" / "fox-Walk" / "clip.json").read_text()


def test_a_list_names_clips_and_captions(assets, renderer, tmp_path):
    assets("fox", "cat")
    (tmp_path / "glb" / "manifest.tsv").write_text(
        "file\tsource\tlicence\nfox.glb\tthe den\tCC0-1.0\ncat.glb\tthe street\tCC-BY-4.0\n"
    )
    path = tmp_path / "list.tsv"
    path.write_text("asset\taction\tclip\tcaption\nfox.glb\tRun\tmy_fox\ta fox in a hurry\n")
    found = render_list.find_assets(path, root=tmp_path / "glb")
    assert render.render(found, renderer) == (1, [])
    (row,) = table(tmp_path / "out" / "manifest.tsv")
    assert (row["clip"], row["caption"]) == ("my_fox", "a fox in a hurry")
    assert (row["source"], row["licence"]) == ("the den", "CC0-1.0")
    free = render_list.find_assets(tmp_path / "glb", licence="^CC0")
    assert [asset.name for asset in free] == ["fox.glb"]
    path.write_text("asset\taction\nfox.glb\tSwim\nfox.glb\tWalk\n")
    found = render_list.find_assets(path, root=tmp_path / "glb")
    count, ((_, action, reason),) = render.render(found, renderer)
    assert (count, action) == (2, "Swim") and "no animation named 'Swim'" in reason


def test_assets_of_one_name_do_not_share_clips(assets, renderer):
    found = assets("a/fox", "b/fox", "b/FOX")
    assert len({asset.stem.casefold() for asset in found}) == 3
    assert render.render(found, renderer)[0] == 9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file\nfox.glb\n", "needs the tab-separated columns asset; it has file"),
        ("asset\tclip\nfox.glb\tx\n", "has a row of 'fox.glb' that needs an action"),
        ("asset\taction\tclip\nfox.glb\tRun\ta/b\n", "names a clip 'a/b'"),
        ("asset\nfox.glb\tRun\n", "Line 2 of"),
        ("asset\taction\n\tRun\n", "has no asset"),
    ],
)
def test_a_bad_list_is_refused(tmp_path, text, words):
    path = tmp_path / "list.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        render_list.find_assets(path)


def test_nothing_to_render_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a list"):
        render_list.find_assets(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"has no .glb or .gltf asset whose licence has 'CC0'"):
        render_list.find_assets(tmp_path, licence="CC0")
    gltf_files.write_glb(tmp_path / "a.glb")
    with pytest.raises(ValueError, match="is no regular expression"):
        render_list.find_assets(tmp_path, licence="(")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resolution": 0}, "resolution must be at least 1; got 0"),
        ({"frames": 1}, "frames must be at least 2; got 1"),
        ({"views": "top"}, "'top' is not a subset of dynamic"),
        ({"passes": "normal"}, "'normal' is not a subset of depth,mask"),
        ({"elevation": "30,10"}, "'30,10' is neither degrees"),
        ({"transforms": "absent.json"}, "absent.json cannot be read"),
    ],
)
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        Settings(**changes)


def test_frames_are_averaged_with_premultiplied_colour(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[0, 0] = (200, 100, 50, 255)
    rgba[1, 1] = (255, 255, 255, 0)  # Its colour does not count.
    rgba[2:, 2:] = (10, 20, 30, 128)
    Image.fromarray(rgba).save(tmp_path / "multi_frame0.png")
    render.shrink(tmp_path, 2)
    small = np.asarray(Image.open(tmp_path / "multi_frame0.png"))
    assert small[0, 0].tolist() == [200, 100, 50, 64]
    assert small[1, 1].tolist() == [10, 20, 30, 128]


def test_the_users_captioner_is_asked(assets, renderer, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def caption(*, asset, action, caption, frames):\n"
        "    return f'{caption}, {len(frames)} frames of {frames.shape[1]}'\n"
        "def silent(**_):\n    return None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = assets("fox")
    asked = dataclasses.replace(renderer, captioner="mine:caption")
    render.render(found, asked)
    texts = {p.read_text() for p in (tmp_path / "out").glob("*/caption.txt")}
    assert "a fox walking, 3 frames of 8\n" in texts and len(texts) == 3
    silent = dataclasses.replace(renderer, out=str(tmp_path / "o2"), captioner="mine:silent")
    count, failures = render.render(found, silent)
    assert count == 0 and "returned None instead of a sentence" in failures[0][2]


def test_no_process_is_left_behind(tmp_path, command):
    """What Blender started ends with it."""
    script = f"import subprocess, time; subprocess.Popen(['sleep', '77.{os.getpid()}'])"
    command = [sys.executable, "-c", script + "; time.sleep(60)"]
    error = render_process.run_limited(
        command, folder=tmp_path, seconds=1.0, gigabytes=0.0, alive=lambda: False
    )
    assert error == "It was stopped after --time_limit=1 seconds."
    time.sleep(0.2)
    lines = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert not any(f"77.{os.getpid()}".encode() in line for line in lines)


def test_blender_itself_is_told_to_run_the_script(tmp_path):
    executable = gltf_files.fake_blender(tmp_path / "blender-4.5")
    words = render_process.blender_command(executable)
    assert words[:3] == [str(executable), "-b", "--factory-startup"] and words[-1] == "--"
    with pytest.raises(FileNotFoundError, match="There is no executable --blender_python='absent'"):
        render_process.blender_command("absent")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ValueError, match="already holds files; name a new folder"):
        render_process.setup(tmp_path / "full")


def test_gltf_of_another_version_is_named(tmp_path):
    path = gltf_files.write_glb(tmp_path / "a.glb")
    data = bytearray(path.read_bytes())
    data[4] = 1
    path.write_bytes(data)
    with pytest.raises(blender_plan.RenderError, match="is binary glTF of version 1"):
        blender_gltf.check_asset(path)
