"""Decodes image files of all modes, and stores many file names compactly."""

import dataclasses
import io
import re
import threading
import warnings
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageOps

from gmsop_jax.conversion.sources import UnreadableImage

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_WARNINGS_LOCK = threading.Lock()  # warning filters belong to the process, so threads change them one at a time
_EIGHT_BIT_MODES = {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"}
_BITS_TAG, _PHOTOMETRIC_TAG = 258, 262  # of TIFF


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decodes the bytes of an image file, which error messages call `name`.

    Gray images keep one channel. Palettes are converted to RGB, images with transparency are composited over white and
    become RGB, gray images of more than 8 bits are scaled to 8 bits (their transparency is ignored), and EXIF rotation
    is applied.

    Returns: uint8 [h, w, 1] or [h, w, 3].

    Raises:
      UnreadableImage: if Pillow can't decode the file, if it is a decompression bomb, or if the range of its mode is
        not defined (floating point, 32-bit integers, LAB).
    """
    try:
        with _WARNINGS_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unusual metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as file:
                pixels = _to_8_bits(file, name)
    except UnreadableImage:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{name}: {error}") from error
    except Exception as error:  # Pillow's decoders raise exceptions of many types on damaged files
        message = re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", str(error))  # addresses would make the message vary
        raise UnreadableImage(f"{name}: {message or type(error).__name__}") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _to_8_bits(file: Image.Image, name: str) -> np.ndarray:
    """Returns the upright pixels of an opened file, uint8 [h, w] or [h, w, 3]."""
    mode, white = file.mode, _white(file)
    if white is not None:
        return _scale(np.asarray(ImageOps.exif_transpose(file)), white, inverted=_is_inverted(file))
    if mode not in _EIGHT_BIT_MODES and not file.has_transparency_data:
        raise UnreadableImage(f"{name}: the range of Pillow's mode {mode} is not defined; convert it to 8 or 16 bits")
    image = ImageOps.exif_transpose(file)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(image.convert("L" if mode in ("1", "L") and image.mode == mode else "RGB"))


def _white(file: Image.Image) -> int | None:
    """Returns the value of white in a gray image with more than 8 bits; None for other modes, or if it is undefined."""
    tags = getattr(file, "tag_v2", None)
    if file.mode.startswith("I;16"):
        bits = tags.get(_BITS_TAG, (16,))[0] if tags else 16
        return 2**bits - 1
    return 65535 if file.mode == "I" and file.format in ("PPM", "PNG") else None


def _is_inverted(file: Image.Image) -> bool:
    """Returns whether 0 is white in a TIFF file of more than 8 bits, which Pillow does not invert itself."""
    tags = getattr(file, "tag_v2", None)
    return bool(tags) and tags.get(_PHOTOMETRIC_TAG) == 0


def _scale(values: np.ndarray, white: int, *, inverted: bool) -> np.ndarray:
    scaled = np.round(np.clip(values, 0, white) * (255 / white)).astype(np.uint8)
    return 255 - scaled if inverted else scaled


@dataclasses.dataclass(frozen=True)
class Names:
    """A sequence of many short strings, stored as one byte string instead of many objects."""

    text: bytes
    ends: np.ndarray

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """Stores the names."""
        text, ends = bytearray(), []
        for name in names:
            text += name.encode("utf-8", "surrogateescape")
            ends.append(len(text))
        return cls(bytes(text), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return self.text[start : int(self.ends[index])].decode("utf-8", "surrogateescape")
