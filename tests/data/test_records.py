import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmsop_jax.data.records import CODECS, HEADER, Codec, decode, decode_batch, encode
from gmsop_jax.errors import DataError


def image(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([1, 3]),
    st.integers(0, 2**31 - 1),
    st.sampled_from(["raw", "png"]),
)
def test_round_trip(height: int, width: int, channels: int, label: int, codec: Codec):
    pixels = image(height, width, channels)
    example = decode(encode(pixels, label, codec=codec))
    assert example["label"] == label
    assert example["image"].shape == (height, width, 3)
    np.testing.assert_array_equal(example["image"], np.broadcast_to(pixels, (height, width, 3)))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_jpeg_is_near_and_small(channels: int):
    y, x = np.mgrid[:64, :80]
    pixels = np.stack([2 * y, 3 * x, y + x], -1).astype(np.uint8)[..., :channels]
    record = encode(pixels, 4, codec="jpeg")
    example = decode(record)
    assert example["label"] == 4
    assert np.abs(example["image"].astype(int) - np.broadcast_to(pixels, (64, 80, 3))).max() <= 6
    assert len(record) < pixels.size / 2


def test_a_side_too_long_for_jpeg_is_refused():
    with pytest.raises(DataError, match=r"can't be stored as JPEG .* use --codec raw"):
        encode(np.zeros((1, 65_501), np.uint8), 0, codec="jpeg")


def test_header_bytes():
    # magic, version 1, raw 0, 1 channel, 0, height 1, width 2, label 3; crc32; the pixels 4, 5
    record = encode(np.array([[4, 5]], np.uint8), 3)
    assert record[:16] == b"GSOP" + bytes([1, 0, 1, 0, 1, 0, 2, 0, 3, 0, 0, 0])
    assert record[20:] == bytes([4, 5])
    assert HEADER.itemsize == 20


@pytest.mark.parametrize("codec", CODECS)
def test_any_flipped_bit_is_found(codec: Codec):
    record = encode(image(3, 2, 3), 1, codec=codec)
    for bit in range(8 * len(record)):
        damaged = bytearray(record)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DataError):
            decode(bytes(damaged))


@pytest.mark.parametrize("codec", CODECS)
def test_any_truncation_is_found(codec: Codec):
    record = encode(image(3, 2, 3), 1, codec=codec)
    for length in range(len(record)):
        with pytest.raises(DataError):
            decode(record[:length])


@pytest.mark.parametrize(
    ("pixels", "label", "message"),
    [
        (np.zeros((2, 2, 3), np.float32), 0, "float32"),
        (np.zeros((2, 2, 4), np.uint8), 0, r"\(2, 2, 4\)"),
        (np.zeros((0, 2), np.uint8), 0, "0×2"),
        (np.zeros((2, 2), np.uint8), -1, "label -1"),
        (np.zeros((2, 2), np.uint8), 2**31, "label 2147483648"),
    ],
)
def test_invalid_images_and_labels_are_refused(pixels: np.ndarray, label: int, message: str):
    with pytest.raises(DataError, match=message):
        encode(pixels, label)


def test_batch_of_one_shape():
    records = [encode(image(4, 5, 3, seed), seed) for seed in range(7)]
    pixels, labels = decode_batch(records)
    assert isinstance(pixels, np.ndarray)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, range(7))
    np.testing.assert_array_equal(pixels, [image(4, 5, 3, seed) for seed in range(7)])


def test_batch_of_mixed_records():
    shapes = [(4, 5, 3), (5, 4, 3), (4, 15, 1)]  # equal sizes in bytes, different shapes
    codecs: list[Codec] = ["raw", "raw", "png"]
    records = [
        encode(image(*shape), at, codec=codec) for at, (shape, codec) in enumerate(zip(shapes, codecs, strict=True))
    ]
    pixels, labels = decode_batch(records)
    assert [image.shape for image in pixels] == shapes
    np.testing.assert_array_equal(labels, range(3))


def test_batch_with_a_foreign_record():
    good = encode(image(4, 5, 3), 0)
    with pytest.raises(DataError, match="b'XXXX'"):
        decode_batch([good, b"XXXX" + good[4:]])
