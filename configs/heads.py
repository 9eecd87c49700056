"""Every head, and the options of the gate, on the quickstart's backbone and images, with one simple recipe.

    gmsop train --config heads:HEAD

HEAD is one of `ROWS`. `gmsop sweep heads --seeds 0 1 2` trains all of them and makes one table. This tests that every
head can be trained; 1,000 small gray test images are too few to compare the methods.
"""

import pathlib

from gmsop_jax.config import ConfigDict, load
from gmsop_jax.errors import ConfigError

# name → fields of config.model
_HEADS = {
    "gap": {"head": "gap"},
    "gap_528d": {"head": "gap", "projection_widths": (528,)},
    "sop": {"head": "sop"},
    "srsop": {"head": "srsop"},
    "srsop_5_steps": {"head": "srsop", "num_iters": 5},
    "mpncov": {"head": "mpncov"},
    "dropcov": {"head": "dropcov"},
    "sot": {"head": "sot"},
    "parametric_srsop": {"head": "srsop", "projection_widths": (48, 32)},
    "avegap": {"head": "avegap"},
    "avesop": {"head": "avesop"},
    "concatgap": {"head": "concatgap"},
    "concatsop": {"head": "concatsop"},
    "gmgap": {"head": "gmgap"},
    "gmsop": {"head": "gmsop"},
    "gmsop_masked": {"gate_gradient": "masked"},
    "gmsop_noise_per_candidate": {"gate_noise": "candidate"},
    "gmsop_fixed_noise": {"gate_noise": "fixed"},
    "gmsop_no_noise": {"gate_noise": "none"},
    "gmsop_softmax_over_all": {"gate_softmax": "all", "balance_on": "softmax"},
    "gmsop_gate_on_gap": {"gate_order": 1},
    "gmsop_random_start": {"gate_init": "random"},
}
ROWS = tuple(_HEADS)


def get_config(head: str = "gmsop") -> ConfigDict:
    if head not in ROWS:
        raise ConfigError(f"configuration 'heads' defines no head {head!r}; choose one of {', '.join(ROWS)}")
    c = load(pathlib.Path(__file__).with_name("quickstart.py"))
    c.train.update(learning_rates=((0.05, 12), (0.005, 4)), schedule="steps", warmup_epochs=0.0)
    c.train.update(rate_factors=(), weight_decay=1e-4)
    c.model.update(_HEADS[head])
    return c
