"""ResNet-18 with average pooling after a 1×1 convolution to 512 channels, on Places365 at 100×100.

    gmsop train --config places365_gap_512d

Published: 49.96 % top-1, 19.19 % top-5 error; 512 dimensions. The recipe is that for
64×64 ImageNet, because the authors did not publish theirs for Places365.
"""

from gmsop_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.dir = "data/places365"
    c.data.source = "places365"
    c.model.head = "gap"
    c.model.stage_strides = (1, 2, 2, 2)  # 13×13 map
    c.model.projection_widths = (512,)
    c.train.learning_rates = ((0.075, 50), (0.0075, 15), (0.00075, 10))
    c.train.num_epochs = 75
    return c
