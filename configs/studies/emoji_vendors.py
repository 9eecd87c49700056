"""Six methods on emoji at 64×64, with the drawings of one vendor left out of training and used for testing.

    npm pack emoji-datasource-google emoji-datasource-twitter @lobehub/fluent-emoji-3d
    python tools/sweep.py configs/studies/emoji_vendors.py --input FOLDER

FOLDER contains the three packages that the first command downloads.
"""

import dataclasses
import pathlib

from gmsop_jax.analysis.study import StudyData
from gmsop_jax.config import run_file

_EMOJI = run_file(pathlib.Path(__file__).with_name("emoji.py"))
_METHODS = run_file(pathlib.Path(__file__).with_name("methods.py"))
_VENDORS = ("google", "twitter", "fluent")
_SLOW_CLASSIFIER = ("avesop",)  # selected by emoji.py

STUDY = dataclasses.replace(
    _EMOJI.STUDY,
    name="emoji_vendors",
    title="Emoji of a vendor whose drawings were not seen, at 64×64",
    grids=_METHODS.reused_grids(_SLOW_CLASSIFIER, epochs=10),
    data=[StudyData(f"emoji-64-without-{vendor}", "emoji", {"leave_out": vendor}) for vendor in _VENDORS],
    test_splits=("test",),
    seeds=(0, 1),
    notes="""\
The data are 1,852 emoji, each drawn by Google, Twitter and Microsoft. The classes are nine groups of emoji. The
drawings of one vendor are the test images, and those of the other two are for training (90 % of the emoji) and
validation. The error is the mean over the three vendors that can be left out. Most of the emoji themselves were seen in
training, in the drawings of the other vendors. Hyperparameters are not tuned in this study. Each method uses those that
were selected in the study of all three vendors, on validation images that included drawings of the vendor that is left
out here.""",
)
get_config = _EMOJI.get_config
