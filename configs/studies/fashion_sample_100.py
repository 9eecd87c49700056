"""Six methods on 100 % of the training images of the embedded sample of Fashion-MNIST.

    python tools/sweep.py configs/studies/fashion_sample_100.py

There are 4,500 images for training, 500 for validation and 1,000 for testing.
"""

import dataclasses
import pathlib

from gmsop_jax.analysis.study import StudyData
from gmsop_jax.config import run_file

_TENTH = run_file(pathlib.Path(__file__).with_name("fashion_sample_10.py"))
_METHODS = run_file(pathlib.Path(__file__).with_name("methods.py"))
_EPOCHS = 20

STUDY = dataclasses.replace(
    _TENTH.STUDY,
    name="fashion_sample_100",
    title="Fashion-MNIST, 4,500 training images",
    grids={method: _METHODS.grid(method, epochs=_EPOCHS, size=1) for method in _METHODS.LEARNING_CURVE},
    data=[StudyData("fashion-sample-100", "fashion-mnist", {"val_fraction": 0.1})],
    notes="""\
The backbone is that of the quickstart, with 16, 32 and 32 channels. Each run trains for 20 epochs. The learning rate is
0.05 for all methods; that of the classifier is chosen for each method, 0.05 or 0.005.""",
)
get_config = _TENTH.get_config
