"""All methods on photographs of solar cells (ELPV) at 64×64: functional or defective.

    pip install elpv-dataset
    python tools/sweep.py configs/studies/elpv.py

The 2,624 images are divided in five ways: each fold has 70 % for training, 10 % for validation and 20 % for testing.
"""

import pathlib

from gmsop_jax.analysis.study import Study, StudyData
from gmsop_jax.config import ConfigDict, run_file

_METHODS = run_file(pathlib.Path(__file__).with_name("methods.py"))
_EPOCHS = 20

STUDY = Study(
    name="elpv",
    title="Solar cells (ELPV) at 64×64",
    grids={method: _METHODS.grid(method, epochs=_EPOCHS, size=3) for method in _METHODS.METHODS},
    data=[StudyData(f"elpv-64-fold{fold}", "elpv", {"size": 64, "fold": fold}) for fold in range(5)],
    seeds=range(1),
    test_splits=("test", "test_mono", "test_poly"),
    notes="""\
The data are 2,624 electroluminescence photographs of solar cells, resized from 300×300. A cell counts as defective if
experts rated the probability of a defect as at least ½. There are five folds, stratified by class and by kind of cell.
Deitsch et al. (2019) report an accuracy of 82.44 % (SVM) and 88.42 % (fine-tuned VGG-19 at the full size) with a single
random split into 75 % for training and 25 % for testing. Here, 70 % are for training, and the network is small and not
pretrained. With one seed and five folds, each image is tested once. The data set does not say which module a cell
belongs to, so cells of the same module can be in both the training and the test images.""",
)


def get_config(method: str = "gmsop") -> ConfigDict:
    c = _METHODS.create_config(method, epochs=_EPOCHS)
    c.model.stem_width = 8
    c.model.stage_strides = (4, 2, 1)
    return c
