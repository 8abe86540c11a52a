from __future__ import annotations

import io
import itertools
import pickle
import re
import stat
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tifffile
from PIL import Image

from sparsespec import images
from sparsespec.images import (
    DEFAULT_MAX_PIXELS,
    ImageReadError,
    PixelSource,
    as_pixels,
    count_pages,
    crop,
    open_image,
    read_image,
    tile_windows,
    to_rgb_float,
    to_unit,
)

RNG = np.random.default_rng(7)
COLOUR = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (12, 20), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (12, 20), dtype=np.uint16)


def save(path: Path, pixels: np.ndarray | Image.Image, **options: Any) -> Path:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def grey_as_rgb(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[:, :, None], 3, axis=2)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm", ".webp"])
def test_colour_files_come_back_bit_for_bit(tmp_path: Path, suffix: str) -> None:
    options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
    image = read_image(save(tmp_path / f"a{suffix}", COLOUR, **options))
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, COLOUR)


def test_jpeg_is_close(tmp_path: Path) -> None:
    smooth = np.dstack([np.linspace(0, 255, 64 * 48).reshape(48, 64)] * 3).astype(np.uint8)
    image = read_image(save(tmp_path / "a.JPG", smooth, quality=95))
    assert np.abs(image.astype(int) - smooth).max() < 12


def test_the_name_does_not_decide_the_format(tmp_path: Path) -> None:
    save(tmp_path / "a.png", COLOUR)
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.jpg")), COLOUR)


def test_grey_and_one_bit(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_image(save(tmp_path / "g.png", GREY)), grey_as_rgb(GREY))
    bits = Image.fromarray(GREY > 127)
    assert bits.mode == "1"
    for name in ("b.png", "b.tif"):
        np.testing.assert_array_equal(
            read_image(save(tmp_path / name, bits)), grey_as_rgb((GREY > 127).astype(np.uint8) * np.uint8(255))
        )


def test_palette(tmp_path: Path) -> None:
    palette = Image.fromarray(COLOUR).quantize(16)
    assert palette.mode == "P"
    expected = np.asarray(palette.convert("RGB"))
    for name in ("p.png", "p.gif", "p.tif"):
        np.testing.assert_array_equal(read_image(save(tmp_path / name, palette)), expected)


def test_cmyk(tmp_path: Path) -> None:
    ink = Image.new("CMYK", (8, 6), (0, 255, 255, 0))  # full magenta and yellow make red
    for name in ("c.jpg", "c.tif"):
        image = read_image(save(tmp_path / name, ink))
        assert image.shape == (6, 8, 3)
        assert np.abs(image.astype(int) - [255, 0, 0]).max() < 6


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[0, :, :3] = [200, 100, 0]
    pixels[0, :, 3] = [0, 128, 255]
    image = read_image(save(tmp_path / "a.png", pixels))
    np.testing.assert_array_equal(image[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(image[0, 2], [200, 100, 0])
    expected = [200 * 128 / 255 + 127, 100 * 128 / 255 + 127, 127]
    assert np.abs(image[0, 1] - np.array(expected)).max() <= 1
    np.testing.assert_array_equal(image[1], np.full((3, 3), 255))


def test_grey_with_alpha_and_transparent_palette(tmp_path: Path) -> None:
    pixels = np.dstack([GREY, np.zeros_like(GREY)])
    assert (read_image(save(tmp_path / "la.png", Image.fromarray(pixels))) == 255).all()

    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 0)
    image = read_image(save(tmp_path / "p.png", palette, transparency=0))
    np.testing.assert_array_equal(image[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(image[1, 1], [40, 50, 60])
    image = read_image(save(tmp_path / "pb.png", palette, transparency=b"\x00\xff"))
    np.testing.assert_array_equal(image[0, 0], [255, 255, 255])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey_keeps_every_bit(tmp_path: Path, suffix: str) -> None:
    image = read_image(save(tmp_path / f"d{suffix}", DEEP))
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, grey_as_rgb(DEEP))


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_sixteen_bit_colour_tiff_keeps_every_bit(tmp_path: Path, byteorder: Literal["<", ">"], planar: str) -> None:
    deep = RNG.integers(0, 65536, (9, 7, 3), dtype=np.uint16)
    data = np.moveaxis(deep, -1, 0) if planar == "separate" else deep
    tifffile.imwrite(tmp_path / "d.tif", data, photometric="rgb", planarconfig=planar, byteorder=byteorder)
    image = read_image(tmp_path / "d.tif")
    assert image.dtype == np.dtype("=u2")
    np.testing.assert_array_equal(image, deep)


def test_sixteen_bit_tiff_with_alpha_and_white_is_zero(tmp_path: Path) -> None:
    deep = np.full((3, 4, 4), 30000, np.uint16)
    deep[..., 3] = [0, 65535, 65535, 0]
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb", extrasamples=["unassalpha"])
    image = read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(image[0, :, 0], [65535, 30000, 30000, 65535])

    tifffile.imwrite(tmp_path / "w.tif", DEEP, photometric="miniswhite")
    np.testing.assert_array_equal(read_image(tmp_path / "w.tif"), grey_as_rgb(65535 - DEEP))


def test_sixteen_bit_cmyk_tiff(tmp_path: Path) -> None:
    ink = np.zeros((3, 4, 4), np.uint16)
    ink[..., 1:3] = 65535
    tifffile.imwrite(tmp_path / "c.tif", ink, photometric="separated")
    np.testing.assert_array_equal(read_image(tmp_path / "c.tif")[1, 1], [65535, 0, 0])


def test_extra_bands_of_a_satellite_picture_are_dropped(tmp_path: Path) -> None:
    bands = RNG.integers(0, 65536, (5, 6, 4), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "s.tif", bands, photometric="rgb", extrasamples=["unspecified"])
    np.testing.assert_array_equal(read_image(tmp_path / "s.tif"), bands[..., :3])


def test_sixteen_bit_colour_png_gives_its_upper_bits(tmp_path: Path) -> None:
    high = COLOUR.astype(">u2") * 257
    rows = b"".join(b"\x00" + row.tobytes() for row in high)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20, 12, 16, 2, 0, 0, 0)
    (tmp_path / "c.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    image = read_image(tmp_path / "c.png")
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, COLOUR)


def test_float_tiff(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 6)
    tifffile.imwrite(tmp_path / "f.tif", ramp / 2)
    image = read_image(tmp_path / "f.tif")
    assert image.dtype == np.uint16
    np.testing.assert_allclose(image[..., 0] / 65535, ramp / 2, atol=1e-5)  # [0, 1] is taken at its word

    tifffile.imwrite(tmp_path / "s.tif", ramp * 400 - 100)
    np.testing.assert_allclose(read_image(tmp_path / "s.tif")[..., 1] / 65535, ramp, atol=1e-5)

    tifffile.imwrite(tmp_path / "c.tif", np.full((3, 3), 7.5, np.float32))
    assert (read_image(tmp_path / "c.tif") == 0).all()

    ramp[1, 1] = np.nan
    tifffile.imwrite(tmp_path / "n.tif", ramp)
    with pytest.raises(ImageReadError, match="NaN"):
        read_image(tmp_path / "n.tif")


@pytest.mark.parametrize("dtype", [np.int16, np.uint32])
def test_other_sample_types_are_stretched(tmp_path: Path, dtype: type) -> None:
    tifffile.imwrite(tmp_path / "i.tif", np.array([[5, 10], [15, 25]], dtype))
    np.testing.assert_array_equal(read_image(tmp_path / "i.tif")[..., 0], [[0, 16384], [32768, 65535]])


def test_a_stack_of_measurements_is_no_picture(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "m.tif", np.zeros((8, 8, 7), np.uint16), photometric="minisblack", planarconfig="contig"
    )
    with pytest.raises(ImageReadError, match="7 samples a pixel"):
        read_image(tmp_path / "m.tif")


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiff(tmp_path: Path, compression: str) -> None:
    deep = read_image(save(tmp_path / "d.tif", DEEP, compression=compression))
    np.testing.assert_array_equal(deep, grey_as_rgb(DEEP))
    np.testing.assert_array_equal(read_image(save(tmp_path / "c.tif", COLOUR, compression=compression)), COLOUR)


def test_first_frame_and_first_page(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        options: dict[str, Any] = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        image = read_image(tmp_path / name)
        assert image.shape == (4, 6, 3)
        np.testing.assert_array_equal(image[0, 0], [255, 0, 0])
    tifffile.imwrite(tmp_path / "d.tif", np.stack([DEEP, DEEP // 2, DEEP // 3]), photometric="minisblack")
    np.testing.assert_array_equal(read_image(tmp_path / "d.tif"), grey_as_rgb(DEEP))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["rgb.png", "grey.png", "rgb.tif", "deep.tif", "rgb.jpg", "rgb.webp", "palette.png"])
def test_orientation(tmp_path: Path, orientation: int, kind: str) -> None:
    # Built backwards: the stored picture is what the camera saw before the viewer turns it.
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :16] = 250
    upright[:8, 16:] = 170
    upright[8:, :16] = 90
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: np.rot90(upright[:, ::-1], -1),
        8: np.rot90(upright, -1),
    }[orientation]
    path = tmp_path / kind
    if kind == "deep.tif":
        tifffile.imwrite(path, stored.astype(np.uint16) * 257, extratags=[(274, "H", 1, orientation, True)])
    else:
        image = Image.fromarray(np.ascontiguousarray(stored))
        image = {"rgb": image.convert("RGB"), "grey": image, "palette": image.convert("RGB").quantize(8)}[
            kind[:-4].rstrip(".")
        ]
        exif = Image.Exif()
        exif[274] = orientation
        options: dict[str, Any] = {"quality": 100} if path.suffix in (".jpg", ".webp") else {}
        image.save(path, exif=exif.tobytes(), **options)
    result = read_image(path)
    values = result[..., 0].astype(float) / np.iinfo(result.dtype).max * 255
    assert values.shape == upright.shape
    assert np.abs(values - upright).max() < 12


def test_nonsense_orientation_means_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 0
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", COLOUR, exif=exif.tobytes())), COLOUR)


@pytest.mark.parametrize("shape", [(1, 1), (3, 4000), (4000, 3)])
def test_extreme_shapes(tmp_path: Path, shape: tuple[int, int]) -> None:
    for name in ("a.png", "a.jpg", "a.tif"):
        assert read_image(save(tmp_path / name, np.full((*shape, 3), 128, np.uint8))).shape == (*shape, 3)


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    whole = save(folder / "whole.jpg", np.tile(COLOUR, (20, 20, 1))).read_bytes()
    png = save(folder / "whole.png", np.tile(COLOUR, (20, 20, 1))).read_bytes()
    tifffile.imwrite(folder / "whole.tif", np.tile(DEEP, (20, 20)))
    tiff = (folder / "whole.tif").read_bytes()
    contents = {
        "zero.jpg": (b"", "empty"),
        "text.jpg": (b"Dear all,\nplease find attached the photograph.\n", "not an image"),
        "cut.jpg": (whole[: len(whole) // 2], "damaged or cut short"),
        "cut.png": (png[: len(png) // 2], "damaged or cut short"),
        "cut.tif": (tiff[: len(tiff) // 2], "damaged or cut short"),
        "header.png": (png[:20], "damaged"),
        "header.tif": (tiff[:6], "damaged"),
        "magic.jpg": (b"\xff\xd8\xff\xe0", "damaged"),
        "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        "noise.gif": (b"GIF89a" + bytes(range(40)), "damaged"),
        "phone.heic": (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "HEIC|damaged"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    files = {name: (folder / name, pattern) for name, (_, pattern) in contents.items()}
    (folder / "folder.jpg").mkdir()
    files["folder.jpg"] = (folder / "folder.jpg", "it is a folder")
    files["missing.jpg"] = (folder / "missing.jpg", "no such file")
    return files


@pytest.mark.parametrize(
    "name",
    [
        "zero.jpg",
        "text.jpg",
        "cut.jpg",
        "cut.png",
        "cut.tif",
        "header.png",
        "header.tif",
        "magic.jpg",
        "script.jpg",
        "noise.gif",
        "phone.heic",
        "folder.jpg",
        "missing.jpg",
    ],
)
def test_bad_files_give_one_line_that_names_them(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    path, pattern = bad_files(tmp_path)[name]
    with pytest.raises(ImageReadError, match=re.escape(f"cannot read image '{path}': ")) as caught:
        read_image(path)
    assert re.search(pattern, caught.value.reason)
    assert caught.value.path == str(path)
    assert caught.value.advice
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)


def test_cutting_a_file_anywhere_never_escapes_as_something_else(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(COLOUR).quantize(8).save(buffer, "GIF")
    sources = [
        buffer.getvalue(),
        save(tmp_path / "s.webp", COLOUR).read_bytes(),
        save(tmp_path / "s.bmp", GREY).read_bytes(),
    ]
    failures = 0
    for data in sources:
        for length in range(1, len(data), 7):
            (tmp_path / "cut").write_bytes(data[:length])
            try:
                assert read_image(tmp_path / "cut").shape == (12, 20, 3)
            except ImageReadError:
                failures += 1
    assert failures > 10


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", COLOUR)
    path.chmod(0)
    try:
        path.read_bytes()
        # The superuser reads everything: make the system call fail instead.
        monkeypatch.setattr("os.open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    except PermissionError:
        pass
    with pytest.raises(ImageReadError, match="permission denied"):
        read_image(path)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)


def bomb(path: Path, width: int, height: int) -> Path:
    """Write a PNG whose header promises far more pixels than its few bytes could ever justify."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("side", [20_000, 100_000])  # below and above where Pillow itself would raise
def test_decompression_bomb_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageReadError, match=r"megapixels, more than the limit of 250 megapixels; .*max_pixels="):
        read_image(bomb(tmp_path / "b.png", side, side))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_tiff_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "b.tif", np.zeros((40, 50), np.uint16))
    with pytest.raises(ImageReadError, match="50 x 40"):
        read_image(tmp_path / "b.tif", max_pixels=1999)
    assert read_image(tmp_path / "b.tif", max_pixels=2000).shape == (40, 50, 3)


def test_limit_can_be_raised_past_pillows_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = save(tmp_path / "a.png", COLOUR)
    assert read_image(path).shape == (12, 20, 3)
    assert read_image(path, max_pixels=None).shape == (12, 20, 3)
    with pytest.raises(ImageReadError, match="more than the limit"):
        read_image(path, max_pixels=239)
    with pytest.raises(ValueError, match="max_pixels"):
        read_image(path, max_pixels=0)
    assert DEFAULT_MAX_PIXELS > 100_000_000


def test_warnings_stay_inside_even_with_threads(tmp_path: Path) -> None:
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00"  # promises five entries and ends
    path = save(tmp_path / "a.jpg", COLOUR, exif=exif)
    filters = list(warnings.filters)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                assert read_image(path).shape == (12, 20, 3)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert warnings.filters == filters


def test_importing_the_reader_imports_no_decoder() -> None:
    code = (
        "import sys, sparsespec.images; print([m for m in ('imageio', 'PIL', 'tifffile', 'scipy') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([[0, 255]], np.uint8), [0, 1]),
        (np.array([[0, 65535]], np.uint16), [0, 1]),
        (np.array([[False, True]]), [0, 1]),
        (np.array([[0.25, 1.0]], np.float64), [0.25, 1]),
        (np.array([[0.25, 1.0]], np.float16), [0.25, 1]),
        ([[0.0, 1.0]], [0, 1]),
        (np.array([[[0], [255]]], np.uint8), [0, 1]),
    ],
)
def test_to_rgb_float_accepts(pixels: Any, expected: list[float]) -> None:
    result = to_rgb_float(pixels)
    assert result.dtype == np.float32
    assert result.shape == (1, 2, 3)
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, grey_as_rgb(np.array([expected], np.float32)))


def test_to_rgb_float_blends_opacity_and_leaves_its_input_alone() -> None:
    pixels = np.array([[[0.5, 0.5, 0.5, 0.5], [0.2, 0.4, 0.6, 1.0], [0.1, 0.1, 0.1, 0.0]]], np.float32)
    before = pixels.copy()
    expected = np.array([[[0.75, 0.75, 0.75], [0.2, 0.4, 0.6], [1.0, 1.0, 1.0]]])
    np.testing.assert_allclose(to_rgb_float(pixels), expected, rtol=1e-6)
    np.testing.assert_array_equal(pixels, before)
    same = np.zeros((2, 2, 3), np.float32)
    assert not np.shares_memory(to_rgb_float(same), same)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros(3), r"shape .* got \(3,\)"),
        (np.zeros((2, 2, 2)), r"got \(2, 2, 2\)"),
        (np.zeros((2, 2, 3, 1)), "shape"),
        (np.zeros((0, 4, 3)), "no pixels"),
        (np.zeros((2, 2), np.int64), "got int64"),
        (np.zeros((2, 2), complex), "got complex128"),
        (np.full((2, 2), np.nan), "NaN"),
        (np.array([[0, np.inf]]), "infinity"),
        (np.array([[0, 255.0]]), r"from 0 to 255.*\[0, 1\]"),
        (np.array([[-0.5, 1.0]]), "from -0.5 to 1"),
    ],
)
def test_to_rgb_float_refuses(pixels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        to_rgb_float(pixels, name="photo")
    assert str(caught.value).startswith("photo ")


def test_rounding_errors_of_resampling_are_clipped() -> None:
    result = to_rgb_float(np.array([[-1e-7, 1 + 1e-6]]))
    assert result.min() == 0
    assert result.max() == 1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (10, 10), (11, 25), (100, 7), (64, 128)])
@pytest.mark.parametrize(("tile", "overlap"), [(10, 0), (10, 3), (16, 15), (200, 50), (1, 0)])
def test_tiles_cover_exactly(height: int, width: int, tile: int, overlap: int) -> None:
    covered = np.zeros((height, width), int)
    windows = tile_windows(height, width, tile, overlap)
    for top, left, bottom, right in windows:
        assert 0 <= top < bottom <= height
        assert 0 <= left < right <= width
        assert bottom - top == min(tile, height)
        assert right - left == min(tile, width)
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1
    assert len(set(windows)) == len(windows)
    tops = sorted({window[0] for window in windows})
    assert all(first + tile - second >= overlap for first, second in itertools.pairwise(tops))


@pytest.mark.parametrize("arguments", [(0, 5, 3, 1), (5, 0, 3, 1), (5, 5, 0, 0), (5, 5, 3, 3), (5, 5, 3, -1)])
def test_tiles_refuse(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        tile_windows(*arguments)


# Sources.


@pytest.mark.parametrize(
    "pixels",
    [
        COLOUR,
        GREY,
        GREY[..., None],
        DEEP,
        GREY > 99,
        COLOUR / 255,
        (COLOUR / 255).astype(np.float16),
        np.dstack([COLOUR, GREY]),
        np.dstack([COLOUR, GREY]) / 255,
        COLOUR[::-1, ::2],
    ],
    ids=["colour", "grey", "one channel", "deep", "bool", "float64", "float16", "opacity",
         "float opacity", "strided"],
)  # fmt: skip
def test_windows_of_an_array_equal_the_converted_array(pixels: np.ndarray) -> None:
    before = pixels.copy()
    pixels.flags.writeable = False
    source = as_pixels(pixels)
    whole = to_rgb_float(pixels)
    assert isinstance(source, PixelSource)
    assert source.shape == whole.shape
    assert source.dtype in (np.uint8, np.uint16, np.float32)
    height, width, _ = source.shape
    for top, left, bottom, right in [(0, 0, height, width), (3, 2, 4, 3), (5, 0, height, 7), (0, width - 1, 1, width)]:
        window = source.read(top, left, bottom, right)
        assert window.dtype == source.dtype
        np.testing.assert_array_equal(to_unit(window), whole[top:bottom, left:right])
    np.testing.assert_array_equal(pixels, before)


def test_sources() -> None:
    source = as_pixels(COLOUR)
    assert as_pixels(source) is source
    assert np.shares_memory(source.read(2, 3, 9, 11), COLOUR)
    for window in [(0, 0, 13, 20), (-1, 0, 5, 5), (4, 4, 4, 9), (0, 9, 3, 8), (0, 0, 3, 21)]:
        with pytest.raises(ValueError, match="window must lie inside the picture of 12 rows and 20 columns"):
            source.read(*window)
    with pytest.raises(ValueError, match="photo is floating point with values from 0 to 255"):
        as_pixels(np.array([[0, 255.0]]), name="photo")
    with pytest.raises(ValueError, match="got int64"):
        to_unit(np.zeros((2, 2, 3), np.int64))


def windows(shape: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """The whole, bands that meet no border of a tile, single pixels in the corners, and random ones."""
    height, width = shape[:2]
    chosen = [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, height, width)]
    chosen += [(top, 0, min(top + 13, height), width) for top in range(0, height, 13)]
    for _ in range(6):
        top, bottom = np.sort(RNG.choice(height + 1, 2, replace=False))
        left, right = np.sort(RNG.choice(width + 1, 2, replace=False))
        chosen.append((int(top), int(left), int(bottom), int(right)))
    return chosen


def check_by_window(path: Path, monkeypatch: pytest.MonkeyPatch, *, expected: np.ndarray | None = None) -> None:
    """Open a file as if it were large, and compare its windows with what `read_image` decodes whole."""
    whole = read_image(path) if expected is None else expected
    monkeypatch.setattr(images, "_WHOLE_TIFF", 0)
    with open_image(path) as source:
        inner = source._source if isinstance(source, images._TurnedPixels) else source
        assert isinstance(inner, images._WindowedTiff)
        assert source.shape == whole.shape
        assert source.dtype == whole.dtype
        for top, left, bottom, right in windows(whole.shape):
            np.testing.assert_array_equal(source.read(top, left, bottom, right), whole[top:bottom, left:right])
    np.testing.assert_array_equal(read_image(path), whole)
    monkeypatch.undo()


SCENE = np.repeat(np.repeat(RNG.integers(0, 256, (20, 28, 3), dtype=np.uint8), 5, 0), 5, 1)[:97, :139]


@pytest.mark.parametrize("layout", ["tiles", "oblong tiles", "strips", "thin strips", "one strip"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("kind", ["rgb", "deep rgb", "grey", "deep grey"])
def test_tiff_by_window_equals_tiff_as_a_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    compression: Any,
    planar: Literal["contig", "separate"],
    kind: str,
) -> None:
    # Two of each, so that byte order and BigTIFF meet every layout without a file for each combination; half of them
    # for every other kind, so that all four meet every layout and compression.
    kinds = (("<", False, 1), (">", True, 6), ("<", True, 3), (">", False, 8))
    for byteorder, big, orientation in kinds[2 * ("deep" in kind) :][:2]:
        pixels = SCENE.astype(np.uint16) * 257 if "deep" in kind else SCENE
        pixels = pixels[..., 0] if "grey" in kind else pixels
        options: dict[str, Any] = {"photometric": "minisblack"}
        if "rgb" in kind:
            options = {"photometric": "rgb", "planarconfig": planar}
            pixels = np.ascontiguousarray(np.moveaxis(pixels, -1, 0)) if planar == "separate" else pixels
        tile = {"tiles": (16, 16), "oblong tiles": (64, 32)}.get(layout)
        if tile is None and orientation > 4:
            orientation -= 4  # strips that lie on their side are read whole
        rows = {"strips": 7, "thin strips": 1}.get(layout)
        tifffile.imwrite(
            tmp_path / "a.tif", pixels, byteorder=byteorder, bigtiff=big, tile=tile, rowsperstrip=rows,
            compression=compression, predictor=bool(compression),
            extratags=[(274, "H", 1, orientation, True)], **options,
        )  # fmt: skip
        # Small pieces, so that a strip without compression is cut and small tiles are put together.
        monkeypatch.setattr("sparsespec._tiff._PIECE_AIM", 4000)
        check_by_window(tmp_path / "a.tif", monkeypatch)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4", "zstd"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_colours_by_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, compression: str | None) -> None:
    scene = Image.fromarray(SCENE)
    if mode == "I;16":
        image = Image.fromarray(SCENE[..., 0].astype(np.uint16) * 200)
    else:
        image = scene.quantize(16) if mode == "P" else scene.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(SCENE[..., 1]))
    if (compression == "group4") != (mode == "1") or (compression == "jpeg" and mode in ("P", "LA", "I;16", "RGBA")):
        compression = "packbits"
    image.save(tmp_path / "a.tif", compression=compression, strip_size=2500)
    monkeypatch.setattr("sparsespec._tiff._PIECE_AIM", 4000)
    check_by_window(tmp_path / "a.tif", monkeypatch)


def test_sixteen_bits_with_opacity_and_twelve_bits_by_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = RNG.integers(0, 65536, (50, 70, 4), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb", extrasamples=["unassalpha"], tile=(16, 32))
    check_by_window(tmp_path / "a.tif", monkeypatch)
    tifffile.imwrite(tmp_path / "w.tif", deep[..., 0], photometric="miniswhite", rowsperstrip=9)
    check_by_window(tmp_path / "w.tif", monkeypatch)


def test_jpeg_tiles_by_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = []
    for top in range(0, 96, 32):
        for left in range(0, 128, 32):
            buffer = io.BytesIO()
            part = Image.fromarray(SCENE[:96, :128]).crop((left, top, left + 32, top + 32))
            part.save(buffer, "JPEG", quality=95, subsampling=2)
            tiles.append(buffer.getvalue())
    tifffile.imwrite(
        tmp_path / "a.tif", iter(tiles), shape=(96, 128, 3), dtype=np.uint8, tile=(32, 32), compression="zlib",
        photometric="rgb",
    )  # fmt: skip
    # Only now, since tifffile does not write JPEG without another package.
    with_tag(with_tag(tmp_path / "a.tif", 259, 7), 262, 6)
    whole = read_image(tmp_path / "a.tif")
    assert np.abs(whole.astype(int) - SCENE[:96, :128]).mean() < 20
    check_by_window(tmp_path / "a.tif", monkeypatch)


def counted_pieces(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    decoded: list[tuple[int, int]] = []
    decode = images._WindowedTiff._decoded

    def counting(self: Any, i: int, j: int) -> np.ndarray:
        decoded.append((i, j))
        return decode(self, i, j)

    monkeypatch.setattr(images._WindowedTiff, "_decoded", counting)
    return decoded


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_bands_decode_each_piece_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    tifffile.imwrite(tmp_path / "a.tif", SCENE, tile=(32, 32), photometric="rgb", compression="zlib")
    monkeypatch.setattr(images, "_WHOLE_TIFF", 0)
    monkeypatch.setattr(images, "available_cpus", lambda: threads)
    monkeypatch.setattr("sparsespec._tiff._PIECE_AIM", 1)
    decoded = counted_pieces(monkeypatch)
    with open_image(tmp_path / "a.tif") as source:
        bands = [source.read(top, 0, min(top + 10, 97), 139) for top in range(0, 97, 10)]
        # Once more for the first, which was asked for its type when the file was opened.
        assert sorted(decoded) == sorted([(0, 0), *((i, j) for i in range(4) for j in range(5))])
    np.testing.assert_array_equal(np.concatenate(bands), SCENE)


def test_few_pieces_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", SCENE, tile=(16, 16), photometric="rgb")
    monkeypatch.setattr(images, "_WHOLE_TIFF", 0)
    monkeypatch.setattr("sparsespec._tiff._PIECE_AIM", 1)
    monkeypatch.setattr(images, "_SMALLEST_CACHE", 16 * 16 * 3 * 3)
    monkeypatch.setattr(images, "_LARGEST_CACHE", 16 * 16 * 3 * 3)
    with open_image(tmp_path / "a.tif") as source:
        assert isinstance(source, images._WindowedTiff)
        np.testing.assert_array_equal(source.read(0, 0, 97, 139), SCENE)
        assert 0 < source._bytes == sum(piece.nbytes for piece in source._kept.values()) <= 16 * 16 * 3 * 3


def test_what_a_tiff_leaves_out_is_black(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = [b"" if k in (1, 4) else zlib.compress(np.full((32, 32, 3), 10 * k, np.uint8).tobytes()) for k in range(6)]
    tifffile.imwrite(
        tmp_path / "a.tif", iter(tiles), shape=(64, 96, 3), dtype=np.uint8, tile=(32, 32), compression="zlib",
        photometric="rgb",
    )  # fmt: skip
    expected = np.kron(np.array([[0, 0, 20], [30, 0, 50]], np.uint8), np.ones((32, 32), np.uint8))
    monkeypatch.setattr(images, "_WHOLE_TIFF", 0)
    with open_image(tmp_path / "a.tif") as source:
        np.testing.assert_array_equal(source.read(0, 0, 64, 96), grey_as_rgb(expected))


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.uint32])
def test_samples_that_need_all_others_are_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", (GREY * 3.0).astype(dtype), tile=(16, 16))
    whole = read_image(tmp_path / "a.tif")
    monkeypatch.setattr(images, "_WHOLE_TIFF", 0)
    with open_image(tmp_path / "a.tif") as source:
        assert not isinstance(source, images._WindowedTiff)
        np.testing.assert_array_equal(source.read(0, 0, 12, 20), whole)
    with pytest.raises(ImageReadError, match=r"for a picture that cannot be read piece by piece: its samples"):
        read_image(tmp_path / "a.tif", max_pixels=100)


@pytest.mark.parametrize("kind", ["rgb.png", "grey.jpg", "palette.png", "alpha.png", "cmyk.jpg", "deep.png", "rgb.tif"])
@pytest.mark.parametrize("orientation", [1, 2, 5, 6, 7, 8])
def test_a_large_picture_stays_with_its_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, orientation: int
) -> None:
    scene = Image.fromarray(SCENE)
    deep = Image.fromarray(SCENE[..., 0].astype(np.uint16) * 257)
    converted = {"palette": scene.quantize(16), "alpha": scene.convert("RGBA"), "deep": deep,
                 "grey": scene.convert("L"), "cmyk": scene.convert("CMYK"), "rgb": scene}[kind[:-4]]  # fmt: skip
    if kind == "alpha.png":
        converted.putalpha(Image.fromarray(SCENE[..., 2]))
    exif = Image.Exif()
    exif[274] = orientation
    converted.save(tmp_path / kind, exif=exif.tobytes())
    whole = read_image(tmp_path / kind)
    monkeypatch.setattr(images, "LARGE_IMAGE", 1)
    monkeypatch.setattr(images, "_BAND_BYTES", 5000)
    with open_image(tmp_path / kind) as source:
        assert source.shape == whole.shape
        assert source.dtype == whole.dtype
        for top, left, bottom, right in windows(whole.shape):
            np.testing.assert_array_equal(source.read(top, left, bottom, right), whole[top:bottom, left:right])


def test_sources_end_with_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", SCENE, tile=(16, 16), photometric="rgb")
    monkeypatch.setattr(images, "_WHOLE_TIFF", 0)
    with open_image(tmp_path / "a.tif") as source:
        pass
    with pytest.raises(ValueError, match="is closed"):
        source.read(0, 0, 1, 1)


def test_a_tiff_by_window_has_a_limit_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", SCENE, tile=(16, 16), photometric="rgb")
    monkeypatch.setattr(images, "_WHOLE_TIFF", 0)
    with open_image(tmp_path / "a.tif", max_pixels=169) as source:  # 97 x 139 = 13483 pixels, 169 x 80 = 13520
        assert source.shape == SCENE.shape
    with (
        pytest.raises(ImageReadError, match=r"more than the limit of 0.01344 megapixels.*max_pixels="),
        open_image(tmp_path / "a.tif", max_pixels=168),
    ):
        pass
    with pytest.raises(ImageReadError, match="more than the limit"):
        read_image(tmp_path / "a.tif", max_pixels=13482)
    with open_image(tmp_path / "a.tif", max_pixels=None):
        pass


def with_tag(path: Path, code: int, value: int) -> Path:
    """Change the number in a tag of a little-endian classic TIFF, type and all."""
    data = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, entry)[0] == code:
            struct.pack_into("<HII", data, entry + 2, 4, 1, value)
            path.write_bytes(data)
            return path
    raise AssertionError(f"no tag {code}")


WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT = 256, 257, 322, 323


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("kind", ["rgb", "deep"])
@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({WIDTH: 0}, "no pixels"),
        ({HEIGHT: 0}, "no pixels"),
        ({WIDTH: 2**32 - 1, HEIGHT: 2**32 - 1}, r"needs \d+ tiles, its header lists 20"),
        ({WIDTH: 15_000, HEIGHT: 15_000}, "a picture of 15000 x 15000 pixels needs 219961 tiles"),
        ({HEIGHT: 129}, "needs 25 tiles, its header lists 20"),
        ({TILE_WIDTH: 2**31, TILE_HEIGHT: 2**31}, "larger than the picture"),
        ({TILE_WIDTH: 2**32 - 16}, "larger than the picture"),
        ({TILE_WIDTH: 0}, "tiles have 0 x 32 pixels|damaged"),
        ({TILE_HEIGHT: 0}, "tiles have 32 x 0 pixels|damaged"),
    ],
)
def test_a_tiff_whose_header_lies(
    tmp_path: Path, kind: str, tags: dict[int, int], message: str, compression: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    pixels = SCENE if kind == "rgb" else SCENE.astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(32, 32), photometric="rgb", compression=compression)
    for code, value in tags.items():
        with_tag(tmp_path / "a.tif", code, value)
    tracemalloc.start()
    try:
        with (
            pytest.raises(ImageReadError, match=message),
            open_image(tmp_path / "a.tif", max_pixels=DEFAULT_MAX_PIXELS),
        ):
            pass
        assert tracemalloc.get_traced_memory()[1] < 3e6
    finally:
        tracemalloc.stop()
    assert capfd.readouterr().out == ""


def test_a_tiff_with_absurdly_many_samples(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((500, 600), np.uint16), photometric="minisblack")
    with pytest.raises(ImageReadError, match="65000 samples for each of its 600 x 500 pixels"):
        read_image(with_tag(tmp_path / "a.tif", 277, 65_000))


@pytest.mark.parametrize("height", [2000, 2**32 - 1])
def test_a_tiff_with_fewer_strips_than_rows(tmp_path: Path, height: int) -> None:
    tifffile.imwrite(tmp_path / "a.tif", SCENE, rowsperstrip=8, photometric="rgb")
    with pytest.raises(ImageReadError, match=r"pixels needs \d+ strips, its header lists 13"):
        read_image(with_tag(tmp_path / "a.tif", HEIGHT, height))


@pytest.mark.parametrize("limit", [DEFAULT_MAX_PIXELS, None])
def test_a_strip_of_billions_of_rows_costs_nothing(tmp_path: Path, limit: int | None) -> None:
    tifffile.imwrite(tmp_path / "a.tif", SCENE, rowsperstrip=97, photometric="rgb")
    for code, value in ((WIDTH, 2**20), (HEIGHT, 2**31), (278, 2**31)):
        with_tag(tmp_path / "a.tif", code, value)
    tracemalloc.start()
    try:
        with pytest.raises(ImageReadError), open_image(tmp_path / "a.tif", max_pixels=limit):
            pass
        assert tracemalloc.get_traced_memory()[1] < 3e6
    finally:
        tracemalloc.stop()


def test_strips_on_their_side_are_read_whole_if_they_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = [(274, "H", 1, 6, True)]
    tifffile.imwrite(tmp_path / "a.tif", SCENE, rowsperstrip=8, photometric="rgb", extratags=turn)
    monkeypatch.setattr(images, "_WHOLE_TIFF", 0)
    decoded = counted_pieces(monkeypatch)
    for limit, by_piece in ((13_483, False), (13_482, True)):
        with open_image(tmp_path / "a.tif", max_pixels=limit) as source:
            np.testing.assert_array_equal(source.read(0, 0, 139, 97), np.rot90(SCENE, -1))
        assert bool(decoded) == by_piece


def test_a_tiff_that_ends_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", SCENE, rowsperstrip=8, photometric="rgb")
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data[:-5000])
    monkeypatch.setattr(images, "_WHOLE_TIFF", 0)
    with pytest.raises(ImageReadError, match="damaged or cut short"):
        read_image(tmp_path / "a.tif")
    with (
        pytest.raises(ImageReadError, match=rf"the file ends after {len(data) - 5000} bytes, its pixels should reach"),
        open_image(tmp_path / "a.tif", max_pixels=1000),
    ):
        pass


def test_a_damaged_tile_is_reported_by_the_window_that_touches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # Noise, so that no tile is small enough to be put together with its neighbours.
    pixels = RNG.integers(0, 256, (200, 300, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(64, 64), photometric="rgb", compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        offset, count = file.pages.first.dataoffsets[7], file.pages.first.databytecounts[7]
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[offset + count // 3 : offset + count] = bytes(count - count // 3)
    (tmp_path / "a.tif").write_bytes(data)
    monkeypatch.setattr(images, "_WHOLE_TIFF", 0)
    monkeypatch.setattr("sparsespec._tiff._PIECE_AIM", 1)
    with open_image(tmp_path / "a.tif") as source:
        np.testing.assert_array_equal(source.read(0, 0, 64, 300), pixels[:64])
        with pytest.raises(ImageReadError, match="damaged or cut short near row 64, column 128") as caught:
            source.read(50, 150, 80, 160)
        assert caught.value.path == str(tmp_path / "a.tif")
        np.testing.assert_array_equal(source.read(64, 192, 200, 300), pixels[64:, 192:])
    assert capfd.readouterr().out == ""


def test_one_large_compressed_strip_is_no_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", SCENE, rowsperstrip=97, photometric="rgb", compression="zlib")
    monkeypatch.setattr(images, "_WHOLE_TIFF", 0)
    monkeypatch.setattr("sparsespec._tiff.LARGEST_PIECE", 30_000)
    with open_image(tmp_path / "a.tif") as source:
        np.testing.assert_array_equal(source.read(0, 0, 97, 139), SCENE)
    with (
        pytest.raises(ImageReadError, match=r"cannot be read piece by piece: one of its strips holds"),
        open_image(tmp_path / "a.tif", max_pixels=13_000),
    ):
        pass


def giant(path: Path, side: int) -> Path:
    """Write a tiled BigTIFF of side x side pixels in which every tile has the same few bytes."""
    tile = 1024
    pixels = np.zeros((tile, tile, 3), np.uint8)
    pixels[::2, :, 1] = 200
    content = zlib.compress(pixels.tobytes(), 1)
    count = (side // tile) ** 2
    tifffile.imwrite(
        path, iter([content] * count), shape=(side, side, 3), dtype=np.uint8, tile=(tile, tile), compression="zlib",
        photometric="rgb", bigtiff=True,
    )  # fmt: skip
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module to ask for the peak of the memory")
def test_memory_follows_the_windows_and_not_the_picture(tmp_path: Path) -> None:
    path = giant(tmp_path / "a.tif", 17 * 1024)  # 303 megapixels: 909 MB
    code = """
import resource, sys
import numpy as np
from sparsespec.images import ImageReadError, open_image, read_image
with open_image(sys.argv[1]) as source:
    source.read(0, 0, 600, 3000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for top in range(0, source.shape[0], 3000):
        band = source.read(top, 0, min(top + 600, source.shape[0]), source.shape[1])
        assert (band[top % 2 :: 2, :, 1] == 200).all() and band[..., 0].max() == 0
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_image(sys.argv[1])
except ImageReadError as error:
    assert "more than the limit" in str(error)
else:
    raise AssertionError("an array of 303 megapixels was allowed")
print((after - before) * (1 if sys.platform == "darwin" else 1024))
"""
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    # A band of 31 MB, two rows of tiles of 53 MB each, and what is being decoded.
    assert int(result.stdout) < 350e6


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module to ask for the peak of the memory")
def test_a_jpeg_is_held_little_more_than_once(tmp_path: Path) -> None:
    Image.new("RGB", (6000, 5000), (200, 100, 50)).save(tmp_path / "a.jpg")  # 90 MB as an array, 120 MB in Pillow
    code = """
import resource, sys
import sparsespec.images as images
from PIL import Image
images.LARGE_IMAGE = int(sys.argv[2])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = peak()
with images.open_image(sys.argv[1]) as source:
    for top in range(0, 5000, 500):
        source.read(top, 0, top + 500, 6000)
print(peak() - before)
"""
    peaks = [
        int(subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.jpg"), str(large)], capture_output=True,
                           text=True, check=True).stdout)
        for large in (1, 100_000_000)
    ]  # fmt: skip
    assert peaks[0] < 120e6 + 60e6
    assert peaks[1] < 120e6 + 90e6 + 60e6


def test_a_crop_is_read_where_it_lies() -> None:
    part = crop(as_pixels(COLOUR), (3, 5, 11, 19))
    assert part.shape == (8, 14, 3)
    assert part.dtype == np.uint8
    np.testing.assert_array_equal(part.read(0, 0, 8, 14), COLOUR[3:11, 5:19])
    np.testing.assert_array_equal(part.read(2, 1, 3, 9), COLOUR[5:6, 6:14])
    np.testing.assert_array_equal(crop(part, (1, 1, 3, 4)).read(0, 0, 2, 3), COLOUR[4:6, 6:9])
    with pytest.raises(ValueError, match="picture of 8 rows and 14 columns"):
        part.read(0, 0, 9, 14)


@pytest.mark.parametrize("box", [(0, 0, 13, 5), (-1, 0, 5, 5), (4, 0, 4, 5), (0, 5, 5, 3)])
def test_a_crop_lies_inside(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="window must lie inside the picture of 12 rows and 20 columns"):
        crop(as_pixels(COLOUR), box)


def book(path: Path, *, bigtiff: bool = False, byteorder: Any = "<", compression: Any = None) -> list[np.ndarray]:
    """Write a TIFF with pages of three sizes and kinds, each followed by a small copy; return the pages."""
    pages: list[np.ndarray] = [SCENE, np.tile(DEEP, (3, 1)), SCENE[:30, :, 1]]
    with tifffile.TiffWriter(path, bigtiff=bigtiff, byteorder=byteorder) as file:
        for page in pages:
            options: Any = {"photometric": "rgb" if page.ndim == 3 else "minisblack", "compression": compression}
            file.write(page, rowsperstrip=8, **options)
            file.write(page[::2, ::2], subfiletype=1, **options)
    return [page if page.ndim == 3 else grey_as_rgb(page) for page in pages]


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(("bigtiff", "byteorder"), list(itertools.product([False, True], "<>")))
@pytest.mark.parametrize("whole", [0, 1 << 30])
def test_every_page_of_a_tiff(
    tmp_path: Path, bigtiff: bool, byteorder: str, compression: Any, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_WHOLE_TIFF", whole)
    path = tmp_path / "a.tif"
    pages = book(path, bigtiff=bigtiff, byteorder=byteorder, compression=compression)
    assert count_pages(path) == 3
    for index, expected in enumerate(pages):
        image = read_image(path, page=index)
        assert image.dtype == expected.dtype
        np.testing.assert_array_equal(image, expected)
        with open_image(path, page=index) as source:
            np.testing.assert_array_equal(source.read(3, 2, 21, 17), expected[3:21, 2:17])
    with pytest.raises(ImageReadError, match="the file has 3 pages"):
        read_image(path, page=3)
    with pytest.raises(ValueError, match="page must be at least 0, got -1"):
        read_image(path, page=-1)


def links(path: Path) -> list[int]:
    """Places of the offsets to each directory of a little-endian classic TIFF, that to the end of the list included."""
    data, places = path.read_bytes(), [4]
    while offset := struct.unpack_from("<I", data, places[-1])[0]:
        places.append(offset + 2 + 12 * struct.unpack_from("<H", data, offset)[0])
    return places


def with_number(path: Path, place: int, value: int, kind: str = "<I") -> Path:
    data = bytearray(path.read_bytes())
    struct.pack_into(kind, data, place, value)
    path.write_bytes(data)
    return path


def subfile_place(path: Path, page: int) -> int:
    data = path.read_bytes()
    (start,) = struct.unpack_from("<I", data, links(path)[page])
    assert struct.unpack_from("<H", data, start + 2)[0] == 254
    return start + 2


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp"])
def test_other_files_have_one_page(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime")]
    options: dict[str, Any] = {} if name == "a.jpg" else {"save_all": True, "append_images": frames[1:]}
    frames[0].save(tmp_path / name, **options)
    assert count_pages(tmp_path / name) == 1
    assert read_image(tmp_path / name, page=0).shape == (4, 6, 3)
    with pytest.raises(ImageReadError, match=r"page 1 \(counted from 0\): the file has 1 page; ask for"):
        read_image(tmp_path / name, page=1)


def test_pages_are_counted_like_files_are_read(tmp_path: Path) -> None:
    files = bad_files(tmp_path)
    assert count_pages(files["text.jpg"][0]) == count_pages(files["header.tif"][0]) == 1
    for name in ("zero.jpg", "missing.jpg", "folder.jpg"):
        path, pattern = files[name]
        with pytest.raises(ImageReadError, match=pattern):
            count_pages(path)


def test_masks_and_old_copies_are_no_pages(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for shade in range(5):
            file.write(np.full((4, 6), shade, np.uint8), subfiletype=2, metadata=None)
    assert count_pages(path) == 5
    with_number(path, subfile_place(path, 1) + 8, 4)  # a mask
    place = subfile_place(path, 2)
    with_number(with_number(path, place, 255, "<H"), place + 8, 2)  # the old tag: a smaller copy
    assert count_pages(path) == 3
    assert [int(read_image(path, page=page).max()) for page in range(3)] == [0, 3, 4]
    with_number(path, subfile_place(path, 0) + 8, 1)
    assert [int(read_image(path, page=page).max()) for page in range(2)] == [3, 4]


def test_a_file_of_nothing_but_thumbnails(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for shade in (7, 8):
            file.write(np.full((4, 6), shade, np.uint8), subfiletype=1, metadata=None)
    assert count_pages(path) == 1
    assert read_image(path).max() == 7


@pytest.mark.parametrize("damaged", range(3))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_damaged_page_costs_only_itself(tmp_path: Path, damaged: int, compression: Any) -> None:
    path = tmp_path / "a.tif"
    shades = [Image.new("RGB", (40, 30), (shade, 0, 0)) for shade in (50, 60, 70)]
    shades[0].save(path, save_all=True, append_images=shades[1:], compression=compression)
    (start,) = struct.unpack_from("<I", path.read_bytes(), links(path)[damaged])
    with_number(path, start + 2 + 8, 2**31)  # its width, the first tag
    assert count_pages(path) == 3
    for page in range(3):
        if page == damaged:
            with pytest.raises(ImageReadError) as caught:
                read_image(path, page=page)
            assert ("page" in caught.value.reason) == (page > 0)
        else:
            assert read_image(path, page=page)[0, 0].tolist() == [50 + 10 * page, 0, 0]


@pytest.mark.parametrize(
    ("value", "reason"),
    [(2**32 - 1, "listed at byte 4294967295"), (3, "listed at byte 3"), (9, "a header of|ends inside the header")],
)
def test_a_broken_list_of_pages_is_one_failure(tmp_path: Path, value: int, reason: str) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((4, 30, 40), np.uint8), photometric="minisblack")
    with_number(path, links(path)[2], value)
    assert count_pages(path) == 3
    for page in range(2):
        assert read_image(path, page=page).shape == (30, 40, 3)
    for page in (2, 3):
        with pytest.raises(ImageReadError, match=reason):
            read_image(path, page=page)


def test_a_list_of_pages_in_a_circle(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((3, 30, 40), np.uint8), photometric="minisblack")
    (first,) = struct.unpack_from("<I", path.read_bytes(), 4)
    with_number(path, links(path)[3], first)
    with pytest.raises(ImageReadError, match="comes back to one of them after 3 pages; export it again"):
        count_pages(path)
    assert read_image(path, page=2).shape == (30, 40, 3)
    with pytest.raises(ImageReadError, match="comes back"):
        read_image(path, page=3)


@pytest.mark.parametrize(("count", "allowed"), [(10_000, True), (10_001, False)])
def test_a_list_of_pages_without_end(tmp_path: Path, count: int, allowed: bool) -> None:
    # Directories with one tag each, one behind the other.
    steps = [8 + 18 * index for index in range(1, count)] + [0]
    entry = struct.pack("<HHHII", 1, 256, 4, 1, 5)
    (tmp_path / "a.tif").write_bytes(
        b"II*\0" + struct.pack("<I", 8) + b"".join(entry + struct.pack("<I", step) for step in steps)
    )
    if allowed:
        assert count_pages(tmp_path / "a.tif") == count
    else:
        with pytest.raises(ImageReadError, match="more than 10000 entries; export it again, in several files"):
            count_pages(tmp_path / "a.tif")


def test_an_error_in_the_with_statement_stays_what_it_is(tmp_path: Path) -> None:
    book(tmp_path / "a.tif")
    with (
        pytest.raises(ImageReadError, match=r"missing.png': there is no such file"),
        open_image(tmp_path / "a.tif", page=1),
    ):
        read_image(tmp_path / "missing.png")


def test_jpegs_of_ordinary_scans_are_read(tmp_path: Path) -> None:
    plain = save(tmp_path / "a.jpg", np.tile(COLOUR, (9, 9, 1)), progressive=True, quality=70)
    data = plain.read_bytes()
    last = data.rindex(b"\xff\xda")
    (tmp_path / "b.jpg").write_bytes(data[:last] + data[last:-2] * 80 + b"\xff\xd9")
    assert read_image(tmp_path / "b.jpg").shape == read_image(plain).shape
    (tmp_path / "c.jpg").write_bytes(data[:last] + data[last:-2] * 2000 + b"\xff\xd9")
    with pytest.raises(ImageReadError, match="spread over more than 1000 scans; save it again"):
        read_image(tmp_path / "c.jpg")


def test_an_empty_page_of_tifffile_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As newer ones give for tags that contradict each other; Pillow is asked then."""
    import tifffile

    values = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    tifffile.imwrite(tmp_path / "a.tif", values)
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda page: np.empty((0, 0), np.uint16))
    assert read_image(tmp_path / "a.tif").shape == (3, 4, 3)
