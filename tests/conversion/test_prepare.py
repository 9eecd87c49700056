"""The data set of a configuration is prepared before a run."""

import pytest

from gmsop_jax import config
from gmsop_jax.conversion import convert, prepare
from gmsop_jax.errors import DataError


def test_a_conversion_is_announced(tmp_path, monkeypatch, capsys):
    """If the name of a data set is mistyped, the user sees that other images are used in its place."""
    converted = []
    monkeypatch.setattr(convert, "convert", lambda *arguments: converted.append(arguments))
    data = config.load("quickstart", [f"data.dir={tmp_path / 'fotos'}"]).data
    prepare.prepare_data(data)
    assert converted == [("fashion-mnist", None, tmp_path / "fotos")]
    assert (
        capsys.readouterr().err
        == f"there is no data set at {tmp_path / 'fotos'} yet; converting fashion-mnist into this folder\n"
    )


def test_without_auto_convert_the_commands_are_named(tmp_path):
    data = config.load("imagenet64_gmsop", [f"data.dir={tmp_path / 'none'}"]).data
    with pytest.raises(DataError, match=r"no data set at .*/none.*\n  gmsop convert imagenet64 --input DOWNLOADS"):
        prepare.prepare_data(data)
