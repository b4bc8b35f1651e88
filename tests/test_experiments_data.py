"""The binaries `experiments.curate` and `experiments.build_dataset`, one after the other."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from binaries import run_binary

from d4d_jax import clips
from d4d_jax.data import records

SHIPPED = Path(clips.__file__).parent / "assets" / "clips"
NAMES = ("knight", "rabbit", "snake")


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        shutil.copytree(SHIPPED / name, tmp_path / "clips" / name)
    return tmp_path / "clips"


def test_clips_are_curated_built_and_checked(folder, tmp_path):
    curated, dataset = tmp_path / "curated", tmp_path / "dataset"
    shutil.copytree(folder / "snake", folder / "snake too")
    (folder / "rabbit" / "front_frame3.png").write_bytes(b"")
    result = run_binary("curate", f"--clips={folder}", f"--out={curated}", "--ssim_high=1")
    assert result.returncode == 3, result.stderr
    assert "first rabbit: " in result.stderr
    assert (curated / "kept.txt").read_text() == "knight\nsnake\n"
    assert "snake too" in (curated / "index.html").read_text(encoding="utf-8")

    shutil.copytree(SHIPPED / "rabbit", folder / "rabbit", dirs_exist_ok=True)
    result = run_binary("curate", f"--clips={folder}", f"--out={curated}", "--ssim_high=1")
    assert result.returncode == 0, result.stderr
    built = (f"--clips={folder}", f"--out={dataset}", f"--keep={curated / 'kept.txt'}")
    result = run_binary("build_dataset", *built, "--val=0", "--test=0", f"--tfds={tmp_path}/tfds")
    assert result.returncode == 0, result.stderr
    assert {record["clip"] for record in records.Records(dataset)} == set(NAMES)
    (prepared,) = (tmp_path / "tfds" / "orbit_clips").iterdir()
    assert len(records.Records(prepared)) == 3

    assert run_binary("build_dataset", f"--out={dataset}", "--verify").returncode == 0
    victim = next(dataset.glob("*.array_record"))
    victim.write_bytes(victim.read_bytes()[:-1])
    result = run_binary("build_dataset", f"--out={dataset}", "--verify")
    assert result.returncode == 1 and "is damaged" in result.stderr


def test_archives_are_unpacked_with_their_captions(tmp_path):
    uid = "0123456789abcdef" * 2
    with zipfile.ZipFile(tmp_path / "part.zip", "w") as archive:
        for path in (SHIPPED / "rabbit").glob("*.png"):
            archive.write(path, f"{uid}/{path.name}")
    (tmp_path / "captions.csv").write_text(f"{uid},a rabbit\n")
    result = run_binary(
        "build_dataset",
        f"--archives={tmp_path / 'part.zip'}",
        f"--captions={tmp_path / 'captions.csv'}",
        f"--clips={tmp_path / 'clips'}",
        f"--out={tmp_path / 'out'}",
    )
    assert result.returncode == 0, result.stderr
    (split,) = records.read_index(tmp_path / "out")["splits"]
    (record,) = records.Records(tmp_path / "out", split)
    assert (record["asset"], record["caption"]) == (uid, "a rabbit")
    assert json.loads((tmp_path / "clips" / uid / "clip.json").read_text())["asset"] == uid


@pytest.mark.parametrize(
    "binary, arguments, code, words",
    [
        ("curate", ["--clips=absent", "--out=OUT"], 1, "no folder of clips 'absent'"),
        ("curate", ["--clips=absent"], 1, "--out is missing"),
        ("curate", ["--clips=CLIPS", "--out=OUT", "--animated=absent"], 1, "no list of assets"),
        ("curate", ["--ssim_high=much"], 2, "ssim_high"),
        ("build_dataset", ["--clips=CLIPS"], 1, "--out is missing"),
        ("build_dataset", ["--clips=absent", "--out=OUT"], 1, "no folder of clips 'absent'"),
        ("build_dataset", ["--clips=CLIPS", "--out=OUT", "--keep=absent"], 1, "no list of clips"),
        ("build_dataset", ["--clips=CLIPS", "--out=OUT", "--val=2"], 1, "val=2.0 and test=0.05"),
        ("build_dataset", ["--out=OUT", "--verify"], 1, "no data set in"),
        ("build_dataset", ["--out=OUT", "--archives=absent.zip"], 1, "--clips is missing"),
    ],
)
def test_mistakes_end_in_one_sentence(folder, tmp_path, binary, arguments, code, words):
    out = tmp_path / "out"
    given = [word.replace("CLIPS", str(folder)).replace("OUT", str(out)) for word in arguments]
    result = run_binary(binary, *given)
    assert result.returncode == code
    assert words in result.stderr and "Traceback" not in result.stderr
    assert not out.exists()
