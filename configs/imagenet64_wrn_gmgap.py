"""GM-GAP-16-8 + WRN-36-2 on 64×64 ImageNet-1K.

    gmsop train --config imagenet64_wrn_gmgap

Published: 35.98 % top-1, 14.62 % top-5 error; 8.7M parameters, 512 dimensions.
"""

from gmsop_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.model.head = "gmgap"
    c.model.blocks_per_stage = 4
    c.model.width_factor = 2
    c.model.stage_strides = (1, 2, 2, 2)  # 8×8 map
    c.model.gate_widths = (512,)
    c.model.candidate_widths = (512,)
    c.train.batch_size = 150
    c.train.learning_rates = ((0.1, 20), (0.01, 10), (0.001, 10))
    c.train.num_epochs = 40
    return c
