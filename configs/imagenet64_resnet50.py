"""The authors' "ResNet-50" on 64×64 ImageNet-1K: their ResNet-18 with 6 basic blocks per stage.

    gmsop train --config imagenet64_resnet50:HEAD

HEAD is one of `ROWS`. Published: top-1 / top-5 errors of 43.28 / 19.39 % with gap (2.4M parameters), 41.79 / 18.30 %
with gap_512d, 41.42 / 18.14 % with gap_8256d, and 35.73 / 14.96 % with gmsop (11.9M parameters). The recipes are those
of ResNet-18's heads.
"""

from gmsop_jax.config import ConfigDict, default_config
from gmsop_jax.errors import ConfigError

ROWS = ("gap", "gap_512d", "gap_8256d", "gmsop")


def get_config(head: str = "gmsop") -> ConfigDict:
    if head not in ROWS:
        raise ConfigError(
            f"configuration 'imagenet64_resnet50' defines no head {head!r}; choose one of {', '.join(ROWS)}"
        )
    c = default_config()
    c.model.blocks_per_stage = 6
    if head.startswith("gap"):
        c.model.head = "gap"
        c.model.stage_strides = (1, 2, 2, 2)  # 8×8 map
        c.model.projection_widths = {"gap": (), "gap_512d": (512,), "gap_8256d": (8256,)}[head]
        c.train.learning_rates = ((0.075, 50), (0.0075, 15), (0.00075, 10))
        c.train.num_epochs = 75
    return c
