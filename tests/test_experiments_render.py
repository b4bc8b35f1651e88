"""The binary `experiments.render`, with a Blender that is none."""

import gltf_files
import pytest
from binaries import run_binary

OPTIONS = ("--resolution=8", "--frames=3", "--views=dynamic,static")


@pytest.fixture
def blender(tmp_path):
    return f"--blender_python={gltf_files.fake_blender(tmp_path / 'python')}"


def render(tmp_path, *arguments):
    folders = (f"--assets={tmp_path / 'glb'}", f"--out={tmp_path / 'out'}")
    return run_binary("render", *folders, *OPTIONS, *arguments)


def test_exit_codes_tell_what_became_of_it(tmp_path, blender):
    gltf_files.write_glb(tmp_path / "glb" / "fox.glb")
    (tmp_path / "captions.csv").write_text("fox,a red fox\n")
    result = render(tmp_path, blender, f"--captions={tmp_path / 'captions.csv'}")
    assert result.returncode == 0, result.stderr
    assert "1 of 1 done, 0 failed" in result.stderr and "3 clips are in" in result.stderr
    assert (tmp_path / "out" / "fox-Run" / "caption.txt").read_text() == "a red fox\n"
    (tmp_path / "glb" / "bad.glb").touch()
    result = render(tmp_path, blender)
    assert result.returncode == 3
    assert "1 failures are in" in result.stderr and "bad.glb is empty" in result.stderr
    (tmp_path / "glb" / "fox.glb").unlink()
    result = render(tmp_path, blender, f"--out={tmp_path / 'other'}")
    assert result.returncode == 1 and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--blender_python=absent"], 1, "There is no executable --blender_python='absent'"),
        ([], 1, "--blender_python is missing"),
        (["--views=top"], 1, "'top' is not a subset"),
        (["--engine=luxcore"], 2, "luxcore"),
        (["--captions=absent.csv"], 1, "There is no table of captions 'absent.csv'"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, blender, arguments, code, words):
    gltf_files.write_glb(tmp_path / "glb" / "fox.glb")
    given = any("blender" in word for word in arguments) or not arguments
    result = render(tmp_path, *([] if given else [blender]), *arguments)
    assert result.returncode == code
    assert words in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
