"""All methods on 30 % of the training images of the embedded sample of Fashion-MNIST.

    python tools/sweep.py configs/studies/fashion_sample_30.py

1,350 training images, 500 for validation and 1,000 for the test.
"""

import dataclasses
import pathlib

from gmsop_jax.analysis.study import StudyData
from gmsop_jax.config import run_file

_TENTH = run_file(pathlib.Path(__file__).with_name("fashion_sample_10.py"))

STUDY = dataclasses.replace(
    _TENTH.STUDY,
    name="fashion_sample_30",
    title="Fashion-MNIST, 1,350 training images",
    data=[StudyData("fashion-sample-30", "fashion-mnist", {"val_fraction": 0.1, "train_fraction": 0.3})],
)
get_config = _TENTH.get_config
