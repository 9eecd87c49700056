"""All methods on emoji drawn by three vendors, at 64×64; the classes are nine groups of emoji.

    npm pack emoji-datasource-google emoji-datasource-twitter @lobehub/fluent-emoji-3d
    python tools/sweep.py configs/studies/emoji.py --input FOLDER

All drawings of an emoji are in the same split. `emoji_vendors.py` leaves a vendor out instead.
"""

import pathlib

from gmsop_jax.analysis.study import Study, StudyData
from gmsop_jax.config import ConfigDict, run_file

_METHODS = run_file(pathlib.Path(__file__).with_name("methods.py"))
_EPOCHS = 10

STUDY = Study(
    name="emoji",
    title="Emoji in three vendors' drawings at 64×64",
    grids={method: _METHODS.grid(method, epochs=_EPOCHS, size=1) for method in _METHODS.METHODS},
    data=[StudyData("emoji-64-fold0", "emoji", {"fold": 0})],
    test_splits=("test", "test_google", "test_twitter", "test_fluent"),
    notes="""\
The data are 1,852 emoji, each drawn by Google, Twitter and Microsoft. The classes are nine groups of emoji. The three
drawings of an emoji are in the same split: 70 % of the emoji are for training, 10 % for validation and 20 % for
testing. Networks are trained for 10 epochs. The learning rate is 0.05 for all methods; that of the classifier is
chosen for each method, 0.05 or 0.005. Runs with a learning rate of 0.1 were begun, but not completed for all methods,
and are not used.""",
)


def get_config(method: str = "gmsop") -> ConfigDict:
    c = _METHODS.create_config(method, epochs=_EPOCHS)
    c.model.stem_width = 8
    c.model.stage_strides = (4, 2, 1)
    return c
