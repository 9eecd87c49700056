"""GM-GAP-16-8 + ResNet-18, on Places365 at 100×100.

    gmsop train --config places365_gmgap

Published: 48.07 % top-1, 17.84 % top-5 error; 512 dimensions. The recipe is that for
64×64 ImageNet, because the authors did not publish theirs for Places365.
"""

from gmsop_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.dir = "data/places365"
    c.data.source = "places365"
    c.model.head = "gmgap"
    c.model.stage_strides = (1, 2, 2, 2)  # 13×13 map
    c.model.candidate_widths = (512,)
    c.train.learning_rates = ((0.075, 50), (0.0075, 15), (0.00075, 10))
    c.train.num_epochs = 75
    return c
