import ast
import io
import pathlib

import jax
import jax.numpy as jnp
import pytest

from gmsop_jax import config as configs
from gmsop_jax.analysis import summary
from gmsop_jax.analysis.costs import cost, multiply_adds
from gmsop_jax.errors import ConfigError
from gmsop_jax.main import main
from gmsop_jax.models import count_parameters, create_model

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))
CONFIGURATIONS = summary.all_configurations()
SMALL = [path for path in CONFIGURATIONS if "imagenet.py" not in path and "heads.py" not in path]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_configuration_says_how_it_is_run(file):
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    assert f"gmsop train --config {file.stem}" in docstring
    assert "Published:" in docstring or file.stem in ("quickstart", "heads")


def test_packaged_configurations_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.packaged_files() == FILES
    for name, path in [("quickstart", "quickstart.py"), ("imagenet:resnet50,gmsop", "imagenet.py:resnet50,gmsop")]:
        assert configs.load(name).to_dict() == configs.load(f"{ROOT}/configs/{path}").to_dict()
        assert configs.run_name(name) == configs.run_name(path)
    with pytest.raises(ConfigError, match=r"configuration file quikstart does not exist.*did you mean quickstart\?"):
        configs.load("quikstart")
    with pytest.raises(
        ConfigError, match=r"configuration file configs/quickstart\.py does not exist.*did you mean quickstart\?"
    ):
        configs.load("configs/quickstart.py")
    (tmp_path / "quickstart").write_text("")  # a file of the user's comes first
    with pytest.raises(ConfigError, match="quickstart is not a Python file"):
        configs.load("quickstart")


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: pathlib.Path(path).name)
def test_a_configuration_is_valid(path):
    config = configs.load(path)
    assert sum(epochs for _, epochs in config.train.learning_rates) == config.train.num_epochs


@pytest.mark.parametrize("path", SMALL, ids=lambda path: pathlib.Path(path).name)
def test_its_network_takes_the_images(path):
    first_order = {"gap": 128, "gap_512d": 512, "gmgap": 512, "wrn_gmgap": 512, "quickstart": 528}
    name = pathlib.Path(path).name.replace(".py", "").replace("imagenet64_resnet50:", "imagenet64_")
    expected = first_order.get(name.partition("_")[2] or name, 8256)
    assert summary.summarize(path).cost.features == expected


def test_every_network_of_imagenet_has_a_224_and_a_64_form():
    names = {path.partition(":")[2] for path in CONFIGURATIONS if "imagenet.py" in path}
    assert len(names) == 6 * 4 * 2
    config = configs.load(ROOT / "configs/imagenet.py:resnext50_32x4d,gmsop,64")
    model_config = config.model
    model_config.num_classes = 7
    images = jnp.zeros((2, 64, 64, 3))
    model = create_model(model_config)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    logits, aux = jax.eval_shape(model.apply, variables, images)
    assert (logits.shape, aux["features"].shape) == ((2, 7), (2, 8256))


@pytest.mark.parametrize(
    ("network", "parameters", "gmacs"),
    [
        ("resnet34", 21_797_672, 3.66),
        ("resnet50", 25_557_032, 4.09),
        ("resnet101", 44_549_160, 7.80),
        ("resnext50_32x4d", 25_028_904, 4.23),
        ("resnext101_64x4d", 83_455_272, 15.46),
    ],
)
def test_published_counts_of_imagenet_networks(network, parameters, gmacs):
    row = summary.summarize(str(ROOT / f"configs/imagenet.py:{network}"))
    assert row.cost.parameters == parameters
    assert round(row.cost.macs / 1e9, 2) == gmacs
    assert 0.92 < row.cost.compiled_macs / row.cost.macs < 1.04  # it leaves out what meets padding


@pytest.mark.parametrize(("backbone", "millions"), [("resnet34", 29.6), ("resnet50", 32.0), ("resnet101", 51.0)])
def test_published_parameters_of_dropcov_are_those_of_128_channels(backbone, millions):
    config = configs.load(ROOT / f"configs/imagenet.py:{backbone},dropcov")
    assert config.model.projection_widths == (256,)  # as the authors' code
    config.model.update(projection_widths=(128,), num_classes=1000)
    assert round(cost(config.model, 224).parameters / 1e6, 1) == millions


def test_multiply_adds_by_hand():
    m = configs.model_defaults()
    m.num_classes, m.blocks_per_stage, m.stem_width = 7, 1, 4
    m.stage_widths, m.stage_strides = (4,), (1,)
    m.num_candidates, m.num_selected, m.candidate_widths, m.gate_widths = 6, 2, (8, 3), (5,)
    positions = 10 * 10
    backbone = positions * 9 * (3 * 4 + 4 * 4 + 4 * 4)
    # three iterations of the square root take five products
    gate = positions * 4 * 5 + positions * (5 + 5**2) + 5 * 5**3 + 15 * 6  # with the mean
    candidate = positions * (4 * 8 + 8 * 3) + positions * (3 + 3**2) + 5 * 3**3
    weighted_sum = 2 * 6
    assert cost(m, 10).macs == backbone + gate + 2 * candidate + weighted_sum + 6 * 7


def test_multiply_adds_of_loops_and_branches():
    x = jnp.ones((3, 3))

    def loop(x):
        return jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=4)[0]

    def branch(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert multiply_adds(jax.make_jaxpr(loop)(x).jaxpr) == 4 * 27
    assert multiply_adds(jax.make_jaxpr(branch)(x).jaxpr) == 2 * 27


@pytest.mark.parametrize("argument", ["resnet51", "resnet50,gmsopp", "resnet50,gap,100", "resnet50,gap,64,1"])
def test_an_argument_that_names_no_network_is_refused(argument):
    with pytest.raises(ConfigError, match=f"^imagenet:{argument} should be imagenet:BACKBONE,HEAD,SIDE; BACKBONE one"):
        configs.load(ROOT / f"configs/imagenet.py:{argument}")


@pytest.mark.parametrize("name", ["heads", "imagenet64_resnet50"])
def test_a_packaged_configuration_is_named_without_a_path(name):
    with pytest.raises(ConfigError, match=f"^configuration '{name}' defines no head 'gsmop'; choose one of gap, "):
        configs.load(f"{name}:gsmop")


@pytest.mark.parametrize(("width", "millions"), [(512, 1.3), (8256, 10.0)])
def test_projected_baselines_have_the_published_parameters(width, millions):
    model_config = configs.load(ROOT / f"configs/imagenet64_gap_{width}d.py").model
    model_config.num_classes = 1000
    model = create_model(model_config)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    assert round(count_parameters(params) / 1e6, 1) == millions


@pytest.mark.slow
def test_the_readmes_table_is_what_is_counted():
    lines = (ROOT / "README.md").read_text().splitlines()
    documented = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    paths = {pathlib.Path(path).name.replace(".py", ""): path for path in SMALL}
    columns = [column for column in summary.HEADER if column not in ("side", "GMAC, XLA")]
    rows = [summary.summarize(paths[name]) for name in documented if name in paths]
    assert len(rows) == 19
    for row in rows:
        assert summary.markdown([row], columns).splitlines()[-1] == documented[row.name]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("count", [1, 2])
def test_the_progress_line_is_cleared_before_the_table(count, monkeypatch):
    """Otherwise, the table on standard output would begin on the same line."""
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr("sys.stdout", shown)
    assert main(["summary", *[str(ROOT / "configs/quickstart.py")] * count]) == 0
    progress, cleared, table = shown.getvalue().rsplit("\r", 2)
    assert f"0/{count}" in progress
    assert cleared.isspace()
    assert table.startswith("configuration ")
    assert f"\n{count} network{'s' * (count > 1)}; counts" in table


def test_no_progress_line_off_a_terminal(capsys):
    assert main(["summary", str(ROOT / "configs/quickstart.py")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "\r" not in captured.out


def test_a_summary_of_an_unknown_source_says_what_it_needs(tmp_path, capsys):
    file = tmp_path / "solar.py"
    lines = ["c.data.source = 'elpv'", "c.model.num_classes = 2", "c.data.image_size = 32"]
    header = "from gmsop_jax.config import default_config\ndef get_config():\n    c = default_config()\n"
    for known in (1, 2):
        file.write_text(header + "".join(f"    {line}\n" for line in lines[:known]) + "    return c\n")
        assert main(["summary", str(file)]) == 2
        assert "'elpv' are not known; set model.num_classes and data.image_size in" in capsys.readouterr().err
    file.write_text(header + "".join(f"    {line}\n" for line in lines) + "    return c\n")
    assert main(["summary", str(file)]) == 0
