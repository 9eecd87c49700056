"""Six methods on emoji, with a choice of the weight decay for each method.

    npm pack emoji-datasource-google emoji-datasource-twitter @lobehub/fluent-emoji-3d
    python tools/sweep.py configs/studies/emoji_weight_decay.py --input FOLDER

FOLDER contains the three packages that the first command downloads.
"""

import dataclasses
import pathlib

from gmsop_jax.config import run_file

_EMOJI = run_file(pathlib.Path(__file__).with_name("emoji.py"))
_METHODS = run_file(pathlib.Path(__file__).with_name("methods.py"))
_WEIGHT_DECAYS = (1e-4, 5e-4, 2e-3, 8e-3)
_SLOW_CLASSIFIER = ("avesop",)  # selected by emoji.py

STUDY = dataclasses.replace(
    _EMOJI.STUDY,
    name="emoji_weight_decay",
    title="Emoji in three vendors' drawings at 64×64, with tuned weight decay",
    grids=_METHODS.reused_grids(_SLOW_CLASSIFIER, epochs=10, weight_decays=_WEIGHT_DECAYS),
    notes="""\
The data, the classes and the split are those of the [study of emoji](emoji.md), where the weight decay is 10⁻⁴ for all
methods. Here, it is chosen for each method, from 10⁻⁴, 5 · 10⁻⁴, 2 · 10⁻³ and 8 · 10⁻³. The other hyperparameters of a
method are those that were selected with the fixed weight decay.""",
)
get_config = _EMOJI.get_config
