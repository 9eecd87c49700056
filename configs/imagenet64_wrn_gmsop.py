"""GM-SOP-16-8 + WRN-36-2 on 64×64 ImageNet-1K.

    gmsop train --config imagenet64_wrn_gmsop

Published: 32.71 % top-1, 12.44 % top-5 error; 8256 dimensions. The published table counts 15.7M
parameters; this network, the one that the authors' script builds, has 17.81M.
"""

from gmsop_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.model.blocks_per_stage = 4
    c.model.width_factor = 2
    c.model.gate_widths = (512, 128)
    c.model.candidate_widths = (512, 128)
    c.model.dropout_rate = 0.4
    c.train.batch_size = 150
    c.train.learning_rates = ((0.09, 20), (0.009, 10), (0.0009, 5), (0.00009, 5))
    c.train.num_epochs = 40
    return c
