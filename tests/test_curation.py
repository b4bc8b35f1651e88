"""Curation: numbers beside scikit-image, one broken rule at a time, duplicates, the page."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity

from d4d_jax import clips
from d4d_jax.data import curation, curation_page
from d4d_jax.data.curation import Thresholds

SHIPPED = Path(clips.__file__).parent / "assets" / "clips"
FRAMES, SIZE = 8, 32


def make_clip(shift=1, *, size=12, start=4, seed=0, alpha=1.0):
    """A textured square that moves `shift` pixels to the right a frame, seen from one side."""
    texture = np.random.default_rng(seed).uniform(size=(size, size, 3)).astype(np.float32)
    frames = np.ones((FRAMES, SIZE, SIZE, 3), np.float32)
    cover = np.zeros((FRAMES, SIZE, SIZE), np.float32)
    for i in range(FRAMES):
        x = start + i * shift
        frames[i, 10 : 10 + size, x : x + size] = 1 - alpha * (1 - texture)
        cover[i, 10 : 10 + size, x : x + size] = alpha
    still = {"static": frames[:1].repeat(FRAMES, 0), "static_alpha": cover[:1].repeat(FRAMES, 0)}
    views = dict(dynamic=frames, dynamic_alpha=cover, front=frames, front_alpha=cover, **still)
    return clips.standard_clip(FRAMES, SIZE, SIZE, **views)


@pytest.fixture
def folder(tmp_path):
    """A clip that breaks no rule, and one for each rule that breaks only that."""
    made = {
        "good": make_clip(),
        "still": make_clip(0, seed=1),
        "drastic": make_clip(2, size=16, start=1, seed=2),
        "boundary": make_clip(1, start=0, seed=3),
        "empty": make_clip(1, size=2, seed=4),
        "same again": make_clip(),
    }
    for name, clip in made.items():
        clips.write_clip(clip, tmp_path / name)
        facts = {"asset": f"{name}.glb", "action": "move"}
        (tmp_path / name / "clip.json").write_text(json.dumps(facts), encoding="utf-8")
    return tmp_path


#: For the made clips, whose noise makes a motion of few pixels drastic.
LIMITS = Thresholds(ssim_low=0.3, min_coverage=0.01)


@pytest.mark.parametrize("name", ["rabbit", "knight", "snake"])
def test_ssim_is_that_of_scikit_image(name):
    front = clips.read_clip(SHIPPED / name).front
    assert front is not None
    grey = rgb2gray(np.asarray(front, np.float64))
    numbers = curation.measure(SHIPPED / name)
    for key, i in (("ssim_quarter", len(front) // 4), ("ssim_half", len(front) // 2)):
        expected = structural_similarity(grey[0], grey[i], data_range=1.0)
        assert numbers[key] == pytest.approx(expected, abs=1e-6)


def test_without_a_front_view_the_static_orbit_tells_the_motion(tmp_path):
    shutil.copytree(SHIPPED / "rabbit", tmp_path / "rabbit")
    for path in (tmp_path / "rabbit").glob("front*"):
        path.unlink()
    numbers = curation.measure(tmp_path / "rabbit")
    clip = clips.read_clip(SHIPPED / "rabbit")
    grey = [rgb2gray(np.asarray(frames, np.float64)) for frames in (clip.static, clip.dynamic)]
    expected = structural_similarity(grey[0][12], grey[1][12], data_range=1.0)
    assert numbers["ssim_half"] == pytest.approx(expected, abs=1e-6)
    for path in (tmp_path / "rabbit").glob("*static*"):
        path.unlink()
    with pytest.raises(ValueError, match="rabbit' lacks dynamic frames, or both front and static"):
        curation.measure(tmp_path / "rabbit")


def test_every_rule_drops_the_clip_that_breaks_it_alone(folder, tmp_path):
    verdicts, failures = curation.curate(folder, tmp_path / "out", LIMITS)
    assert not failures
    broken = {verdict.clip: verdict.rules for verdict in verdicts}
    expected = {name: (name,) for name in ("still", "drastic", "boundary", "empty")}
    assert broken == {"good": (), "same again": ("duplicate",), **expected}
    assert {v.clip: v.duplicate_of for v in verdicts if v.duplicate_of} == {"same again": "good"}
    assert (tmp_path / "out" / "kept.txt").read_text(encoding="utf-8") == "good\n"
    labelled = curation.judge({v.clip: v.numbers for v in verdicts}, LIMITS, animated={"still.glb"})
    assert all(("label" in v.rules) == (v.clip != "still") for v in labelled)


@pytest.mark.parametrize(
    "rule, limit",
    [
        ("still", {"ssim_high": 1.1}),
        ("drastic", {"ssim_low": -1.0}),
        ("boundary", {"border_frames": 1.0}),
        ("boundary", {"border_alpha": 1.0}),
        ("empty", {"min_coverage": 0.0}),
        ("duplicate", {"duplicate_bits": -1}),
    ],
)
def test_every_threshold_counts_without_measuring_again(folder, tmp_path, monkeypatch, rule, limit):
    curation.curate(folder, tmp_path / "out", LIMITS)
    monkeypatch.delattr(curation.records, "read_folder")  # a clip that is read fails
    verdicts, failures = curation.curate(
        folder, tmp_path / "out", dataclasses.replace(LIMITS, **limit)
    )
    assert not failures
    rules = {rule for verdict in verdicts for rule in verdict.rules}
    assert rules == {"still", "drastic", "boundary", "empty", "duplicate"} - {rule}


def test_counts_add_up():
    def verdict(*rules):
        return curation.Verdict("clip", rules, "", {})

    verdicts = [verdict(), verdict("still"), verdict("still", "boundary"), verdict("boundary")]
    rows = {name: tuple(counts) for name, *counts in curation.count(verdicts)}
    assert list(rows) == list(curation.RULES)
    assert rows["label"] == (0, 0, 4)
    assert rows["still"] == (2, 1, 2)
    assert rows["boundary"] == (2, 1, 1)
    assert rows["duplicate"] == (0, 0, 1)


def test_hashes_tell_clips_apart_and_stand_small_changes():
    names = sorted(path.name for path in SHIPPED.iterdir() if path.is_dir())
    hashes = {}
    for name in names:
        frame = np.asarray(clips.read_clip(SHIPPED / name).dynamic)[0].mean(-1)
        noise = np.random.default_rng(0).normal(0, 0.01, frame.shape).astype(np.float32)
        hashes[name] = curation.perceptual_hash(frame)
        assert (hashes[name] ^ curation.perceptual_hash(frame + noise)).bit_count() <= 4
    distances = [(hashes[a] ^ hashes[b]).bit_count() for a in names for b in names if a < b]
    assert min(distances) > 4


def test_another_motion_of_the_same_thing_is_no_duplicate(tmp_path):
    clips.write_clip(make_clip(1), tmp_path / "right")
    clips.write_clip(make_clip(-1, start=12), tmp_path / "left")
    clips.write_clip(make_clip(1), tmp_path / "right again")
    numbers = {path.name: curation.measure(path) for path in tmp_path.iterdir()}
    verdicts = curation.judge(numbers, Thresholds(ssim_low=-1.0))
    assert [v.clip for v in verdicts if v.duplicate_of] == ["right again"]


def test_the_original_of_a_duplicate_is_one_that_is_kept(tmp_path):
    good = curation.measure(SHIPPED / "rabbit")
    still = {**good, "ssim_quarter": 0.99, "ssim_half": 0.99}
    verdicts = curation.judge({"a": still, "b": good, "c": good})
    assert [(v.clip, v.rules, v.duplicate_of) for v in verdicts] == [
        ("a", ("still",), ""),
        ("b", (), ""),
        ("c", ("duplicate",), "b"),
    ]


def test_a_clip_that_cannot_be_read_costs_itself(folder, tmp_path):
    (folder / "good" / "multi_frame3.png").write_bytes(b"")
    verdicts, failures = curation.curate(folder, tmp_path / "out", LIMITS)
    assert len(verdicts) == 5 and "good" not in {verdict.clip for verdict in verdicts}
    ((name, reason),) = failures
    assert name == "good" and "multi_frame3.png' cannot be decoded" in reason
    clips.write_clip(make_clip(), folder / "mended")
    shutil.rmtree(folder / "good")
    (folder / "mended").rename(folder / "good")
    verdicts, failures = curation.curate(folder, tmp_path / "out", LIMITS)
    assert not failures and [v.clip for v in verdicts if v.kept] == ["good"]


def test_the_page_shows_clips_under_their_rules_and_nothing_from_elsewhere(folder, tmp_path):
    (folder / "still").rename(folder / "<b>still & ü")
    verdicts, _ = curation.curate(folder, tmp_path / "out", LIMITS)
    page = tmp_path / "index.html"
    curation_page.write_page(page, verdicts, folder, LIMITS)
    text = page.read_text(encoding="utf-8")
    sections = dict(re.findall(r"<h2 id=(\w+)>(.*?)(?=<h2|$)", text, re.DOTALL))
    assert "&lt;b&gt;still &amp; ü" in sections["still"] and "<b>still" not in text
    for name in ("drastic", "boundary", "empty"):
        assert f">{name}<br>" in sections[name] and sections[name].count("<li>") == 1
    assert "of good" in sections["duplicate"] and ">good<br>" in sections["kept"]
    assert text.count("data:image/webp;base64,") == 6
    assert not re.search(r"https?:|<script|src='(?!data:)", text)
    curation_page.write_page(page, verdicts, folder, LIMITS, examples=0)
    assert "<img" not in page.read_text(encoding="utf-8")


def test_the_page_draws_evenly(tmp_path):
    numbers = curation.measure(SHIPPED / "rabbit")
    for i in range(7):
        shutil.copytree(SHIPPED / "rabbit", tmp_path / str(i))
    verdicts = [curation.Verdict(str(i), (), "", numbers) for i in range(7)]
    curation_page.write_page(tmp_path / "index.html", verdicts, tmp_path, examples=4)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "kept: 7, 4 of them here" in text
    assert re.findall(r">(\d)<br>", text) == ["0", "1", "3", "5"]
