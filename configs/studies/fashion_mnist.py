"""Six methods on all of Fashion-MNIST, with its official test images.

    python tools/sweep.py configs/studies/fashion_mnist.py --input /usr/share/datasets/fashion-mnist

There are 54,000 images for training, 6,000 for validation and 10,000 for testing. The folder is that of Debian's
package `dataset-fashion-mnist`; any folder with the four files of the data set works.
"""

import pathlib

from gmsop_jax.analysis.study import Study, StudyData
from gmsop_jax.config import ConfigDict, run_file

_METHODS = run_file(pathlib.Path(__file__).with_name("methods.py"))
_EPOCHS = 5
_FULL_RATE_CLASSIFIER = ("dropcov", "avesop")  # as fashion_sample_100.py chose


def _grid(method: str) -> list[tuple[str, ...]]:
    full_rate, slow_classifier = _METHODS.grid(method, epochs=_EPOCHS, size=1)
    return [full_rate if method in _FULL_RATE_CLASSIFIER else slow_classifier]


STUDY = Study(
    name="fashion_mnist",
    title="Fashion-MNIST, 54,000 training images",
    grids={method: _grid(method) for method in _METHODS.LEARNING_CURVE},
    data=[StudyData("fashion-mnist-full", "fashion-mnist", {"val_fraction": 0.1})],
    notes="""\
The backbone is that of the quickstart, with 16, 32 and 32 channels. Each run trains for 5 epochs. There is no choice of
hyperparameters: those of each method are the ones that were chosen for 4,500 training images.""",
)


def get_config(method: str = "gmsop") -> ConfigDict:
    return _METHODS.create_config(method, epochs=_EPOCHS)
