"""Six methods on solar cells, clothing and emoji together, at 64×64: do images of several kinds need several poolings?

    python tools/sweep.py configs/studies/domains.py --input FOLDER

FOLDER contains the folders `elpv`, `fashion-mnist` and `emoji` with the inputs of these sources (see docs/data.md).
"""

import dataclasses
import pathlib

from gmsop_jax.analysis.study import StudyData
from gmsop_jax.config import run_file

_EMOJI = run_file(pathlib.Path(__file__).with_name("emoji.py"))
_METHODS = run_file(pathlib.Path(__file__).with_name("methods.py"))

STUDY = dataclasses.replace(
    _EMOJI.STUDY,
    name="domains",
    title="Solar cells, clothing and emoji together, at 64×64",
    grids={method: _METHODS.grid(method, epochs=10, size=1) for method in _METHODS.GATE_CONTROLS},
    data=[StudyData("domains-64-fold0", "domains", {"fold": 0})],
    test_splits=("test", "test_elpv", "test_fashion_mnist", "test_emoji"),
    notes="""\
Each network distinguishes 21 classes: two of solar cells, ten of clothing and nine of emoji. The images are of three
known kinds, so this is where a mixture of poolings should help if it helps anywhere. A tenth of Fashion-MNIST's
training images are used, so that they don't outnumber the other kinds. Networks are trained for 10 epochs. The learning
rate is 0.05 for all methods; that of the classifier is chosen for each method, 0.05 or 0.005.""",
)
get_config = _EMOJI.get_config
