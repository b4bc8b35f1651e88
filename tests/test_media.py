"""Files that other programs read back."""

import imageio.v3 as iio
import numpy as np
import pytest

from d4d_jax import media


@pytest.fixture
def video():
    frames = np.zeros((6, 32, 33, 3), np.float32)
    for i in range(6):
        frames[i, :, 5 * i : 5 * i + 5, i % 3] = 1
    return frames


def test_mp4_holds_every_frame(video, tmp_path):
    media.write_video(tmp_path / "video.mp4", video, fps=6)
    again = iio.imread(tmp_path / "video.mp4", plugin="FFMPEG") / 255
    assert len(again) == 6
    small = again[:, 4::8, 4::8][:, :32, :33]
    assert np.abs(small - video).mean() < 0.06
    media.write_video(tmp_path / "again.mp4", video, fps=6)
    assert (tmp_path / "video.mp4").read_bytes() == (tmp_path / "again.mp4").read_bytes()


def test_gif_and_png(video, tmp_path):
    media.write_video(tmp_path / "new" / "video.gif", video)
    assert len(iio.imread(tmp_path / "new" / "video.gif")) == 6
    media.write_image(tmp_path / "frame.png", video[3])
    np.testing.assert_array_equal(iio.imread(tmp_path / "frame.png"), 255 * video[3])


def test_contact_sheet_picks_first_and_last(video):
    sheet = media.contact_sheet([video, 1 - video], columns=3)
    assert sheet.shape == (64, 99, 3)
    np.testing.assert_array_equal(sheet[:32, :33], video[0])
    np.testing.assert_array_equal(sheet[32:, 66:], 1 - video[5])


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda v, p: media.write_video(p / "video.avi", v), r"\.mp4 or \.gif; got .*video\.avi"),
        (lambda v, p: media.write_image(p / "x.png", v[0] * np.nan), "NaN or infinite"),
        (lambda v, p: media.contact_sheet([]), r"one frame size; got \[\]"),
        (lambda v, p: media.contact_sheet([v, v[:, ::2]]), "one frame size"),
    ],
)
def test_bad_input(video, tmp_path, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(video, tmp_path)
