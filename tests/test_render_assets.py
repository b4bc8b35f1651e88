"""Making the shipped clips (with a stand-in for Blender), and the shipped clips themselves."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import d4d_jax
from d4d_jax import clips
from d4d_jax.data import pipeline, render_assets, synthetic

SHIPPED = Path(d4d_jax.__file__).parent / "assets" / "clips"

ROW = "ball\ta ball\tballs/ball.glb\tRoll\tno\tsome/where\tCC0-1.0"


def write_table(path, *rows, columns=render_assets.COLUMNS):
    path.write_text("\n".join(["\t".join(columns), *rows]) + "\n")
    return path


@pytest.fixture
def table(tmp_path):
    return write_table(tmp_path / "table.tsv", ROW)


@pytest.fixture
def blender(tmp_path):
    """An executable that answers like the Blender script: copies a clip of 16 pixels to --out."""
    clip = dataclasses.replace(synthetic.make_clip(0, num_frames=3, size=16), caption="")
    clips.write_clip(clip, tmp_path / "rendered")
    script = tmp_path / "python_with_bpy"
    script.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/calls\n'
        "for option; do case $option in --out=*) "
        f'cp {tmp_path}/rendered/* "${{option#--out=}}"/;; esac; done\n'
    )
    script.chmod(0o755)
    return script


def make(table, blender, out, *more):
    options = (f"--table={table}", f"--assets={out}", f"--blender_python={blender}")
    return render_assets.main([*options, f"--out={out}", "--size=8", *more])


def test_a_row_becomes_a_small_clip_with_its_caption(table, blender, tmp_path):
    assert make(table, blender, tmp_path / "out") == 0
    clip = clips.read_clip(tmp_path / "out" / "ball")
    assert clip.dynamic.shape == (3, 8, 8, 3) and clip.caption == "a ball"
    assert not list((tmp_path / "out" / "ball").glob("*.json"))
    call = (tmp_path / "calls").read_text()
    assert "--action=Roll" in call and "balls/ball.glb" in call and "front" not in call


def test_frames_are_averaged_with_premultiplied_colour(table, blender, tmp_path):
    make(table, blender, tmp_path / "out")
    large = clips.read_clip(tmp_path / "rendered", background=(0.0, 0.0, 0.0))
    small = clips.read_clip(tmp_path / "out" / "ball", background=(0.0, 0.0, 0.0))
    expected = large.dynamic.reshape(3, 8, 2, 8, 2, 3).mean((2, 4))
    np.testing.assert_allclose(small.dynamic, expected, atol=0.01)


def test_clips_that_are_there_are_kept(table, blender, tmp_path, capsys):
    make(table, blender, tmp_path / "out")
    make(table, blender, tmp_path / "out")
    assert "ball: kept" in capsys.readouterr().out
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_a_run_that_is_stopped_while_it_writes_leaves_no_clip(
    table, blender, tmp_path, monkeypatch
):
    write = clips.write_clip

    def write_half(clip, path):
        write(clip, path)
        (path / "multi_frame2.png").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(clips, "write_clip", write_half)
    with pytest.raises(KeyboardInterrupt):
        make(table, blender, tmp_path / "out")
    monkeypatch.setattr(clips, "write_clip", write)
    assert make(table, blender, tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ball"]
    assert clips.read_clip(tmp_path / "out" / "ball").num_frames == 3


def test_what_blender_says_is_passed_on(table, tmp_path, capsys):
    script = tmp_path / "failing"
    script.write_text("#!/bin/sh\necho 'There is no asset file balls/ball.glb.' >&2\nexit 1\n")
    script.chmod(0o755)
    assert make(table, script, tmp_path / "out") == 1
    assert capsys.readouterr().err == "ball: There is no asset file balls/ball.glb.\n"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["ball\ta ball"], "incomplete row: 'ball'"),
        ([ROW, ROW], "two rows named 'ball'"),
    ],
)
def test_a_bad_row_is_named(tmp_path, rows, words):
    with pytest.raises(ValueError, match=words):
        render_assets.read_table(write_table(tmp_path / "bad.tsv", *rows))


def test_a_bad_table_is_named(tmp_path, table, blender, capsys):
    with pytest.raises(ValueError, match=r"needs the columns name, caption, .*; it has a, b"):
        render_assets.read_table(write_table(tmp_path / "bad.tsv", columns=("a", "b")))
    with pytest.raises(FileNotFoundError, match=r"no table '.*absent"):
        render_assets.read_table(tmp_path / "absent.tsv")
    assert make(table, blender, tmp_path / "out", "--only=cube") == 1
    assert "has no row named cube." in capsys.readouterr().err


def test_an_object_at_the_border_is_noticed():
    clip = synthetic.make_clip(0, num_frames=3, size=16)
    assert render_assets.border_alpha(clip) == 0
    for edge in ((1, 0, 5), (1, 15, 5), (1, 5, 0), (1, 5, 15)):
        alpha = clip.static_alpha.copy()
        alpha[edge] = 0.25
        assert render_assets.border_alpha(dataclasses.replace(clip, static_alpha=alpha)) == 0.25


def test_the_shipped_clips_are_those_of_the_table():
    rows = render_assets.read_table(SHIPPED / "clips.tsv")
    assert [path.name for path in pipeline.find_clips(SHIPPED)] == sorted(r.name for r in rows)
    assert all(row.licence.startswith("CC0-1.0") for row in rows)
    assert sum(row.front == "yes" for row in rows) >= 3
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 3.5e6


def test_the_shipped_clips_fit_together_and_move():
    source = pipeline.ClipSource(SHIPPED)
    rows = {row.caption for row in render_assets.read_table(SHIPPED / "clips.tsv")}
    records = [source[i] for i in range(len(source))]
    assert {str(record["caption"]) for record in records} == rows
    magnitudes = [float(record["motion"]) for record in records]
    assert min(magnitudes) > 0.5 and max(magnitudes) < 20 and np.ptp(magnitudes) > 8
    for record in records:
        assert record["dynamic"].shape == (24, 64, 64, 4)
        alpha = np.concatenate([record["dynamic"], record["static"]])[..., 3]
        assert alpha[:, [0, -1]].max() == -1 and alpha[:, :, [0, -1]].max() == -1


def test_shipped_reconstruction_samples_have_front_frames():
    rows = render_assets.read_table(SHIPPED / "clips.tsv")
    for row in rows:
        clip = clips.read_clip(SHIPPED / row.name)
        assert (clip.front is not None) == (row.front == "yes")
