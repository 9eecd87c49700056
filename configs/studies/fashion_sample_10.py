"""All methods on a tenth of the training images of the embedded sample of Fashion-MNIST.

    python tools/sweep.py configs/studies/fashion_sample_10.py

There are 450 images for training, 500 for validation and 1,000 for testing.
"""

import pathlib

from gmsop_jax.analysis.study import Study, StudyData
from gmsop_jax.config import ConfigDict, run_file

_METHODS = run_file(pathlib.Path(__file__).with_name("methods.py"))
_EPOCHS = 20

STUDY = Study(
    name="fashion_sample_10",
    title="Fashion-MNIST, 450 training images",
    grids={method: _METHODS.grid(method, epochs=_EPOCHS, size=3) for method in _METHODS.METHODS},
    data=(StudyData("fashion-sample-10", "fashion-mnist", {"val_fraction": 0.1, "train_fraction": 0.1}),),
    notes="The backbone is that of the quickstart, with 16, 32 and 32 channels. Each run trains for 20 epochs.",
)


def get_config(method: str = "gmsop") -> ConfigDict:
    return _METHODS.create_config(method, epochs=_EPOCHS)
