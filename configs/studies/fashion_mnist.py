"""All methods on all of Fashion-MNIST, with its official test images.

    python tools/sweep.py configs/studies/fashion_mnist.py --input /usr/share/datasets/fashion-mnist

There are 54,000 images for training, 6,000 for validation and 10,000 for testing. The folder is that of Debian's
package `dataset-fashion-mnist`; any folder with the four files of the data set works.
"""

import pathlib

from gmsop_jax.analysis.study import Study, StudyData
from gmsop_jax.config import ConfigDict, run_file

_METHODS = run_file(pathlib.Path(__file__).with_name("methods.py"))
_EPOCHS = 10

STUDY = Study(
    name="fashion_mnist",
    title="Fashion-MNIST, all images",
    grids={method: _METHODS.grid(method, epochs=_EPOCHS) for method in _METHODS.METHODS},
    data=[StudyData("fashion-mnist-full", "fashion-mnist", {"val_fraction": 0.1})],
    notes="The backbone is that of the quickstart. Each run trains for 10 epochs on 54,000 images.",
)


def get_config(method: str = "gmsop") -> ConfigDict:
    return _METHODS.create_config(method, epochs=_EPOCHS, batch_size=100)
