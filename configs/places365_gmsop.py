"""GM-SOP-16-8 + ResNet-18, on Places365 at 100×100.

    gmsop train --config places365_gmsop

Published: 47.18 % top-1, 17.02 % top-5 error; 8256 dimensions. The recipe is that for
64×64 ImageNet, because the authors did not publish theirs for Places365.
"""

from gmsop_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.dir = "data/places365"
    c.data.source = "places365"
    c.model.head = "gmsop"
    c.train.learning_rates = ((0.1, 40), (0.01, 10), (0.001, 5), (0.0001, 5))
    c.train.num_epochs = 60
    return c
