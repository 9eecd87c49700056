"""Published figures of GM-SOP, to be shown beside a run's own."""

import dataclasses

from gmsop_jax.config import ConfigDict


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of the authors' tables.

    Attributes:
      name: as they call the network.
      top1_error: percent.
      top5_error: percent; None where they give none.
    """

    name: str
    top1_error: float
    top5_error: float | None


# (source, head, basic blocks per stage, width factor, projection widths) → row; mixtures are the 16-8 ones
_ROWS = {
    ("imagenet64", "gap", 2, 1, ()): Published("ResNet-18", 52.17, 27.09),
    ("imagenet64", "gap", 2, 1, (512,)): Published("ResNet-18-512d", 49.08, 24.25),
    ("imagenet64", "gap", 2, 1, (8256,)): Published("ResNet-18-8256d", 47.29, None),
    ("imagenet64", "srsop", 2, 1, ()): Published("ResNet-18-SR-SOP", 40.56, 19.08),
    ("imagenet64", "gmgap", 2, 1, ()): Published("GM-GAP-16-8 + ResNet-18", 42.25, 19.46),
    ("imagenet64", "gmgap", 4, 2, ()): Published("GM-GAP-16-8 + WRN-36-2", 35.98, 14.62),
    ("imagenet64", "gmsop", 2, 1, ()): Published("GM-SOP-16-8 + ResNet-18", 38.48, 17.38),
    ("imagenet64", "gmsop", 4, 2, ()): Published("GM-SOP-16-8 + WRN-36-2", 32.71, 12.44),
    ("imagenet64", "gap", 6, 1, ()): Published("ResNet-50", 43.28, 19.39),
    ("imagenet64", "gap", 6, 1, (512,)): Published("ResNet-50-512d", 41.79, 18.30),
    ("imagenet64", "gap", 6, 1, (8256,)): Published("ResNet-50-8256d", 41.42, 18.14),
    ("imagenet64", "gmsop", 6, 1, ()): Published("GM-SOP-16-8 + ResNet-50", 35.73, 14.96),
    ("places365", "gap", 2, 1, (512,)): Published("ResNet-18-512d", 49.96, 19.19),
    ("places365", "gap", 2, 1, (8256,)): Published("ResNet-18-8256d", 49.99, 19.32),
    ("places365", "srsop", 2, 1, ()): Published("ResNet-18-SR-SOP", 48.11, 18.01),
    ("places365", "srsop", 2, 1, (256, 128)): Published("parametric SR-SOP", 47.48, 17.52),
    ("places365", "gmgap", 2, 1, ()): Published("GM-GAP-16-8 + ResNet-18", 48.07, 17.84),
    ("places365", "gmsop", 2, 1, ()): Published("GM-SOP-16-8 + ResNet-18", 47.18, 17.02),
}


def find_published(config: ConfigDict) -> Published | None:
    """The published row of a configuration's network and data set; None if there is none.

    Example:
      >>> from gmsop_jax.config import default_config
      >>> find_published(default_config()).top1_error
      38.48
    """
    m = config.model
    mixture = m.head.startswith("gm")
    if mixture and (m.num_candidates, m.num_selected) != (16, 8):
        return None
    projection = () if mixture else tuple(m.projection_widths)
    return _ROWS.get((config.data.source, m.head, m.blocks_per_stage, m.width_factor, projection))
