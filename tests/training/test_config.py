import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict as PlainConfigDict

from gmsop_jax.config import FIELDS, default_config, differences, flatten, from_json, load, override, to_json, validate
from gmsop_jax.errors import ConfigError
from gmsop_jax.models.network import HEADS, MIXTURES

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


# ---- the files that come along


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_files_are_valid_and_say_their_command(file):
    config = load(file)
    assert f"gmsop train --config {file.stem}" in file.read_text()
    assert sum(epochs for _, epochs in config.train.learning_rates) == config.train.num_epochs


def test_published_rows_are_there():
    names = {file.stem for file in CONFIGS}
    rows = {"gap", "srsop", "gmgap", "gmsop", "wrn_gmgap", "wrn_gmsop"}
    assert {"quickstart"} | {f"imagenet64_{row}" for row in rows} <= names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # blocks, width, gate trunk, candidates, dropout, batch, learning rates × epochs
        ("gap", (2, 1, None, None, None, 256, ((0.075, 50), (0.0075, 15), (0.00075, 10)))),
        ("srsop", (2, 1, None, None, None, 256, ((0.15, 40), (0.015, 10), (0.0015, 5), (0.00015, 5)))),
        ("gmgap", (2, 1, (256, 128), (512,), 0.2, 256, ((0.075, 50), (0.0075, 15), (0.00075, 10)))),
        ("gmsop", (2, 1, (256, 128), (256, 128), 0.2, 256, ((0.1, 40), (0.01, 10), (0.001, 5), (0.0001, 5)))),
        ("wrn_gmgap", (4, 2, (512,), (512,), 0.2, 150, ((0.1, 20), (0.01, 10), (0.001, 10)))),
        (
            "wrn_gmsop",
            (4, 2, (512, 128), (512, 128), 0.4, 150, ((0.09, 20), (0.009, 10), (0.0009, 5), (0.00009, 5))),
        ),
    ],
)
def test_published_recipes(name, expected):
    config = load(CONFIGS[0].parent / f"imagenet64_{name}.py")
    blocks, width, gate, candidates, dropout, batch, rates = expected
    m = config.model
    assert (m.blocks_per_stage, m.width_factor, config.train.batch_size) == (blocks, width, batch)
    assert [tuple(pair) for pair in config.train.learning_rates] == [pytest.approx(pair) for pair in rates]
    if gate:
        assert (m.num_candidates, m.num_selected, config.train.balance_weight) == (16, 8, 100)
        assert (m.gate_widths, m.candidate_widths, m.dropout_rate) == (gate, candidates, dropout)
    # the last stage's stride: 16×16 maps for second order, 8×8 for first
    assert m.stage_strides == ((1, 2, 2, 1) if "sop" in name else (1, 2, 2, 2))
    assert (config.train.momentum, config.train.weight_decay) == (0.9, 1e-4)


def test_fields_that_others_rely_on():
    names = dict(flatten(default_config()))
    assert {
        "data.dir",
        "model.num_candidates",
        "model.num_selected",
        "train.batch_size",
        "train.num_epochs",
        "seed",
    } <= set(names)


# ---- overrides


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("train.batch_size=64", 64),
        ("data.dir=a=b", "a=b"),
        ("data.flip=false", False),
        ("data.flip=True", True),
        ("train.weight_decay=1", 1.0),
        ("train.weight_decay=1e-5", 1e-5),
        ("model.gate_widths=(64,)", (64,)),
        ("model.gate_widths=[64, 32]", (64, 32)),
        ("model.head=gap", "gap"),
    ],
)
def test_override(assignment, value):
    config = default_config()
    override(config, assignment)
    name = assignment.partition("=")[0]
    got = dict(flatten(config))[name]
    assert got == value
    assert type(got) is type(value)


def test_compute_dtype_has_one_value_under_two_names():
    for name in ("compute_dtype", "model.compute_dtype"):
        config = default_config()
        override(config, f"{name}=bfloat16")
        assert config.compute_dtype == config.model.compute_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.batchsize=4", r"there is no field config.train.batchsize; did you mean train.batch_size\?"),
        ("batch_size=4", r"there is no field config.batch_size; did you mean (train|eval).batch_size\?"),
        ("model.num_candidate=4", r"did you mean model.num_candidates\?"),
        ("zzz=4", "there is no field config.zzz; known names are seed, .*model.head, "),
        ("train.batch_size", "config.train.batch_size needs a value"),
        ("train.batch_size=4.5", "config.train.batch_size must be an int .*but got '4.5'"),
        ("train.batch_size=True", "config.train.batch_size must be an int .*but got 'True'"),
        ("train.batch_size=", "config.train.batch_size must be an int"),
        ("train.momentum=fast", "config.train.momentum must be a float .*but got 'fast'"),
        ("data.flip=1", "config.data.flip must be a bool"),
        ("model.gate_widths=64", "config.model.gate_widths must be a tuple"),
        ("model.gate_widths=(nan,)", "must be a tuple"),
        ("model=3", "there is no field config.model;"),
    ],
)
def test_override_refuses(assignment, message):
    with pytest.raises(ConfigError, match=message):
        override(default_config(), assignment)


# ---- validation


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.num_selected=17", r"num_selected \(K = 17\) exceeds config.model.num_candidates \(N = 16\)"),
        ("model.num_selected=0", "config.model.num_selected must be between 1 and .*, got 0"),
        ("model.num_iters=0", "config.model.num_iters must be between 1 and 100, got 0"),
        ("model.coefficients=chebyshev", r"must be one of \('newton_schulz', 'minimax'\), got 'chebyshev'"),
        (
            "model.pool_precision=TF32_TF32_F32",
            r"must be one of \('', 'highest', .*'BF16_BF16_F32_X6'\), got 'TF32_TF32_F32'",
        ),
        ("model.head=gmspo", r"config.model.head must be one of .* got 'gmspo'; did you mean 'gmsop'\?"),
        ("model.gate_gradient=soft", "config.model.gate_gradient must be one of"),
        ("compute_dtype=float16", "compute_dtype must be one of .* got 'float16'"),
        ("model.candidate_widths=()", r"config.model.candidate_widths must be positive integers, .*got \(\)"),
        ("model.gate_widths=(64, 0)", r"config.model.gate_widths must be positive integers, .*got \(64, 0\)"),
        ("model.gate_widths=(64.5,)", r"must be positive integers"),
        ("model.gate_widths=('a',)", r"must be positive integers"),
        ("model.stage_widths=(16, 32)", "need one entry for each stage"),
        ("model.dropout_rate=1.0", r"dropout_rate must be in \[0, 1\), got 1.0"),
        ("model.pixel_scale=0.0", "pixel_scale must be positive"),
        ("model.backbone=resnet51", r"backbone must be one of .* did you mean 'resnet50'\?"),
        ("model.stem=large", "config.model.stem = 'large' needs a backbone other than 'narrow'"),
        ("model.gate_noise=loud", "gate_noise must be one of"),
        ("model.gate_softmax=none", "gate_softmax must be one of"),
        ("model.gate_order=3", r"gate_order must be one of \(0, 1, 2\), got 3"),
        ("model.gate_init=zeros", "gate_init must be one of"),
        ("model.balance_on=gate", "balance_on must be one of"),
        ("model.balance_ddof=2", "balance_ddof must be one of"),
        ("model.power=0.0", "power must be positive, got 0.0"),
        ("model.batch_norm_rate=0.0", r"batch_norm_rate must be in \(0, 1\], got 0.0"),
        ("data.crop=random", "crop must be one of"),
        ("data.crop_area=(0.5,)", r"crop_area must be a pair \(smallest, largest\)"),
        ("data.crop_area=(0.5, 0.1)", r"crop_area must be a pair \(smallest, largest\)"),
        ("data.crop_padding=-1", "crop_padding must be between 0 and 4096"),
        ("eval.resize=256", "eval.resize needs config.data.image_size"),
        ("train.optimizer=adam", r"optimizer must be one of .*did you mean 'adamw'\?"),
        ("train.schedule=cosine", r"takes one pair \(rate, epochs\)"),
        ("train.warmup_epochs=61.0", "warmup_epochs = 61.0 is longer than the 60 epochs"),
        ("train.rate_factors=(('backbone', -1),)", "rate_factors must be pairs"),
        ("train.rate_factors=('backbone', 1)", "rate_factors must be pairs"),
        ("train.label_smoothing=1.0", r"label_smoothing must be in \[0, 1\)"),
        ("train.ema_decay=1.0", r"ema_decay must be in \[0, 1\)"),
        ("train.mixup_alpha=-1.0", "mixup_alpha must be at least 0"),
        ("train.momentum=1.0", r"momentum must be in \[0, 1\)"),
        ("train.weight_decay=-1.0", "weight_decay must be at least 0"),
        ("train.num_epochs=0", "config.train.num_epochs must be between 1"),
        ("train.learning_rates=()", "learning_rates must be pairs"),
        ("train.learning_rates=(0.1, 40)", "learning_rates must be pairs"),
        ("train.learning_rates=((0.1,),)", "learning_rates must be pairs"),
        ("train.learning_rates=((0.1, 0),)", "learning_rates must be pairs"),
        ("train.learning_rates=((0.1, 2.5),)", "learning_rates must be pairs"),
        ("train.learning_rates=((-0.1, 2),)", "learning_rates must be pairs"),
        ("train.learning_rates=(('fast', 2),)", "learning_rates must be pairs"),
        ("train.weight_decay=1e999", "weight_decay must be a finite number, got inf"),
        ("train.momentum=nan", "momentum must be a finite number, got nan"),
        ("train.weight_decay=1e39", "weight_decay must be a finite number, got 1e\\+39"),
        ("train.num_epochs=99999999999999999999", "num_epochs must be between 1 and 1000000"),
        ("train.learning_rates=((0.1, 99999999999999999999),)", "learning_rates must be pairs"),
        ("model.gate_widths=(True, 3)", "must be positive integers"),
        ("checkpoint.every_steps=-1", "every_steps must be between 0"),
        ("seed=99999999999999999999", "config.seed must be between 0 and 4294967295"),
        ("data.image_size=100000", "config.data.image_size must be between 0 and 4096, got 100000"),
        ("model.num_classes=-1", "config.model.num_classes must be between 0"),
        ("model.dropout_rate=1.5", r"dropout_rate must be in \[0, 1\), got 1.5"),
        ("train.learning_rates=((1e999, 2),)", "learning_rates must be pairs"),
        ("data.dir=", "config.data.dir is empty"),
        ("seed=-1", "config.seed must be between 0 and 4294967295, got -1"),
        ("checkpoint.keep=0", "config.checkpoint.keep must be between 1"),
    ],
)
def test_validation_refuses(assignment, message):
    config = default_config()
    override(config, assignment)
    with pytest.raises(ConfigError, match=message):
        validate(config)


def write(tmp_path: Path, *lines: str) -> Path:
    body = "".join(f"    {line}\n" for line in lines)
    file = tmp_path / "own.py"
    file.write_text(
        "from gmsop_jax.config import default_config\n\n"
        f"def get_config():\n    c = default_config()\n{body}    return c\n"
    )
    return file


def test_a_file_of_ones_own(tmp_path):
    config = load(write(tmp_path, "c.model.num_candidates = 4", "c.model.num_selected = 3"), ["seed=5"])
    assert (config.model.num_candidates, config.model.num_selected, config.seed) == (4, 3, 5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c.train.batchsize = 4", r"there is no field config.train.batchsize; did you mean train.batch_size\?"),
        ("c.train.batch_size = 'many'", r"own\.py, line 5: TypeError: .*'batch_size'"),
        ("c.data.dir = 3", r"line 5: TypeError: .*'dir'"),
        ("del c.seed", "config.seed is missing; start from default_config"),
        ("c.model.num_selected = 20", "K = 20"),
    ],
)
def test_a_file_with_a_mistake(tmp_path, line, message):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, line))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 3\n", r"own\.py has no function get_config\(\)"),
        (
            "def get_config():\n    return 3\n",
            r"get_config\(\) of .*own\.py returns 3; it should return default_config",
        ),
        ("def get_config(:\n", r"own\.py, line 1: SyntaxError"),
        ("\nimport nowhere\n", r"own\.py, line 2: ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_a_file_that_is_not_a_configuration(tmp_path, content, message):
    (tmp_path / "own.py").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "own.py")


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"configuration file .*none\.py does not exist"):
        load(tmp_path / "none.py")
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(ConfigError, match="is not a Python file"):
        load(tmp_path / "text.txt")


def test_a_config_that_is_not_made_from_the_defaults():
    with pytest.raises(ConfigError, match="is missing; start from default_config"):
        validate(PlainConfigDict({"seed": 1}))  # pyright: ignore[reportArgumentType]


# ---- stored and compared


def test_json_round_trip():
    config = default_config()
    override(config, "compute_dtype=bfloat16")
    override(config, "model.gate_widths=(64,)")
    again = from_json(to_json(config))
    assert dict(flatten(again)) == dict(flatten(config))
    assert json.loads(to_json(config))["train"]["learning_rates"][0] == [0.1, 40]
    validate(again)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"x"',
        "[" * 5000,
        '{"seed": null}',
        '{"seed": "many"}',
        '{"train": {"batch_size": [1]}}',
    ],
)
def test_damaged_json_is_refused(text):
    with pytest.raises(ConfigError, match="stored config"):
        from_json(text)


def test_stored_fields_that_are_unknown_are_refused():
    with pytest.raises(ConfigError, match=r"has the field config.model.depth = 3, which this version"):
        from_json('{"model": {"depth": 3}}')


@pytest.mark.parametrize("split", [False, True])
def test_stored_fields_that_were_removed_are_accepted(split):
    stored = json.loads(to_json(default_config()))
    stored["parallel"] |= {"shard_optimizer": split, "shard_classifier": split}
    stored["model"]["dispatch"] = "pallas"
    config = from_json(json.dumps(stored))
    validate(config)
    assert dict(flatten(config)) == dict(flatten(default_config()))
    stored["parallel"]["shard_optimizer"] = "half"
    with pytest.raises(ConfigError, match=r"config.parallel.shard_optimizer = 'half', which this version"):
        from_json(json.dumps(stored))


def test_every_field_has_a_valid_default_and_a_meaning():
    validate(default_config())
    for name, field in FIELDS.items():
        assert field.meaning, name
        assert all(type(choice) is type(field.default) for choice in field.allowed.choices), name


NUMBERS = [name for name, field in FIELDS.items() if type(field.default) in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("text", ["9" * 50, "-1", "nan", "inf"])
def test_every_number_has_a_range(name, text):
    """What would overflow or spread in the software below stops here."""
    config = default_config()
    with pytest.raises(ConfigError, match=f"config.{name} must be"):  # noqa: PT012
        override(config, f"{name}={text}")
        validate(config)


def test_an_int_for_a_tuple_is_refused(tmp_path):
    for line in ("c.model.gate_widths = 64", "c.model.candidate_widths = 64"):
        with pytest.raises(ConfigError, match="line 5: TypeError"):
            load(write(tmp_path, line))


def test_differences_name_what_changes_the_computation():
    a, b = default_config(), default_config()
    assert differences(a, b) == []
    for assignment in ("seed=1", "model.gate_widths=(64,)", "data.dir=elsewhere", "train.log_every_steps=1"):
        override(b, assignment)
    assert sorted(differences(a, b)) == ["config.model.gate_widths: (256, 128) → (64,)", "config.seed: 0 → 1"]


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ("model.backbone=resnet50", "model.blocks_per_stage=4"),
            "blocks_per_stage applies to the backbone 'narrow'",
        ),
        (("model.backbone=resnet50", "model.stem_width=64"), "stem_width applies to the backbone 'narrow' only"),
        (("data.image_size=224", "eval.resize=200"), "eval.resize = 200 is smaller than config.data.image_size = 224"),
        (("model.projection_widths=(256,)",), "projection_widths = .* applies to heads without a mixture"),
        (("model.head=gap", "model.projection_batch_norm=true"), "projection_batch_norm needs .*projection_widths"),
        (("model.backbone=resnet50", "model.stage_strides=(1, 2, 2)"), "stage_strides needs four entries for resnet50"),
        (("model.coefficients=minimax", "model.num_iters=13"), "num_iters = 13 must be at most 12 if .*'minimax'"),
        (("model.head=sot", "model.power=1.5"), "power = 1.5 must be at most 1 for the head 'sot'"),
        (("train.optimizer=adamw", "train.nesterov=true"), "nesterov applies to 'sgd'"),
        (
            ("train.schedule=cosine", "train.learning_rates=((0.1, 40),)"),
            r"is more than the 40 epochs of the cosine, .*\(\(0.1, 60\),\)",
        ),
    ],
)
def test_fields_that_do_not_fit_each_other_are_refused(assignments, message):
    config = default_config()
    for assignment in assignments:
        override(config, assignment)
    with pytest.raises(ConfigError, match=message):
        validate(config)


@pytest.mark.parametrize("head", [head for head in HEADS if head not in MIXTURES])
def test_heads_without_a_mixture_take_projections(head):
    config = default_config()
    for assignment in (f"model.head={head}", "model.projection_widths=(256,)", "model.projection_batch_norm=true"):
        override(config, assignment)
    validate(config)
    assert config.model.projection_widths == (256,)


def test_a_head_without_gate_needs_no_k():
    config = default_config()
    for assignment in ("model.head=avesop", "model.num_candidates=3"):
        override(config, assignment)
    validate(config)
    assert config.model.num_selected > config.model.num_candidates


def test_an_error_within_a_file_names_its_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("x = 1\ny = 1 / 0\n")
    with pytest.raises(ConfigError, match=r"mine.py, line 2: ZeroDivisionError"):
        load(f"{file}:argument")
