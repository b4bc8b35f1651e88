"""The shipped clips: those of their list, public domain, of one size, moving, within the frame."""

import csv
from pathlib import Path

import numpy as np
import pytest

from d4d_jax import clips
from d4d_jax.data import curation, pipeline, render_list

SHIPPED = Path(clips.__file__).parent / "assets" / "clips"


@pytest.fixture(scope="module")
def rows():
    with open(SHIPPED / "clips.tsv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_the_shipped_clips_are_those_of_the_list(rows):
    assert [path.name for path in pipeline.find_clips(SHIPPED)] == sorted(r["clip"] for r in rows)
    assert all(row["licence"].startswith("CC0-1.0") for row in rows)
    for row in rows:
        clip = clips.read_clip(SHIPPED / row["clip"])
        assert clip.caption == row["caption"] and clip.front is not None
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 6e6


def test_the_list_is_one_that_can_be_rendered():
    assets = render_list.find_assets(SHIPPED / "clips.tsv", root=SHIPPED)
    assert sum(len(asset.clips) for asset in assets) == 20


def test_the_shipped_clips_fit_together_and_move():
    source = pipeline.ClipSource(SHIPPED)
    magnitudes = [float(source[i]["motion"]) for i in range(len(source))]
    assert source[0]["dynamic"].shape == (24, 64, 64, 4)
    assert min(magnitudes) > 0.5 and max(magnitudes) < 20 and np.ptp(magnitudes) > 8


def test_curation_finds_nothing_within_reach_of_the_border_and_no_duplicate():
    numbers = {path.name: curation.measure(path) for path in pipeline.find_clips(SHIPPED)}
    rules = {rule for verdict in curation.judge(numbers) for rule in verdict.rules}
    assert rules <= {"still", "drastic"}
    assert max(max(values["border"]) for values in numbers.values()) == 0
