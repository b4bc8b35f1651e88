"""What is wrong with the files of a capture, each in one sentence that names the file."""

import shutil

import numpy as np
import pytest
from capture_files import edit_json, ring, write_images, write_multiview, write_transforms
from capture_files import write_video as write_video_capture
from PIL import Image

from gaussians import datasets
from gaussians.datasets import ReadOptions

TIMES = np.array([0.0, 0.5, 1.0])
SMALL = ring(3, size=16)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    write_transforms(folder / "dnerf", {"train": (SMALL, TIMES), "test": (SMALL, TIMES)})
    write_multiview(folder / "rig", SMALL, TIMES)
    write_multiview(folder / "videos", SMALL, TIMES, kind="gif")
    write_video_capture(folder / "video", SMALL, TIMES)
    return folder


@pytest.fixture
def files(originals, tmp_path):
    """A copy of all layouts, to break."""
    shutil.copytree(originals, tmp_path / "files")
    return tmp_path / "files"


def fails(path, *words, error=ValueError, **settings):
    """Reading fails with one sentence that holds all words."""
    with pytest.raises((ValueError, OSError)) as caught:
        datasets.read_capture(path, **settings)
    message = str(caught.value)
    assert type(caught.value) is error, repr(caught.value)
    assert "\n" not in message and message.endswith(".")
    for word in words:
        assert word in message, message


def set_frame(index, **fields):
    """Changes fields of one record of a transforms file; None removes them."""

    def change(document):
        frame = document["frames"][index]
        frame.update(fields)
        for key in [key for key, value in frame.items() if value is None]:
            del frame[key]

    return change


def set_camera(index, **fields):
    def change(document):
        document["cameras"][index].update(fields)

    return change


SCALED = np.diag([2.0, 2, 2, 1]).tolist()
MIRRORED = np.diag([-1.0, 1, 1, 1]).tolist()
TRANSPOSED = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [3, 2, 1, 1]]
BROKEN = np.full((4, 4), np.nan).tolist()


@pytest.mark.parametrize(
    "change, words",
    [
        (set_frame(1, transform_matrix=SCALED), ("r_001", "not rigid", "8", "take scale")),
        (set_frame(1, transform_matrix=MIRRORED), ("r_001", "not rigid", "-1", "mirroring")),
        (set_frame(1, transform_matrix=TRANSPOSED), ("r_001", "last row", "transposed")),
        (set_frame(1, transform_matrix=BROKEN), ("r_001", "4 x 4 finite numbers", "nan")),
        (set_frame(2, transform_matrix=[[1, 2]]), ("r_002", "4 x 4 finite numbers", "[[1, 2]]")),
        (set_frame(2, transform_matrix="x"), ("r_002", "finite numbers; got 'x'")),
        (set_frame(2, transform_matrix=None), ("r_002", "has no pose")),
        (set_frame(0, time=None), ("r_000.png", "has no time", "or none")),
        (set_frame(0, time="now"), ("Frame 0", "time", "got 'now'")),
        (set_frame(0, time=float("inf")), ("Frame 0", "time", "got inf")),
        (set_frame(0, file_path=None), ("Frame 0", "transforms_train.json", "no file_path")),
        (
            set_frame(0, file_path="train/r_001"),
            ("transforms_train.json", "names the frame", "r_001' twice"),
        ),
        (set_frame(0, k1=0.1), ("Frame 0", "lens distortion (k1 = 0.1)", "undistort")),
        (set_frame(0, camera_model="OPENCV_FISHEYE"), ("OPENCV_FISHEYE", "undistort")),
        (set_frame(0, w=800), ("r_000", "frames of 16 x 16 pixels", "w is 800")),
        (set_frame(0, fl_x=-5), ("fl_x of Frame 0", "above 0; got -5")),
        (set_frame(0, camera_angle_x=4), ("camera_angle_x", "between 0 and pi", "got 4")),
        (set_frame(0, cx="left"), ("cx of Frame 0", "finite number; got 'left'")),
        (lambda d: d.pop("camera_angle_x"), ("Frame 0", "no focal length", "camera_angle_x")),
        (lambda d: d.pop("frames"), ("transforms_train.json", "a list under 'frames'")),
        (lambda d: d["frames"].clear(), ("transforms_train.json", "at least one record")),
        (lambda d: d["frames"].insert(0, 7), ("Record 0", "transforms_train.json", "holds 7")),
    ],
)
def test_bad_transforms(files, change, words):
    edit_json(files / "dnerf" / "transforms_train.json", change)
    fails(files / "dnerf", *words)


def test_missing_and_broken_images(files):
    folder = files / "dnerf"
    Image.new("RGBA", (20, 16)).save(folder / "train" / "r_001.png")
    fails(folder, "r_001.png", "20 x 16", "r_000.png", "16 x 16", "give a size")
    assert datasets.read_capture(folder, size=(16, 16)).moving.rgb.shape == (3, 16, 16, 3)
    Image.new("RGB", (16, 16)).save(folder / "train" / "r_001.png")
    fails(folder, "r_000.png' has an alpha channel", "r_001.png' has none")
    (folder / "train" / "r_001.png").write_bytes(b"no image")
    fails(folder, "r_001.png", "cannot be decoded")
    (folder / "train" / "r_001.png").unlink()
    missing = ("r_001'", "transforms_train.json", "missing", ".jpg")
    fails(folder, *missing, error=FileNotFoundError)


def test_broken_json(files):
    for path in (files / "rig" / "cameras.json", files / "dnerf" / "transforms_test.json"):
        path.write_text("{", encoding="utf-8")
        fails(path.parent, path.name, "cannot be read as JSON")
    for text in ("[]", "{}", "7", "null"):
        (files / "rig" / "cameras.json").write_text(text, encoding="utf-8")
        fails(files / "rig", "cameras.json", "needs a list under 'cameras'")


@pytest.mark.parametrize(
    "change, words",
    [
        (set_camera(1, name="cam00"), ("two cameras with the name 'cam00'",)),
        (set_camera(1, name=3), ("Camera 1", "needs a name", "got 3")),
        (set_camera(1, name="../cam00"), ("Camera 1", "needs a name", "got '../cam00'")),
        (set_camera(1, width=32), ("Camera 'cam01'", "16 x 16", "width is 32")),
        (set_camera(1, k1=0.3), ("Camera 'cam01'", "lens distortion")),
        (set_camera(1, distortion="x"), ("Camera 'cam01'", "lens distortion")),
        (set_camera(1, camera_to_world=SCALED), ("Camera 'cam01'", "not rigid")),
        (set_camera(1, matrix_world=SCALED), ("Camera 'cam01'", "published format", "x_fov")),
        (lambda d: d.pop("convention"), ("Camera 'cam00'", '"opengl" or "opencv"', "got None")),
        (lambda d: d.update(convention="y up"), ('"opengl" or "opencv"', "got 'y up'")),
        (lambda d: d.update(held_out=["cam9"]), ("held_out", "'cam9'", "cam00, cam01, cam02")),
        (lambda d: d.update(held_out="cam01"), ("held_out", "list of names; got 'cam01'")),
        (lambda d: d.update(held_out=["cam00", "cam01", "cam02"]), ("leaves no camera to fit",)),
        (lambda d: d.update(fps=0), ("fps", "above 0; got 0")),
        (lambda d: d.update(fps="fast"), ("fps", "got 'fast'")),
        (lambda d: d.update(times=[0, 2, 1]), ("times", "must rise", "number 2 is 1 after 2")),
        (lambda d: d.update(times=[0, 1]), ("times", "each of the 3 frames")),
        (lambda d: d.update(times=[0, float("nan"), 1]), ("times", "must rise", "number 1 is nan")),
    ],
)
def test_bad_rig(files, change, words):
    edit_json(files / "rig" / "cameras.json", change)
    fails(files / "rig", *words)


def test_held_out_names_of_fitted_frames(files):
    (files / "rig" / "cam00").rename(files / "rig" / "static")
    edit_json(files / "rig" / "cameras.json", set_camera(0, name="static"))
    edit_json(files / "rig" / "cameras.json", lambda d: d.update(held_out=["static"]))
    fails(files / "rig", "held-out camera 'static'", "needs another name")


def test_frames_of_a_rig(files):
    folder = files / "rig"
    images = np.zeros((4, 16, 16, 4), np.float32)
    write_images(folder / "cam01", images, first=1)
    fails(folder, "'cam00' has 3 frames, but 'cam01' has 4", "every instant")
    (folder / "cam01" / "0003.png").unlink()
    fails(folder, "cam01", "not evenly numbered", "0002.png is followed by 0004.png")
    (folder / "cam01" / "0003.png").write_bytes(b"")
    fails(folder, "0003.png", "cannot be decoded")
    Image.new("RGB", (4, 4)).save(folder / "cam01" / "3.jpg")
    fails(folder, "3.jpg", "0003.png", "the same number")
    Image.new("RGB", (4, 4)).save(folder / "cam01" / "last.png")
    fails(folder, "last.png", "does not end in its number")
    shutil.rmtree(folder / "cam01")
    (folder / "cam01").mkdir()
    fails(folder, "cam01", "holds no frames")
    (folder / "cam01.gif").write_bytes(b"")
    fails(folder, "'cam01'", "cam01 and cam01.gif", "keep one")
    (folder / "cam01").rmdir()
    (folder / "cam01.gif").unlink()
    fails(folder, "camera 'cam01'", "missing", "cam01.mp4", error=FileNotFoundError)


def test_masks(files):
    masks = files / "videos" / "masks"
    for i in range(3):
        write_images(masks / f"cam{i:02d}", np.ones((3 - (i == 1), 16, 16)))
    fails(files / "videos", "masks/cam01", "2 masks for 3 frames")
    write_images(masks / "cam01", np.ones((3, 8, 16)))
    fails(files / "videos", "cam01.gif", "16 x 16", "mask", "16 x 8")
    write_images(masks / "cam01", np.full((3, 16, 16), 1 / 255))
    fails(files / "videos", "cam01", "at most 1 of 255", "white where the object is")
    shutil.rmtree(masks / "cam01")
    fails(files / "videos", "camera 'cam01'", "masks", error=FileNotFoundError)
    shutil.copytree(masks / "cam00", files / "rig" / "masks" / "cam00")
    fails(files / "rig", "cam00", "has an alpha channel and a mask")
    edit_json(files / "dnerf" / "transforms_train.json", set_frame(0, mask_path="none.png"))
    fails(files / "dnerf", "none.png", "missing", error=FileNotFoundError)


@pytest.mark.parametrize("content", [b"", b"no video", b"GIF89a"])
@pytest.mark.parametrize("kind", ["gif", "mp4"])
def test_broken_videos(files, kind, content):
    (files / "videos" / "cam01.gif").unlink()
    (files / "videos" / f"cam01.{kind}").write_bytes(content)
    fails(files / "videos", f"cam01.{kind}", "cannot be decoded")


def test_videos_at_different_rates(files):
    frames = [Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)) for i in range(3)]
    path = files / "videos" / "cam01.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)
    fails(files / "videos", "'cam00' has 10 frames per second", "'cam01' has 20", '"fps"')
    edit_json(files / "videos" / "cameras.json", lambda d: d.update(fps=10))
    assert datasets.read_capture(files / "videos").seconds == pytest.approx(0.2)


def test_a_video_and_its_cameras(files):
    video = files / "video" / "clip.mp4"
    edit_json(files / "video" / "clip.json", lambda d: d["frames"].pop())
    fails(video, "clip.json", "2 cameras", "3 frames", "or a single one")
    edit_json(files / "video" / "clip.json", lambda d: d.pop("fl_x"))
    edit_json(files / "video" / "clip.json", lambda d: d.update(frames=d["frames"][:1]))
    fails(video, "Camera 0", "clip.json", "no focal length")
    (files / "video" / "clip.json").unlink()
    fails(video, "clip.mp4", "clip.json or cameras.json beside it", error=FileNotFoundError)
    with pytest.raises(FileNotFoundError, match=r"There is no video .*none\.mp4"):
        datasets.read_video(files / "none.mp4", files / "rig" / "cameras.json")


def test_unknown_and_ambiguous_layouts(files, tmp_path):
    fails(tmp_path / "nothing", "There is no capture", error=FileNotFoundError)
    empty = ("multi_frame0.png", "transforms_train.json", "cameras.json", "videos")
    fails(tmp_path, "is no capture", *empty)
    fails(files / "rig" / "cameras.json", "is no capture")
    shutil.copy(files / "rig" / "cameras.json", files / "dnerf")
    fails(files / "dnerf", "transforms_train.json and cameras.json", "multiview")
    assert len(datasets.read_capture(files / "dnerf", layout="transforms").moving) == 3
    fails(files / "rig", "no layout 'nerf'", "clip, transforms", layout="nerf")
    fails(files / "dnerf", "no video beside", layout="video")
    (files / "video" / "clip.json").rename(files / "video" / "cameras.json")
    shutil.copy(files / "video" / "clip.mp4", files / "video" / "other.mp4")
    fails(files / "video", "2 videos", "name for every camera")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"size": (0, 4)}, "size must be .width, height. in pixels; got .0, 4."),
        ({"stride": 0}, "stride must be at least 1; got 0"),
        ({"limit": 0}, "limit must be at least 1 instant, or None; got 0"),
    ],
)
def test_bad_options(settings, words):
    with pytest.raises(ValueError, match=words):
        ReadOptions(**settings)
