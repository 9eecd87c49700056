"""GM-GAP-16-8 + ResNet-18 on 64×64 ImageNet-1K.

    gmsop train --config imagenet64_gmgap

Published: 42.25 % top-1, 19.46 % top-5 error; 2.3M parameters, 512 dimensions.
"""

from gmsop_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.model.head = "gmgap"
    c.model.stage_strides = (1, 2, 2, 2)  # 8×8 map
    c.model.gate_widths = (256, 128)
    c.model.candidate_widths = (512,)
    c.train.learning_rates = ((0.075, 50), (0.0075, 15), (0.00075, 10))
    c.train.num_epochs = 75
    return c
