"""A small GM-SOP on 5,000 images of Fashion-MNIST, which come with the package.

    gmsop train --config quickstart

Expect a top-1 error of about 10 % on the 1,000 test images, within 3 minutes on two CPU cores.
"""

from gmsop_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.data.dir = "data/fashion_mnist_sample"
    c.data.source = "fashion-mnist"
    c.data.auto_convert = True
    c.model.blocks_per_stage = 1
    c.model.stage_widths = (16, 32, 32)
    c.model.stage_strides = (2, 2, 1)
    c.model.gate_widths = (32, 16)
    c.model.candidate_widths = (48, 32)
    c.model.num_candidates = 8
    c.model.num_selected = 4
    c.train.batch_size = 50
    c.train.learning_rates = ((0.1, 16),)
    c.train.schedule = "cosine"
    c.train.warmup_epochs = 1.0
    c.train.weight_decay = 2e-3
    c.train.rate_factors = (("head/classifier", 0.1),)  # its updates are larger due to the batch norm before it
    c.train.num_epochs = 16
    c.train.log_every_steps = 50
    c.eval.batch_size = 200
    c.parallel.cpu_devices = 0  # one device per core
    return c
