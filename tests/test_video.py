"""Videos: what is written is read again, upright, at its times, and one clear line for what is none."""

import numpy as np
import pytest
from PIL import Image

from regolite.data.video import Frame, VideoWriter, read_video
from regolite.errors import UserError


def halves(width=64, height=48):
    """Red at the left, blue at the right."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


def test_frames_come_back_at_their_times(tmp_path):
    with VideoWriter(tmp_path / "clip.mp4") as writer:
        for seconds in (0.0, 0.1, 0.4, 0.4):  # two at once, as some cameras write them
            writer.add(Frame(halves(), seconds))
    frames = list(read_video(tmp_path / "clip.mp4"))
    assert [frame.seconds for frame in frames] == pytest.approx([0.0, 0.1, 0.4, 0.4], abs=1e-3)
    for frame in frames:
        assert np.abs(np.asarray(frame.image, int) - np.asarray(halves(), int)).mean() < 12


@pytest.mark.parametrize("size", [(33, 21), (1, 1), (4000, 8)])
def test_odd_sides_are_padded_by_a_pixel(tmp_path, size):
    with VideoWriter(tmp_path / "clip.mp4") as writer:
        writer.add(Frame(Image.new("RGB", size, "red"), 0.0))
    [frame] = read_video(tmp_path / "clip.mp4")
    assert frame.image.size == tuple(side + side % 2 for side in size)


def test_a_phone_that_was_held_upright(tmp_path, monkeypatch):
    with VideoWriter(tmp_path / "clip.mp4") as writer:
        writer.add(Frame(halves(), 0.0))
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    one, minus = (1 << 16).to_bytes(4, "big"), (-1 << 16).to_bytes(4, "big", signed=True)
    zero, last = bytes(4), (1 << 30).to_bytes(4, "big")
    plain = b"".join((one, zero, zero, zero, one, zero, zero, zero, last))
    turned = b"".join((zero, one, zero, minus, zero, zero, zero, zero, last))  # 90 degrees clockwise
    track = data.index(plain, data.index(b"tkhd"))
    data[track : track + len(plain)] = turned
    (tmp_path / "clip.mp4").write_bytes(data)
    [frame] = read_video(tmp_path / "clip.mp4")
    assert frame.image.size == (48, 64)
    top, bottom = frame.image.getpixel((24, 8)), frame.image.getpixel((24, 56))
    assert top[0] > 200 > 60 > top[2] and bottom[2] > 200 > 60 > bottom[0], "left is now the top"


def test_what_is_no_video(tmp_path):
    with pytest.raises(UserError, match="none.mp4 does not exist"):
        list(read_video(tmp_path / "none.mp4"))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="broken.mp4 cannot be read .Invalid data.*replace the file"):
        list(read_video(tmp_path / "broken.mp4"))


def test_what_was_read_before_a_video_breaks_is_kept(tmp_path):
    rng = np.random.default_rng(0)
    with VideoWriter(tmp_path / "clip.mp4") as writer:
        for n in range(4):
            writer.add(Frame(Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)), n / 10))
    with VideoWriter(tmp_path / "again.mp4") as again, pytest.raises(ZeroDivisionError):
        for n, frame in enumerate(read_video(tmp_path / "clip.mp4")):
            again.add(frame)
            _ = 1 / (2 - n)
    again.close()
    assert len(list(read_video(tmp_path / "again.mp4"))) == 3
