"""One function reads an image everywhere: the same pixels by every way, and one clear line for what is none."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import tv_tensors

from regolite.data import CocoFolder, check_coco, list_images, read_image
from regolite.data.images import TURNS, check_image
from regolite.errors import UserError

GRAY = np.linspace(0, 255, 60).astype(np.uint8).reshape(6, 10)
COLORS = np.stack([GRAY, GRAY[::-1], 255 - GRAY], -1)
RGBA = np.dstack([COLORS, GRAY])


def pixels(source, **options):
    image = read_image(source, **options)
    assert image.mode == "RGB" and not image.info
    return np.asarray(image)


def saved(image, suffix, **options):
    buffer = io.BytesIO()
    Image.init()
    image.save(buffer, Image.EXTENSION[suffix], **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "source",
    [
        COLORS,
        RGBA,
        COLORS.astype(np.int64),
        COLORS.astype(np.uint16) << 8,
        COLORS.astype(np.uint16) << 4,
        COLORS / 255,
        (COLORS / 255).astype(np.float16),
        COLORS.astype(np.float32),
        COLORS.astype(np.float32) * 256,
        np.asfortranarray(COLORS)[::-1][::-1],
        torch.from_numpy(COLORS).permute(2, 0, 1),
        torch.from_numpy(RGBA).permute(2, 0, 1),
        torch.from_numpy(COLORS / 255).permute(2, 0, 1).float().requires_grad_(),
        tv_tensors.Image(torch.from_numpy(COLORS).permute(2, 0, 1)),
        Image.fromarray(COLORS),
        Image.fromarray(RGBA),
        saved(Image.fromarray(COLORS), ".png"),
        memoryview(saved(Image.fromarray(RGBA), ".webp", lossless=True, exact=True)),
        bytearray(saved(Image.fromarray(COLORS), ".tiff")),
    ],
    ids=range(19),
)
def test_the_same_colors_by_every_way(source):
    np.testing.assert_array_equal(pixels(source), COLORS)


@pytest.mark.parametrize(
    "source",
    [
        GRAY,
        GRAY[..., None],
        np.stack([GRAY, 255 - GRAY], -1),  # with alpha
        torch.from_numpy(GRAY),
        torch.from_numpy(GRAY)[None],
        torch.from_numpy(GRAY)[None] / 255,
        Image.fromarray(GRAY),
        Image.fromarray(GRAY).convert("LA"),
        Image.fromarray(GRAY).convert("F"),
        Image.fromarray(GRAY.astype(np.float32) / 255),
        Image.fromarray(GRAY).convert("I"),
        Image.fromarray(GRAY.astype(np.uint16) << 8),  # all 16 bits
        Image.fromarray(GRAY.astype(np.uint16) << 4),  # 12 bits in 16
        GRAY.astype(np.int64) << 24,
        saved(Image.fromarray(GRAY.astype(np.uint16) << 4), ".png"),
        saved(Image.fromarray(GRAY.astype(np.uint16) << 8), ".tiff"),
        saved(Image.fromarray(GRAY.astype(np.float32) / 255), ".tiff"),
        saved(Image.fromarray(GRAY.astype(np.float32)), ".tiff"),
    ],
    ids=range(18),
)
def test_the_same_grays_by_every_way_and_of_every_depth(source):
    np.testing.assert_array_equal(pixels(source), np.stack([GRAY] * 3, -1))


def png_of_16_bits(array):
    """A PNG file of gray and alpha, colors, or colors and alpha, which Pillow cannot write with 16 bits."""
    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff_of_16_bits(array, order="<", packed=False):
    """A TIFF file of colors."""
    height, width, _ = array.shape
    data = array.astype(order + "u2").tobytes()
    data = zlib.compress(data) if packed else data
    tags = {256: width, 257: height, 259: 8 if packed else 1, 262: 2, 273: 128, 277: 3, 278: height, 279: len(data)}
    entries = {tag: struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items()}
    entries[258] = struct.pack(order + "HHII", 258, 3, 3, 122)  # three depths, which follow the table of tags
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    table = b"".join(entries[tag] for tag in sorted(entries)) + bytes(4)
    return head + table + struct.pack(order + "3H", 16, 16, 16) + data


@pytest.mark.parametrize("shift", [8, 4, 0])  # all 16 bits, 12 bits in 16, 8 in 16
@pytest.mark.parametrize(
    "source",
    [
        lambda colors: png_of_16_bits(colors),
        lambda colors: png_of_16_bits(np.dstack([colors, np.full((6, 10), 65535)])),
        lambda colors: Image.open(io.BytesIO(png_of_16_bits(colors))),
        lambda colors: tiff_of_16_bits(colors),
        lambda colors: tiff_of_16_bits(colors, ">"),
        lambda colors: tiff_of_16_bits(colors, "<", packed=True),
        lambda colors: tiff_of_16_bits(colors, ">", packed=True),
    ],
    ids=range(7),
)
def test_colors_of_16_bits_in_files(source, shift):
    """Pillow itself keeps the upper byte alone, and so an image of 12 bits in 16 is nearly black."""
    np.testing.assert_array_equal(pixels(source(COLORS.astype(np.uint16) << shift)), COLORS)


@pytest.mark.parametrize("shift", [8, 4])
def test_gray_of_16_bits_with_alpha_in_a_file(tmp_path, shift):
    gray_and_alpha = np.dstack([GRAY.astype(np.uint16) << shift, GRAY[::-1].astype(np.uint16) << 8])
    (tmp_path / "deep.png").write_bytes(png_of_16_bits(gray_and_alpha))
    np.testing.assert_array_equal(pixels(tmp_path / "deep.png"), np.stack([GRAY] * 3, -1))


def test_bits():
    bits = GRAY > 99
    for source in (bits, torch.from_numpy(bits), Image.fromarray(bits), saved(Image.fromarray(bits), ".png")):
        np.testing.assert_array_equal(pixels(source)[..., 0], 255 * bits)


@pytest.mark.parametrize("mode", ["P", "PA", "La", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes(mode):
    image = Image.fromarray(COLORS)
    image = image.convert("LA").convert("La") if mode == "La" else image.convert("RGBA" if mode == "RGBa" else "RGB")
    image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    wanted = GRAY if mode == "La" else COLORS
    tolerance = 60 if mode in ("P", "PA", "La") else 5  # of palettes, and of a gray that is not its red
    if mode != "La":
        assert np.abs(pixels(image).astype(int) - wanted).mean() < tolerance
    assert image.mode == mode and pixels(image).shape == (6, 10, 3)


def test_a_palette_with_transparency_keeps_its_colors(tmp_path):
    image = Image.fromarray(COLORS).quantize(64)
    image.save(tmp_path / "p.png", transparency=0)
    np.testing.assert_array_equal(pixels(tmp_path / "p.png"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_or_as_stored_by_every_way(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "phone.png"
    Image.fromarray(COLORS).save(file, exif=exif)
    with Image.open(file) as opened:
        upright = np.asarray(ImageOps.exif_transpose(opened))
        for source in (file, str(file), file.read_bytes(), opened):
            np.testing.assert_array_equal(pixels(source), upright)
            np.testing.assert_array_equal(pixels(source, upright=False), COLORS)
        np.testing.assert_array_equal(pixels(read_image(opened)), upright)  # never turned twice
        np.testing.assert_array_equal(pixels(read_image(opened, upright=False)), COLORS)
    assert (orientation in TURNS) == (orientation > 1)


def test_tiff_is_upright_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COLORS).save(tmp_path / "scan.tiff", exif=exif)
    np.testing.assert_array_equal(pixels(tmp_path / "scan.tiff"), np.rot90(COLORS, -1))


def test_broken_exif_is_no_broken_image(tmp_path):
    Image.fromarray(COLORS).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), COLORS)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tiff"])
def test_of_an_animation_the_first_frame_and_that_is_said(tmp_path, suffix):
    first, second = (Image.new("RGB", (8, 6), color) for color in ("white", "black"))
    first.save(tmp_path / f"a{suffix}", save_all=True, append_images=[second])
    with pytest.warns(UserWarning, match=rf"a{suffix} has 2 frames: only frame 1 is used"):
        assert pixels(tmp_path / f"a{suffix}").min() > 250


def test_previews_of_phones_are_no_animation(tmp_path):
    image = Image.fromarray(COLORS)
    image.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[image])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(tmp_path / "a.jpg").shape == (6, 10, 3)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (COLORS.transpose(2, 0, 1), r"shape \[3, 6, 10\].*array.transpose\(1, 2, 0\)"),
        (torch.from_numpy(COLORS), r"shape \[6, 10, 3\].*tensor.permute\(2, 0, 1\)"),
        (np.zeros((2, 6, 10, 3), np.uint8), r"shape \[2, 6, 10, 3\]"),
        (np.zeros(7), r"shape \[7\]"),
        (np.zeros((0, 5, 3), np.uint8), "empty"),
        (Image.new("RGB", (0, 5)), "empty"),
        (COLORS / 255 - 0.5, "pixels from -0.5 to 0.5.*undo a normalization"),
        (COLORS / 250, r"pixels from 0 to 1\.02"),
        (np.full((4, 4), np.nan), "pixels from nan"),
        (np.full((4, 4), np.inf), "to inf"),
        (-COLORS.astype(int), "from -255 to 0"),
        (np.zeros((4, 4), complex), "type complex128"),
        (np.array([["a"]]), "type <U1"),
        (b"no image", r"\(bytes\) cannot be read"),
        (b"", "cannot be read"),
        ("https://example.org/dog.jpg", "dog.jpg is a URL: download it and give the path"),
        (Path("http://example.org/dog.jpg"), "is a URL: download it"),
        ("nowhere.jpg", "nowhere.jpg does not exist"),
        (".", "is a folder: give a file in it"),
    ],
    ids=range(19),
)
def test_what_is_no_image_is_one_clear_line(source, said):
    with pytest.raises(UserError, match=said) as raised:
        read_image(source)
    assert "\n" not in str(raised.value)


def test_a_broken_or_huge_file_gets_its_own_advice(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    file.write_bytes(saved(Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8)), ".png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    for read in (read_image, check_image):
        with pytest.raises(UserError, match="a.png is larger than Pillow's limit .*make it smaller.*MAX_IMAGE_PIXELS"):
            read(file)
    monkeypatch.undo()
    check_image(file)
    file.write_bytes(file.read_bytes()[:5000])
    check_image(file)  # its header is fine
    with pytest.raises(UserError, match="a.png cannot be read .*replace the file"):
        read_image(file)


def test_a_folder_or_a_pattern_is_a_list_of_images(tmp_path):
    for name in ("b.png", "a.JPG", "c[1].bmp", "sub/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    for name in ("._a.jpg", "notes.txt", "labels.json"):
        (tmp_path / name).write_text("no image")

    def names(source):
        return [path.relative_to(tmp_path).as_posix() for path in list_images(source)]

    assert names(tmp_path) == names(str(tmp_path)) == ["a.JPG", "b.png", "c[1].bmp"]
    assert names(tmp_path / "*") == ["a.JPG", "b.png", "c[1].bmp"]
    assert names(f"{tmp_path}/**/*.png") == ["b.png", "sub/d.png"]
    assert names([tmp_path / "sub", tmp_path / "b.png"]) == ["sub/d.png", "b.png"]
    assert names(tmp_path / "c[1].bmp") == ["c[1].bmp"]  # a file of this very name, and no pattern
    (tmp_path / "empty").mkdir()
    for source, said in (
        (tmp_path / "empty", r"has no images .*\*\*"),
        (tmp_path / "*.webp", "no image matches"),
        (tmp_path / "none.png", "none.png does not exist"),
        ("https://example.org/*.jpg", "is a URL"),
    ):
        with pytest.raises(UserError, match=said):
            list_images(source)


@pytest.mark.parametrize("annotated", ["stored", "upright", "neither"])
def test_annotations_say_which_pixels_they_refer_to(tmp_path, annotated):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    Image.fromarray(COLORS).save(tmp_path / "images" / "phone.png", exif=exif)
    width, height = {"stored": (10, 6), "upright": (6, 10), "neither": (5, 4)}[annotated]
    (tmp_path / "annotations" / "instances_train.json").write_text(
        f"""{{"images": [{{"id": 1, "file_name": "phone.png", "width": {width}, "height": {height}}}],
        "annotations": [{{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2]}}],
        "categories": [{{"id": 1, "name": "dog"}}]}}"""
    )
    dataset = CocoFolder(tmp_path, "train")
    report = check_coco(tmp_path, ["train"], read_images=True)
    if annotated == "neither":
        with pytest.raises(UserError, match="phone.png is 10x6 pixels but its annotation says 5x4: put the file back"):
            dataset.image(0)
        assert [one["kind"] for one in report.wrong] == ["image of another size"]
        return
    assert not report.wrong
    wanted = COLORS if annotated == "stored" else np.rot90(COLORS, -1)
    np.testing.assert_array_equal(np.asarray(dataset.image(0)), wanted)
    np.testing.assert_array_equal(pixels(dataset.image(0)), wanted)  # what detect makes of it


def test_a_video_is_told_where_it_belongs(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"frames")
    for read in (read_image, list_images, check_image):
        with pytest.raises(UserError, match="clip.mp4 is a video: `regolite detect` takes it"):
            read(tmp_path / "clip.mp4")
