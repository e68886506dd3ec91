"""Every format that a photo comes in is decoded to upright RGB, and what is no photo is refused by its row."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import encode, write_dataset
from PIL import Image

import train


def upright(mode: str = "RGB") -> Image.Image:
    """Red over blue with a green corner at the top left: no two of the eight EXIF orientations look alike."""
    photo = Image.new("RGB", (48, 32), (220, 30, 30))
    photo.paste((30, 30, 220), (0, 16, 48, 32))
    photo.paste((30, 200, 30), (0, 0, 16, 8))
    return photo.convert(mode)


STORED_AS = {  # how a camera stores the upright photo, by the EXIF orientation that it then writes
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(orientation: int, **options) -> bytes:
    photo = (
        upright() if STORED_AS[orientation] is None else upright().transpose(STORED_AS[orientation])
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(photo, exif=exif.tobytes(), **options)


def animated(kind: str) -> bytes:
    file = io.BytesIO()
    upright().save(
        file,
        kind,
        save_all=True,
        append_images=[Image.new("RGB", (48, 32), "white")],
        lossless=True,
    )
    return file.getvalue()


def one_colour_png(width: int, height: int, rows: int) -> bytes:
    """A small PNG file that claims width × height pixels and holds so many rows of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packer = zlib.compressobj(9)
    pixels = (
        b"".join(packer.compress(b"\0" + b"\x80\x40\x20" * width) for _ in range(rows))
        + packer.flush()
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


TAKEN = {  # file and the RGB image that it shows
    "jpeg": (lambda: encode(upright(), quality=95), upright()),
    "cmyk": (lambda: encode(upright("CMYK"), quality=95), upright("CMYK").convert("RGB")),
    "grey jpeg": (lambda: encode(upright("L"), quality=95), upright("L").convert("RGB")),
    "png": (lambda: encode(upright(), format="PNG"), upright()),
    "alpha": (lambda: encode(upright("RGBA"), format="PNG"), upright()),
    "palette": (lambda: encode(upright().quantize(4), format="PNG", transparency=0), upright()),
    "grey png": (lambda: encode(upright("L"), format="PNG"), upright("L").convert("RGB")),
    "webp": (lambda: encode(upright(), format="WEBP", lossless=True), upright()),
    "animated webp": (lambda: animated("WEBP"), upright()),
    "bmp": (lambda: encode(upright(), format="BMP"), upright()),
    "gif": (lambda: encode(upright(), format="GIF"), upright()),
    "animated gif": (lambda: animated("GIF"), upright()),
    "tiff": (lambda: encode(upright(), format="TIFF"), upright()),
    "one pixel": (
        lambda: encode(Image.new("RGB", (1, 1), "red")),
        Image.new("RGB", (1, 1), (254, 0, 0)),
    ),
    "5000 px": (
        lambda: one_colour_png(5000, 5000, 5000),
        Image.new("RGB", (5000, 5000), (128, 64, 32)),
    ),
    **{
        f"exif {turn} jpeg": (lambda turn=turn: turned(turn, quality=95), upright())
        for turn in STORED_AS
    },
    **{
        f"exif {turn} png": (lambda turn=turn: turned(turn, format="PNG"), upright())
        for turn in STORED_AS
    },
}


def mean_difference(photo: torch.Tensor, expected: Image.Image) -> float:
    expected = train.v2.functional.pil_to_tensor(expected)
    assert photo.dtype == torch.uint8 and photo.shape == expected.shape
    return (photo.int() - expected.int()).abs().float().mean().item()


@pytest.mark.parametrize("kind", TAKEN)
def test_every_kind_of_photo_is_upright_rgb(kind):
    make, expected = TAKEN[kind]
    assert mean_difference(train.decode_photo(make()), expected) < 4


@pytest.mark.parametrize("mode, dtype", [("L", np.uint8), ("I;16", np.uint16)])
def test_greyscale_and_16_bit_become_rgb_of_the_same_brightness(mode, dtype):
    grey = np.linspace(0, np.iinfo(dtype).max, 32 * 48).reshape(32, 48).astype(dtype)
    photo = train.decode_photo(encode(Image.fromarray(grey), format="PNG"))
    expected = (grey / np.iinfo(dtype).max * 255).round()
    assert photo.shape == (3, 32, 48) and photo.dtype == torch.uint8
    assert np.abs(photo.numpy() - expected).max() <= 1


REFUSED = {
    "empty": lambda: b"",
    "cut off": lambda: encode(upright().resize((600, 400)))[:3000],
    "text": lambda: b"a text named .jpg",
    "1 x 5000": lambda: encode(Image.new("RGB", (1, 5000))),
    "bomb of 400 million pixels": lambda: one_colour_png(20000, 20000, 1),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_photo_is_refused_by_its_row(kind, tmp_path):
    rows = [(encode(upright()), 0), (REFUSED[kind](), 0)]
    cars = train.load_cars(str(write_dataset(tmp_path, rows, rows, ["a", "b"])))
    photos = train.CarPhotos(cars["test"], train.center_crop, 64)
    photos[0, 0]
    with pytest.raises(train.InputError, match="the test photo in row 1 cannot be decoded"):
        photos[0, 1]
