"""ResNet-18 with parametric SR-SOP (one candidate of GM-SOP without a gate), on Places365 at 100×100.

    gmsop train --config places365_parametric_srsop

Published: 47.48 % top-1, 17.52 % top-5 error; 8256 dimensions. The recipe is that for
64×64 ImageNet, because the authors did not publish theirs for Places365.
"""

from gmsop_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.dir = "data/places365"
    c.data.source = "places365"
    c.model.head = "srsop"
    c.model.projection_widths = (256, 128)
    c.train.learning_rates = ((0.15, 40), (0.015, 10), (0.0015, 5), (0.00015, 5))
    c.train.num_epochs = 60
    return c
