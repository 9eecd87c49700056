"""Ablations of GM-SOP: N, K, the gate's initial values, noise and gradient, the iterations, the classifier's rate.

    python tools/sweep.py configs/studies/ablations.py

The data are those of `fashion_sample_10.py`: 450 training images of Fashion-MNIST. Every grid contains the balance
weight α. The classifier's rate is its learning rate relative to that of the other layers.
"""

import dataclasses
import pathlib

from gmsop_jax.config import run_file

_TENTH = run_file(pathlib.Path(__file__).with_name("fashion_sample_10.py"))
_METHODS = run_file(pathlib.Path(__file__).with_name("methods.py"))
_EPOCHS = 20


def _grid(method: str) -> list[tuple[str, ...]]:
    point = _METHODS.first_point(method, epochs=_EPOCHS, slow_classifier=method != "gmsop_full_rate")
    return [(*point[:2], f"train.balance_weight={alpha}", *point[3:]) for alpha in (0, 20, 100)]


STUDY = dataclasses.replace(
    _TENTH.STUDY,
    name="ablations",
    title="Ablations of the gated mixture on 450 images of Fashion-MNIST",
    grids={method: _grid(method) for method in _METHODS.ABLATIONS},
    reference="gmsop",
    notes="""\
Each row changes one property of GM-SOP with N = 8 and K = 4, or N and K together. The balance weight α is chosen from
0, 20 and 100. The learning rate of the classifier is a tenth of that of the other layers, except in
`gmsop_full_rate`.""",
)
get_config = _TENTH.get_config
