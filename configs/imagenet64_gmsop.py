"""GM-SOP-16-8 + ResNet-18 on 64×64 ImageNet-1K.

    gmsop train --config imagenet64_gmsop

Published: 38.48 % top-1, 17.38 % top-5 error; 10.3M parameters, 8256 dimensions.
"""

from gmsop_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    return default_config()  # the defaults are those of this network
