"""Image files → uint8 arrays, whatever their mode; and long lists of their names, kept small."""

import dataclasses
import io
import re
import threading
import warnings
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageOps

from gmsop_jax.conversion.sources import UnreadableImage

_warnings = threading.Lock()  # their filters are the process's: threads that change them take turns


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decodes an image file, upright.

    Gray stays gray; palettes are looked up; transparent pixels are laid over white; 16-bit gray is
    scaled to 8; EXIF rotation is applied.

    Args:
      data: the file's bytes.
      name: for the error.
    Returns: uint8 [h, w, 1] or [h, w, 3].
    Raises: UnreadableImage if Pillow can't decode it, or it is a decompression bomb.
    """
    try:
        with _warnings, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as file:
                pixels = np.asarray(_plain(ImageOps.exif_transpose(file)))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{name}: {error}") from error
    except Exception as error:  # Pillow's decoders raise errors of every kind on damaged files
        message = re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", str(error))  # the same file gives the same message
        raise UnreadableImage(f"{name}: {message or type(error).__name__}") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _plain(image: Image.Image) -> Image.Image:
    """The image in mode L or RGB."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode in ("L", "1"):
        return image.convert("L")
    return image.convert("RGB")


@dataclasses.dataclass(frozen=True)
class Names:
    """Millions of short strings without millions of objects."""

    text: bytes
    ends: np.ndarray

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """Packs the names."""
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
