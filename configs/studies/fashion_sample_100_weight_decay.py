"""Six methods on the embedded sample of Fashion-MNIST, with a choice of the weight decay for each method.

    python tools/sweep.py configs/studies/fashion_sample_100_weight_decay.py

There are 4,500 images for training, 500 for validation and 1,000 for testing.
"""

import dataclasses
import pathlib

from gmsop_jax.config import run_file

_FIXED = run_file(pathlib.Path(__file__).with_name("fashion_sample_100.py"))
_METHODS = run_file(pathlib.Path(__file__).with_name("methods.py"))
_WEIGHT_DECAYS = (1e-4, 5e-4, 2e-3)
_SLOW_CLASSIFIER = ("gap", "srsop", "gmsop", "gmsop_all_selected")  # selected by fashion_sample_100.py

STUDY = dataclasses.replace(
    _FIXED.STUDY,
    name="fashion_sample_100_weight_decay",
    title="Fashion-MNIST, 4,500 training images, with tuned weight decay",
    grids=_METHODS.reused_grids(_SLOW_CLASSIFIER, epochs=20, weight_decays=_WEIGHT_DECAYS),
    notes="""\
The data and the split are those of the [study of 4,500 training images](fashion_sample_100.md), where the weight decay
is 10⁻⁴ for all methods. Here, it is chosen for each method, from 10⁻⁴, 5 · 10⁻⁴ and 2 · 10⁻³. The grid has no larger
value because 8 · 10⁻³ was never chosen in the [same study of emoji](emoji_weight_decay.md). The other hyperparameters
of a method are those that were selected with the fixed weight decay.""",
)
get_config = _FIXED.get_config
