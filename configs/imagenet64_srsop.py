"""ResNet-18 with SR-SOP (iSQRT-COV, 3 iterations) on 64×64 ImageNet-1K.

    gmsop train --config imagenet64_srsop

Published: 40.56 % top-1, 19.08 % top-5 error; 9.0M parameters, 8256 dimensions.
"""

from gmsop_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.model.head = "srsop"
    c.train.learning_rates = ((0.15, 40), (0.015, 10), (0.0015, 5), (0.00015, 5))
    c.train.num_epochs = 60
    return c
