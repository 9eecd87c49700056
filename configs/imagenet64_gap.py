"""ResNet-18 with global average pooling on 64×64 ImageNet-1K: the baseline.

    gmsop train --config imagenet64_gap

Published: 52.17 % top-1, 27.09 % top-5 error; 128 dimensions. The published table counts 0.9M parameters; this
network, the one that the authors' script builds, has 0.83M.
"""

from gmsop_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.model.head = "gap"
    c.model.stage_strides = (1, 2, 2, 2)  # 8×8 map
    c.train.learning_rates = ((0.075, 50), (0.0075, 15), (0.00075, 10))
    c.train.num_epochs = 75
    return c
