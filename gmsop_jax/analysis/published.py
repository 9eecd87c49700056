"""Short descriptions of networks, and the published results of some of them."""

import dataclasses

from gmsop_jax.config import ConfigDict


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of a published table: the authors' name for the network, and the values as printed.

    Errors are in percent, and `gmacs` counts billions of multiply-adds per image. A value that the authors do not give
    is None.
    """

    name: str
    top1_error: float | None = None
    top5_error: float | None = None
    parameters: str | None = None
    gmacs: str | None = None


# (source, backbone and its size, head and projection) → row; mixtures select 8 of 16 candidates
ROWS = {
    ("imagenet64", "narrow 2×1", "gap"): Published("ResNet-18", 52.17, 27.09, "0.9M"),
    ("imagenet64", "narrow 2×1", "gap (512,)"): Published("ResNet-18-512d", 49.08, 24.25, "1.3M"),
    ("imagenet64", "narrow 2×1", "gap (8256,)"): Published("ResNet-18-8256d", 47.29, None, "10.0M"),
    ("imagenet64", "narrow 2×1", "srsop"): Published("ResNet-18-SR-SOP", 40.56, 19.08, "9.0M"),
    ("imagenet64", "narrow 2×1", "gmgap"): Published("GM-GAP-16-8 + ResNet-18", 42.25, 19.46, "2.3M"),
    ("imagenet64", "narrow 4×2", "gmgap"): Published("GM-GAP-16-8 + WRN-36-2", 35.98, 14.62, "8.7M"),
    ("imagenet64", "narrow 2×1", "gmsop"): Published("GM-SOP-16-8 + ResNet-18", 38.48, 17.38, "10.3M"),
    ("imagenet64", "narrow 4×2", "gmsop"): Published("GM-SOP-16-8 + WRN-36-2", 32.71, 12.44, "15.7M"),
    ("imagenet64", "narrow 6×1", "gap"): Published("ResNet-50", 43.28, 19.39, "2.4M"),
    ("imagenet64", "narrow 6×1", "gap (512,)"): Published("ResNet-50-512d", 41.79, 18.30),
    ("imagenet64", "narrow 6×1", "gap (8256,)"): Published("ResNet-50-8256d", 41.42, 18.14),
    ("imagenet64", "narrow 6×1", "gmsop"): Published("GM-SOP-16-8 + ResNet-50", 35.73, 14.96, "11.9M"),
    ("places365", "narrow 2×1", "gap (512,)"): Published("ResNet-18-512d", 49.96, 19.19),
    ("places365", "narrow 2×1", "gap (8256,)"): Published("ResNet-18-8256d", 49.99, 19.32),
    ("places365", "narrow 2×1", "srsop"): Published("ResNet-18-SR-SOP", 48.11, 18.01),
    ("places365", "narrow 2×1", "srsop (256, 128)"): Published("parametric SR-SOP", 47.48, 17.52),
    ("places365", "narrow 2×1", "gmgap"): Published("GM-GAP-16-8 + ResNet-18", 48.07, 17.84),
    ("places365", "narrow 2×1", "gmsop"): Published("GM-SOP-16-8 + ResNet-18", 47.18, 17.02),
    ("image-folder", "resnet34 large", "gap"): Published("ResNet-34", 25.81, None, "21.8M"),
    ("image-folder", "resnet50 large", "gap"): Published("ResNet-50", 23.9, None, "25,557,032", "4.1"),
    ("image-folder", "resnet101 large", "gap"): Published("ResNet-101", 22.0, None, "44,549,160", "7.8"),
    ("image-folder", "resnext50_32x4d large", "gap"): Published("ResNeXt-50 32x4d", 22.2, None, "25,028,904", "4.1"),
    ("image-folder", "resnext101_32x4d large", "gap"): Published("ResNeXt-101 32x4d", 21.2, None, None, "7.8"),
    ("image-folder", "resnext101_64x4d large", "gap"): Published("ResNeXt-101 64x4d", 20.4, None, "83,455,272", "15.6"),
}


_DATA = {"imagenet64": (1000, 64), "places365": (365, 100), "image-folder": (1000, 224)}  # classes, side of the images


def find_published(
    config: ConfigDict, num_classes: int = 0, image_size: tuple[int, int] | None = None
) -> Published | None:
    """Returns the published result for a network and its data set, or None.

    Args:
      config: the configuration.
      num_classes: number of classes of the data set; 0 means that of the configuration.
      image_size: height and width of the images; None means those of the configuration.

    Example:
      >>> from gmsop_jax.config import default_config
      >>> find_published(default_config()).top1_error
      38.48
      >>> find_published(default_config(), num_classes=10) is None
      True
    """
    m, source = config.model, config.data.source
    mixture = m.head.startswith("gm")
    if source not in _DATA or (mixture and (m.num_candidates, m.num_selected) != (16, 8)):
        return None
    classes, side = _DATA[source]
    size = image_size or (config.data.image_size,) * 2
    if (num_classes or m.num_classes or classes) != classes or size not in ((0, 0), (side, side)):
        return None
    if source == "image-folder" and size == (0, 0):  # folders contain images of any size
        return None
    scale = f"{m.blocks_per_stage}×{m.width_factor}" if m.backbone == "narrow" else m.stem
    projection = "" if mixture or not m.projection_widths else f" {tuple(m.projection_widths)}"
    return ROWS.get((source, f"{m.backbone} {scale}", m.head + projection))


_HEADS = {"gap": "GAP", "sop": "SOP", "srsop": "SR-SOP", "mpncov": "MPN-COV", "dropcov": "DropCov", "sot": "SoT"}
_MIXTURES = {"gm": "GM", "ave": "Ave", "concat": "Concat"}
_NARROW = {(2, 1): "ResNet-18", (4, 2): "WRN-36-2", (6, 1): "narrow ResNet-50"}


def describe_network(m: ConfigDict) -> str:
    """Describes the head and the backbone of `config.model` in a few words.

    Example:
      >>> from gmsop_jax.config import model_defaults
      >>> describe_network(model_defaults())
      'GM-SOP-16-8 on ResNet-18'
    """
    return f"{_describe_head(m)} on {_describe_backbone(m)}"


def _describe_head(m: ConfigDict) -> str:
    kind = m.head.removesuffix("gap").removesuffix("sop")
    if kind in _MIXTURES:
        size = f"{m.num_candidates}-{m.num_selected}" if kind == "gm" else f"{m.num_candidates}"
        return f"{_MIXTURES[kind]}-{m.head.removeprefix(kind).upper()}-{size}"
    projection = f" of {m.projection_widths[-1]} channels" if m.projection_widths else ""
    return f"{_HEADS.get(m.head, m.head)}{projection}"


def _describe_backbone(m: ConfigDict) -> str:
    if m.backbone != "narrow":
        return m.backbone.replace("resnext", "ResNeXt-").replace("resnet", "ResNet-").replace("_", " ")
    size = (m.blocks_per_stage, m.width_factor)
    if tuple(m.stage_widths) == (16, 32, 64, 128) and size in _NARROW:
        return _NARROW[size]
    widths = ", ".join(str(width * m.width_factor) for width in m.stage_widths)
    return f"{m.blocks_per_stage} block{'s' if m.blocks_per_stage > 1 else ''} × ({widths})"
