"""What the bytes of a file become: every pixel format against values worked out by hand."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from inkdrop.data.images import decode, inspect, recolour, resized, scaled, widened
from inkdrop.errors import BadData


def saved(image, kind, **options):
    """An image (PIL or array) as the bytes of a file."""
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **options)
    return out.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, depth, colour, rows, *extra):
    """A PNG by the letter of its specification: rows of packed samples, no filter."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(extra) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def npy(values, **options):
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asarray(values), **options)
    return out.getvalue()


def pixels(data, name="x.png"):
    """Decoded pixels; the header told without decoding must say the same."""
    header, found = decode(data, name)
    assert header == inspect(data, name)
    assert found.shape == (header.height, header.width, header.bands)
    assert found.dtype.name == header.dtype
    return found


BW = [[0, 255], [255, 0]]
# the palette of the tests: 0 red, 1 green, 2 blue
PALETTE = chunk(b"PLTE", bytes([255, 0, 0, 0, 255, 0, 0, 0, 255]))
PIXELS = {
    "1 bit grey": (png(2, 2, 1, 0, [b"\x40", b"\x80"]), [[[0], [255]], [[255], [0]]]),
    "2 bit grey": (png(4, 1, 2, 0, [b"\x1b"]), [[[0], [85], [170], [255]]]),
    "4 bit grey": (png(2, 1, 4, 0, [b"\x5f"]), [[[5 * 17], [255]]]),
    "8 bit grey": (png(2, 1, 8, 0, [bytes([7, 200])]), [[[7], [200]]]),
    "16 bit grey": (png(2, 1, 16, 0, [struct.pack(">2H", 0x1234, 65535)]), [[[0x1234], [65535]]]),
    "8 bit colour": (png(1, 1, 8, 2, [bytes([1, 2, 3])]), [[[1, 2, 3]]]),
    "16 bit colour": (png(1, 1, 16, 2, [struct.pack(">3H", 0x12FF, 0xFE00, 0x00FF)]), [[[0x12, 0xFE, 0]]]),
    "palette": (png(4, 1, 2, 3, [b"\x24"], PALETTE), [[[255, 0, 0], [0, 0, 255], [0, 255, 0], [255, 0, 0]]]),
    "palette with alpha": (
        png(2, 1, 2, 3, [b"\x60"], PALETTE, chunk(b"tRNS", bytes([10, 128]))),
        [[[0, 255, 0, 128], [0, 0, 255, 255]]],
    ),
    "grey with alpha": (png(1, 1, 8, 4, [bytes([9, 30])]), [[[9, 9, 9, 30]]]),
    "colour with alpha": (png(1, 1, 8, 6, [bytes([1, 2, 3, 4])]), [[[1, 2, 3, 4]]]),
    "grey, one value clear": (
        png(2, 1, 8, 0, [bytes([7, 8])], chunk(b"tRNS", b"\0\7")),
        [[[7, 7, 7, 0], [8, 8, 8, 255]]],
    ),
    "bmp": (saved(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8), "BMP"), [[[1, 2, 3], [4, 5, 6]]]),
    "webp": (saved(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8), "WEBP", lossless=True), [[[1, 2, 3], [4, 5, 6]]]),
    "webp with alpha": (
        saved(np.array([[[1, 2, 3, 90], [4, 5, 6, 255]]], np.uint8), "WEBP", lossless=True),
        [[[1, 2, 3, 90], [4, 5, 6, 255]]],
    ),
    # full black ink is black whatever the colours; no ink is white; (255 - 51)(255 - 0)/255 = 204
    "cmyk jpeg": (saved(Image.new("CMYK", (8, 8), (51, 0, 0, 0)), "JPEG", quality=100), [[[204, 255, 255]] * 8] * 8),
    "black cmyk jpeg": (saved(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG", quality=100), [[[0, 0, 0]] * 8] * 8),
    "grey jpeg": (saved(Image.new("L", (8, 8), 77), "JPEG", quality=100), [[[77]] * 8] * 8),
}


@pytest.mark.parametrize("kind", PIXELS)
def test_pixels_are_those_worked_out_by_hand(kind):
    data, expected = PIXELS[kind]
    assert pixels(data).tolist() == expected
    assert scaled(np.array([[[0]], [[255]]], np.uint8)).ravel().tolist() == [-1, 1]


def test_the_content_decides_not_the_suffix_and_other_formats_are_refused():
    values = np.array([[[1, 2, 3]]], np.uint8)
    assert pixels(saved(values, "BMP"), "x.png").tolist() == [[[1, 2, 3]]]
    for kind in ("TIFF", "PPM", "TGA"):
        with pytest.raises(BadData, match="^x.png: not a PNG, JPEG, WebP, BMP or GIF image"):
            decode(saved(values, kind), "x.png")


def test_a_gif_gives_its_first_frame():
    frames = [Image.new("RGB", (3, 2), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(data).tolist() == [[[255, 0, 0]] * 3] * 2


def test_scaling_and_widening_agree_exactly_at_the_ends_and_to_rounding_between():
    eight, sixteen = np.arange(256, dtype=np.uint8), np.arange(65536, dtype=np.uint16)
    np.testing.assert_allclose(scaled(eight), np.arange(256) / 127.5 - 1, rtol=0, atol=1.2e-7)
    np.testing.assert_allclose(scaled(sixteen), np.arange(65536) / 32767.5 - 1, rtol=0, atol=1.2e-7)
    for values in (eight, sixteen):
        assert (scaled(values)[0], scaled(values)[-1]) == (-1, 1)
    np.testing.assert_allclose(scaled(widened(eight, "uint16")), scaled(eight), rtol=0, atol=1.2e-7)
    assert widened(eight, "float32").tolist() == scaled(eight).tolist()


# stored rows [1 2 3], [4 5 6]; what is to be seen, by the EXIF standard's table of orientations
SEEN = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


@pytest.mark.parametrize("turn", SEEN)
def test_exif_rotation_is_applied(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    stored = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    assert pixels(saved(stored, "PNG", exif=exif))[..., 0].tolist() == SEEN[turn]
    colour = np.random.default_rng(0).integers(0, 256, (8, 24, 3), dtype=np.uint8)
    for kind in ("JPEG", "WEBP"):
        data = saved(colour, kind, exif=exif)
        assert np.array_equal(pixels(data), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))
    odd = Image.Exif()
    odd[0x0112] = 99
    assert pixels(saved(stored, "PNG", exif=odd))[..., 0].tolist() == SEEN[1]


ARRAYS = {
    "5 channels": np.arange(30, dtype=np.uint8).reshape(2, 3, 5),
    "two axes": np.arange(6, dtype=np.uint8).reshape(2, 3),
    "uint16, big end first": np.array([[0, 258], [65535, 1]], dtype=">u2"),
    "columns first": np.asfortranarray(np.arange(12, dtype=np.uint8).reshape(2, 3, 2)),
    "float16": np.array([[-1, 0.5], [1, 0]], np.float16),
    "float64": np.array([[-1, 0.25], [1, 0]], np.float64),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_keep_their_values(kind):
    values = ARRAYS[kind]
    found = pixels(npy(values), "x.npy")
    assert np.array_equal(found, values.reshape(*values.shape[:2], -1))
    assert found.dtype == ("float32" if values.dtype.kind == "f" else values.dtype.newbyteorder("="))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0.0, 255.0]]), r"got floats in \[0, 255\], need \[-1, 1\]"),
        (np.array([[0.0, np.nan]]), r"got floats in \[nan, nan\]"),
        (np.array([[True]]), "got bool, need uint8, uint16 or float"),
        (np.array([[1]]), "got int64"),
        (np.array([[1]], np.uint32), "got uint32"),
        (np.array([[1j]]), "got complex128"),
        (np.array([[{"a": 1}]], dtype=object), "got object"),
        (np.zeros((2, 2, 2, 2)), r"got shape \(2, 2, 2, 2\), need \(H, W\) or \(H, W, C\)"),
        (np.zeros((2, 0)), r"got shape \(2, 0\)"),
    ],
)
def test_arrays_that_are_refused(values, reason):
    with pytest.raises(BadData, match=f"^dir/x.npy: {reason}"):
        decode(npy(values), "dir/x.npy")


def test_a_damaged_array_is_refused_before_its_size_is_believed():
    good = npy(np.zeros((2, 3), np.uint8))
    for data, reason in (
        (good[:-1], "holds 5 bytes of values, need 6"),
        (good + b"\0", "holds 7 bytes of values, need 6"),
        (good.replace(b"(2, 3)", b"(9**9,)"), "not a .npy file, or its header is damaged"),
        (good.replace(b"}", b" "), "not a .npy file, or its header is damaged"),
        (b"", "not a .npy file"),
        (b"PK\x03\x04", "not a .npy file"),
    ):
        with pytest.raises(BadData, match=reason):
            inspect(data, "x.npy")
    huge = npy(np.zeros((1, 1), np.uint8)).replace(b"(1, 1), }         ", b"(1, 9999999999), }")
    with pytest.raises(BadData, match="holds 1 bytes of values, need 9,999,999,999"):
        decode(huge, "x.npy")


NOISE = np.random.default_rng(1).integers(0, 256, (24, 20, 3), dtype=np.uint8)
WHOLE = {kind: saved(NOISE, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF")}
DAMAGEABLE = WHOLE | {"npy": npy(NOISE)}


@pytest.mark.parametrize("kind", WHOLE)
def test_truncated_files_are_refused_with_their_name(kind):
    for data in (b"", WHOLE[kind][:10], WHOLE[kind][: len(WHOLE[kind]) // 2]):
        with pytest.raises(BadData, match=r"^cat/a\.x: ") as error:
            decode(data, "cat/a.x")
        assert "\n" not in str(error.value)
        assert "0x" not in str(error.value), "the address of an object tells nobody anything"


@settings(max_examples=150)
@given(st.data())
def test_no_damage_gives_anything_but_pixels_or_bad_data(data):
    kind = data.draw(st.sampled_from(sorted(DAMAGEABLE)))
    whole = bytearray(DAMAGEABLE[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, min(len(whole) - 1, 200)))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadData), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header, found = decode(bytes(whole), f"x.{kind}")
        assert found.shape == (header.height, header.width, header.bands)


def test_decompression_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    for side, reason in ((20, "20 × 20 is more than 300 pixels"), (30, "decompression bomb")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(BadData, match=reason):
                inspect(saved(Image.new("L", (side, side)), "PNG"), "x.png")
    assert inspect(saved(Image.new("L", (15, 20)), "PNG"), "x.png").height == 20


def test_alpha_is_laid_over_the_background_by_the_formula():
    values = np.random.default_rng(2).integers(0, 256, (9, 9, 4), dtype=np.uint8)
    values[0, :2, 3] = 0, 255
    for background, under in (("white", 255), ("black", 0)):
        exact = values[..., :3] * (values[..., 3:] / 255) + under * (1 - values[..., 3:] / 255)
        assert np.array_equal(recolour(values, "rgb", background), np.rint(exact))
    luma = values[..., :3] @ [0.299, 0.587, 0.114] * values[..., 3] / 255  # over black, then grey: two roundings
    np.testing.assert_allclose(recolour(values, "grey", "black")[..., 0], luma, rtol=0, atol=1.01)


def test_grey_colour_and_alpha_turn_into_each_other():
    grey, colour = np.array([[[40]]], np.uint8), np.array([[[250, 100, 0]]], np.uint8)
    assert recolour(grey, "rgb", "white").tolist() == [[[40, 40, 40]]]
    assert recolour(grey, "rgba", "white").tolist() == [[[40, 40, 40, 255]]]
    assert recolour(colour, "rgba", "white").tolist() == [[[250, 100, 0, 255]]]
    assert recolour(colour, "grey", "white").tolist() == [[[round(0.299 * 250 + 0.587 * 100)]]]
    deep = np.array([[[1000]]], np.uint16)
    assert recolour(deep, "rgba", "white").tolist() == [[[1000, 1000, 1000, 65535]]]
    bands = np.zeros((1, 1, 5), np.uint8)
    assert recolour(bands, "raw", "white") is bands


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_resizing_keeps_a_ramp_in_its_place(dtype):
    """A linear ramp stays linear away from the edges: the value of a new pixel is that at its centre in the old."""
    height, width, top = 24, 48, {"uint8": 5, "uint16": 1000, "float32": 1 / 64}[dtype]
    ramp = np.broadcast_to(np.arange(width) * top, (height, width)).astype(dtype)[..., None]
    for how, left, step in (("crop", 12, 2), ("stretch", 0, 4)):
        out = resized(ramp, (12, 12), how, raw=dtype != "uint8")[..., 0].astype(np.float64)
        expected = (left + (np.arange(12) + 0.5) * step - 0.5) * top
        np.testing.assert_allclose(
            out[:, 3:9], np.broadcast_to(expected[3:9], (12, 6)), atol=1e-5 if dtype == "float32" else 0.5
        )
    same = resized(ramp, (24, 48), "crop", raw=False)
    assert same is ramp
    tall = resized(np.swapaxes(ramp, 0, 1), (12, 24), "crop", raw=dtype != "uint8")[..., 0].astype(np.float64)
    expected = (12 + 6 + (np.arange(12) + 0.5) - 0.5) * top  # the middle 12 of 48 rows, every column
    np.testing.assert_allclose(tall[3:9, 5], expected[3:9], atol=1e-5 if dtype == "float32" else 0.5)


def test_resizing_rounds_to_the_nearest_value():
    deep = np.random.default_rng(3).integers(0, 65536, (9, 9, 1), dtype=np.uint16)
    exact = Image.fromarray(deep[..., 0].astype(np.float32)).resize((4, 5), Image.Resampling.LANCZOS)
    found = resized(deep, (5, 4), "stretch", raw=False)[..., 0]
    assert np.array_equal(found, np.rint(np.asarray(exact)).clip(0, 65535))


def test_resizing_clips_and_weights_colours_by_alpha():
    step = np.zeros((8, 16, 1), np.float32)
    step[:, :8], step[:, 8:] = -1, 1
    found = resized(step, (64, 128), "stretch", raw=True)
    assert (found.min(), found.max()) == (-1, 1)  # Lanczos overshoots a step
    deep = resized(((step + 1) * 32767).astype(np.uint16), (64, 128), "stretch", raw=True)
    assert deep.min() == 0
    assert deep.max() > 65534 - 1
    edge = np.array([[[255, 0, 0, 255], [0, 255, 0, 0]]] * 2, np.uint8)
    assert np.abs(resized(edge, (1, 1), "stretch", raw=False).astype(int) - [[[255, 0, 0, 128]]]).max() <= 1
    bands = resized(edge, (1, 1), "stretch", raw=True).astype(int)
    assert np.abs(bands - [[[128, 128, 0, 128]]]).max() <= 1  # four bands of a .npy are no colours
