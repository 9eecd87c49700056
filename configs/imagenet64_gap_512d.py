"""ResNet-18 with average pooling after a 1×1 convolution to 512 channels, on 64×64 ImageNet-1K.

    gmsop train --config imagenet64_gap_512d

Published: 49.08 % top-1, 24.25 % top-5 error; 1.3M parameters, 512 dimensions. It is trained with the recipe
of the network without the convolution.
"""

from gmsop_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.model.head = "gap"
    c.model.stage_strides = (1, 2, 2, 2)  # 8×8 map
    c.model.projection_widths = (512,)
    c.train.learning_rates = ((0.075, 50), (0.0075, 15), (0.00075, 10))
    c.train.num_epochs = 75
    return c
