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
_SLOW_CLASSIFIER = ("gap", "srsop", "gmsop", "gmsop_all_selected")  # selected by fashion_sample_100.py

STUDY = Study(
    name="fashion_mnist",
    title="Fashion-MNIST, 54,000 training images",
    grids=_METHODS.reused_grids(_SLOW_CLASSIFIER, epochs=_EPOCHS),
    data=[StudyData("fashion-mnist-full", "fashion-mnist", {"val_fraction": 0.1})],
    notes="""\
The network has the same backbone as the quickstart, with 16, 32 and 32 channels, and is trained for 5 epochs.
Hyperparameters are not tuned in this study. Each method uses those that were selected with 4,500 training images.""",
)


def get_config(method: str = "gmsop") -> ConfigDict:
    return _METHODS.create_config(method, epochs=_EPOCHS)
