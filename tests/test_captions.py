"""Captions from names, and from tables."""

import pytest

from d4d_jax.data import captions


@pytest.mark.parametrize(
    ("asset", "action", "caption"),
    [
        ("ShibaInu", "AnimalArmature|Gallop", "a shiba inu galloping"),
        ("Fox", "Run", "a fox running"),
        ("Alien", "Rig|Death", "an alien dying"),
        ("Enemy_Flying-transformed", "Walk_Backwards", "an enemy flying walking backwards"),
        ("Knight", "Walking_A", "a knight walking"),
        ("Lever", "LeverArmature|Lever_Off", "a lever, off"),
        ("Dolphin", "Armature|Dive", "a dolphin diving"),
        ("Alpaca", "Idle_HitReact_Left", "an alpaca, idle hit react left"),
        ("Unicorn", "Die", "a unicorn dying"),
        ("2a7f866be31e43b89074f304a31ff82d", "mixamo.com", "an object, moving"),
        ("冰", "Action", "a 冰, moving"),
        ("___", "", "an object, moving"),
    ],
)
def test_names_become_sentences(asset, action, caption):
    assert captions.describe(asset, action) == caption


def test_a_table_of_cap3d_is_read(tmp_path):
    path = tmp_path / "cap3d.csv"
    path.write_text('\ufeffabc,"a dog, brown"\nxyz,a  cat\n\nabc,a fox\n', encoding="utf-8")
    assert captions.read_table(path) == {"abc": "a fox", "xyz": "a cat"}


def test_bad_tables_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no table of captions"):
        captions.read_table(tmp_path / "absent.csv")
    (tmp_path / "one.csv").write_text("abc\n")
    with pytest.raises(ValueError, match="a row has 1 columns instead of 2"):
        captions.read_table(tmp_path / "one.csv")
    (tmp_path / "latin.csv").write_bytes(b"abc,caf\xe9\n")
    with pytest.raises(ValueError, match="is no table of captions"):
        captions.read_table(tmp_path / "latin.csv")
