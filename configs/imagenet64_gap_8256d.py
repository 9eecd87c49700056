"""ResNet-18 with average pooling after a 1×1 convolution to 8256 channels, on 64×64 ImageNet-1K.

    gmsop train --config imagenet64_gap_8256d

Published: 47.29 % top-1 error; 10.0M parameters, 8256 dimensions. It is trained with the recipe of the network without
the convolution.
"""

from gmsop_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.model.head = "gap"
    c.model.stage_strides = (1, 2, 2, 2)  # 8×8 map
    c.model.projection_widths = (8256,)
    c.train.learning_rates = ((0.075, 50), (0.0075, 15), (0.00075, 10))
    c.train.num_epochs = 75
    return c
