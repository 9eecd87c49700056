"""The methods that the studies compare, and the grids from which their hyperparameters are chosen.

Every method has the same small backbone: three stages of one block, with 16, 32 and 32 channels. For images of 64×64,
the stem has 8 channels and the strides are 4, 2 and 1 instead of 2, 2 and 1. Second-order heads pool 32 channels, so
they have 32 · 33 / 2 = 528 features.
"""

from collections.abc import Collection, Sequence

from gmsop_jax.config import ConfigDict, default_config
from gmsop_jax.errors import ConfigError

_GATED = {"head": "gmsop", "candidate_widths": (48, 32), "num_candidates": 8, "num_selected": 4}

# name → fields of config.model
METHODS = {
    "gap": {"head": "gap"},
    "gap_wide": {"head": "gap", "projection_widths": (528,)},
    "srsop": {"head": "srsop"},
    "parametric_srsop": {"head": "srsop", "projection_widths": (48, 32)},
    "dropcov": {"head": "dropcov"},
    "avesop": {**_GATED, "head": "avesop"},
    "gmgap": {**_GATED, "head": "gmgap"},
    "gmsop": _GATED,
    # controls, which show what the mixture and its gate add
    "matched_srsop": {"head": "srsop", "projection_widths": (460, 32)},  # as many parameters as gmsop
    "gmsop_all_selected": {**_GATED, "num_selected": 8},
    "gmsop_random_gate": {**_GATED, "gate_init": "random", "gate_noise": "none"},  # frozen at its initial values
    "avesop_k": {**_GATED, "head": "avesop", "num_candidates": 4},  # K candidates with equal weights, for every image
}
_ABLATIONS = {
    "gmsop_n4_k2": {**_GATED, "num_candidates": 4, "num_selected": 2},
    "gmsop_n16_k8": {**_GATED, "num_candidates": 16, "num_selected": 8},
    "gmsop_k1": {**_GATED, "num_selected": 1},
    "gmsop_k2": {**_GATED, "num_selected": 2},
    "gmsop_random_start": {**_GATED, "gate_init": "random"},
    "gmsop_no_noise": {**_GATED, "gate_noise": "none"},
    "gmsop_noise_per_candidate": {**_GATED, "gate_noise": "candidate"},
    "gmsop_masked": {**_GATED, "gate_gradient": "masked"},
    "gmsop_5_iterations": {**_GATED, "num_iters": 5},
    "gmsop_full_rate": _GATED,
}
_RATE_FACTORS = {"gmsop_random_gate": (("head/mixture/gate", 0),)}
ABLATIONS = ("gmsop", *_ABLATIONS)
GATE_CONTROLS = ("gap", "srsop", "avesop_k", "gmsop", "gmsop_all_selected", "gmsop_random_gate")
LEARNING_CURVE = ("gap", "srsop", "dropcov", "avesop", "gmsop", "gmsop_all_selected")


def create_config(method: str, *, epochs: int, batch_size: int = 50) -> ConfigDict:
    """The configuration of a method, without data."""
    fields = (METHODS | _ABLATIONS).get(method)
    if fields is None:
        raise ConfigError(f"unknown method {method!r}; it must be one of {', '.join(METHODS | _ABLATIONS)}")
    c = default_config()
    c.model.blocks_per_stage = 1
    c.model.stage_widths = (16, 32, 32)
    c.model.stage_strides = (2, 2, 1)
    c.model.gate_widths = (32, 16)
    c.model.update(fields)
    c.train.rate_factors = _RATE_FACTORS.get(method, ())
    c.train.batch_size = batch_size
    c.train.schedule = "cosine"
    c.train.learning_rates = ((0.05, epochs),)
    c.train.num_epochs = epochs
    c.train.warmup_epochs = 1.0
    c.train.log_every_steps = 1000
    c.eval.batch_size = 250
    return c


def grid(method: str, *, epochs: int, size: int = 4) -> list[tuple[str, ...]]:
    """The grid from which the hyperparameters of a method are chosen; it has as many points for every method.

    Args:
      method: the method.
      epochs: number of epochs, over which the rates decay.
      size: number of points for each factor of the classifier's learning rate, 1 and 0.1.
    """
    rates = (0.05, 0.1, 0.02, 0.2)
    if not (METHODS | _ABLATIONS)[method]["head"].startswith(("ave", "gm")):
        pairs = [(rate, 0.0, 20) for rate in rates]
    elif (METHODS | _ABLATIONS)[method]["head"].startswith("ave") or method == "gmsop_random_gate":
        pairs = [(rate, dropout, 20) for dropout in (0.0, 0.2) for rate in rates[:2]]
    else:
        pairs = [(rate, dropout, balance) for dropout, balance in ((0.0, 20), (0.2, 100)) for rate in rates[:2]]
    points = [
        (
            f"train.learning_rates=(({rate}, {epochs}),)",
            f"model.dropout_rate={dropout}",
            f"train.balance_weight={balance}",
        )
        for rate, dropout, balance in pairs[:size]
    ]
    slow_classifier = (*_RATE_FACTORS.get(method, ()), ("head/classifier", 0.1))
    return points + [(*point, f"train.rate_factors={slow_classifier}") for point in points]


def first_point(method: str, *, epochs: int, slow_classifier: bool) -> tuple[str, ...]:
    """The first point of a method's grid, with the full learning rate of the classifier or a tenth of it."""
    full_rate, tenth = grid(method, epochs=epochs, size=1)
    return tenth if slow_classifier else full_rate


def reused_grids(
    slow_classifier: Collection[str], *, epochs: int, weight_decays: Sequence[float] = ()
) -> dict[str, list[tuple[str, ...]]]:
    """Grids of one point for the methods of `LEARNING_CURVE`, with the choices of another study.

    Args:
      slow_classifier: the methods for which that study chose a tenth of the learning rate for the classifier.
      epochs: number of epochs, over which the rates decay.
      weight_decays: values to choose from in addition; each makes a point.
    """
    grids = {}
    for method in LEARNING_CURVE:
        point = first_point(method, epochs=epochs, slow_classifier=method in slow_classifier)
        grids[method] = [(*point, f"train.weight_decay={value}") for value in weight_decays] or [point]
    return grids
