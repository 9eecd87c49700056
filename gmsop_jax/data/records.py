"""Conversion of labelled images to the bytes of a record, and back.

A record consists of a header of 20 bytes and the pixels. The header's fields are little-endian:

    magic 'GSOP' | version u8 | codec u8 | channels u8 (1 or 3) | 0 u8 | height u16 | width u16 | label i32 | crc32 u32

The checksum covers the whole record except itself. Pixels are uint8 [h, w, channels], stored raw in row-major order, as
a PNG, or as a JPEG of quality 95 without chroma subsampling. A gray image is stored as one channel, which is repeated
to three when it is read.
"""

import io
import zlib
from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np
from PIL import Image

from gmsop_jax.errors import DataError

Codec = Literal["raw", "png", "jpeg"]
CODECS: tuple[Codec, ...] = ("raw", "png", "jpeg")
VERSION = 1
HEADER = np.dtype(
    [
        ("magic", "S4"),
        ("version", "u1"),
        ("codec", "u1"),
        ("channels", "u1"),
        ("zero", "u1"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("label", "<i4"),
        ("crc", "<u4"),
    ]
)
_CRC = slice(HEADER.itemsize - 4, HEADER.itemsize)
MAX_SIDE = 2**16 - 1
_FORMATS: dict[Codec, tuple[str, dict[str, int]]] = {
    "png": ("PNG", {}),
    "jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
}
_MAX_LABEL = 2**31 - 1


class Example(TypedDict):
    """One image, uint8 [h, w, 3], and its 0-based label."""

    image: np.ndarray
    label: int


def encode(image: np.ndarray, label: int, *, codec: Codec = "raw") -> bytes:
    """Packs one image and its label.

    Args:
      image: uint8, [h, w] or [h, w, 1] (gray) or [h, w, 3] (RGB), with sides from 1 to 65,535.
      label: class, 0 to 2³¹ − 1.
      codec: `raw` pixels, which are read fastest; `png`, which is smaller and lossless; or `jpeg`, which is smallest
        and changes the pixels slightly.

    Returns: the bytes of the record.

    Raises:
      DataError: if the image, the label or the codec is invalid.

    Example:
      >>> decode(encode(np.zeros((2, 3), np.uint8), 7))["image"].shape
      (2, 3, 3)
    """
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    _check_image(pixels)
    if not 0 <= int(label) <= _MAX_LABEL:
        raise DataError(f"label {label} is outside 0…{_MAX_LABEL}; labels are 0-based class numbers")
    if codec not in CODECS:
        raise DataError(f"unknown record codec {codec!r}; use one of {', '.join(CODECS)}")
    height, width, channels = pixels.shape
    fields = (b"GSOP", VERSION, CODECS.index(codec), channels, 0, height, width, label, 0)
    record = bytearray(np.array([fields], HEADER).tobytes())
    record += pixels.tobytes() if codec == "raw" else _compress(pixels, codec)
    record[_CRC] = _checksum(record).to_bytes(4, "little")
    return bytes(record)


def decode(record: bytes) -> Example:
    """Unpacks one record and verifies its checksum.

    Returns: {'image': uint8 [h, w, 3], 'label': int}.

    Raises:
      DataError: if the bytes are truncated, changed or not a record.
    """
    header = _header(record)
    if int(header["crc"]) != _checksum(record):
        raise DataError("damaged record: its checksum differs; convert the data set again")
    pixels = _pixels(record, header)
    return {"image": np.repeat(pixels, 3 // pixels.shape[2], axis=2), "label": int(header["label"])}


def decode_batch(records: Sequence[bytes]) -> tuple[np.ndarray | list[np.ndarray], np.ndarray]:
    """Unpacks one or more records at once, with a single copy if they are raw and of one shape.

    The checksums of the records are not verified, since the ArrayRecord container has already verified its own.

    Returns: the pixels, uint8 [n, h, w, c] with c = 1 or 3, or a list of [h, w, c] if the shapes differ; and the
      labels, int32 [n].

    Raises:
      DataError: if a record is damaged.
    """
    first = _header(records[0])
    size = len(records[0])
    if first["codec"] == 0 and all(len(record) == size for record in records):
        table = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), size)
        headers = np.ascontiguousarray(table[:, : HEADER.itemsize]).view(HEADER)[:, 0]
        described = [name for name in HEADER.names or () if name not in ("label", "crc")]
        if (headers[described] == first[described]).all():
            shape = _raw_shape(records[0], first)
            return table[:, HEADER.itemsize :].reshape(len(records), *shape), headers["label"].astype(np.int32)
    headers = [_header(record) for record in records]
    pixels = [_pixels(record, header) for record, header in zip(records, headers, strict=True)]
    labels = np.array([header["label"] for header in headers], np.int32)
    return (np.stack(pixels) if len({image.shape for image in pixels}) == 1 else pixels), labels


def _check_image(pixels: np.ndarray) -> None:
    if pixels.dtype != np.uint8:
        raise DataError(f"image has dtype {pixels.dtype}; records must be uint8, so convert it first")
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise DataError(f"image has shape {pixels.shape}; expected [h, w], [h, w, 1] or [h, w, 3]")
    if not all(1 <= side <= MAX_SIDE for side in pixels.shape[:2]):
        raise DataError(f"image is {pixels.shape[0]}×{pixels.shape[1]}; sides must be from 1 to {MAX_SIDE}")


def _header(record: bytes) -> np.void:
    if len(record) < HEADER.itemsize:
        raise DataError(f"damaged record: it has {len(record)} bytes, but its header alone takes {HEADER.itemsize}")
    header = np.frombuffer(record, HEADER, count=1)[0]
    if header["magic"] != b"GSOP":
        raise DataError(f"not a record of gmsop_jax: it begins with {bytes(record[:4])!r}, not b'GSOP'")
    if header["version"] != VERSION:
        raise DataError(
            f"the record has version {header['version']}; this release reads {VERSION}: convert the data set again"
        )
    if header["codec"] >= len(CODECS) or header["channels"] not in (1, 3) or header["label"] < 0:
        raise DataError("damaged record: its header has an invalid codec, number of channels or label")
    return header


def _raw_shape(record: bytes, header: np.void) -> tuple[int, int, int]:
    shape = (int(header["height"]), int(header["width"]), int(header["channels"]))
    expected = shape[0] * shape[1] * shape[2]
    if len(record) - HEADER.itemsize != expected or not expected:
        raise DataError(f"damaged record: it has {len(record) - HEADER.itemsize} bytes of pixels, but shape {shape}")
    return shape


def _pixels(record: bytes, header: np.void) -> np.ndarray:
    if header["codec"] == 0:
        shape = _raw_shape(record, header)
        return np.frombuffer(record, np.uint8, offset=HEADER.itemsize).reshape(shape)
    shape = (int(header["height"]), int(header["width"]), int(header["channels"]))
    return _decompress(record[HEADER.itemsize :], shape, CODECS[header["codec"]])


def _checksum(record: bytes | bytearray) -> int:
    view = memoryview(record)
    return zlib.crc32(view[HEADER.itemsize :], zlib.crc32(view[: _CRC.start]))


def _compress(pixels: np.ndarray, codec: Codec) -> bytes:
    buffer = io.BytesIO()
    name, options = _FORMATS[codec]
    try:
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, name, **options)
    except (OSError, ValueError) as error:  # libjpeg's longest side is 65,500
        raise DataError(
            f"image of shape {pixels.shape} can't be stored as {name} ({error}); use --codec raw"
        ) from error
    return buffer.getvalue()


def _decompress(data: bytes, shape: tuple[int, int, int], codec: Codec) -> np.ndarray:
    name, _ = _FORMATS[codec]
    try:
        with Image.open(io.BytesIO(data), formats=[name]) as image:
            found = (image.height, image.width, len(image.getbands()))
            if found != shape or image.mode not in ("L", "RGB"):  # before memory for its pixels is allocated
                raise DataError(f"damaged record: it has a {name} of shape {found}, but its header says {shape}")
            pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"damaged record: {error}") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels
