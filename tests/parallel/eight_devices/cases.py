"""Training on eight devices; run by test_eight_devices.py in a process that has them."""

import contextlib
import functools
import math
import re
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import FrozenConfigDict

from gmsop_jax.analysis.scaling import count
from gmsop_jax.config import ConfigDict, default_config, model_defaults
from gmsop_jax.data.manifest import Manifest, Shard, Split
from gmsop_jax.errors import ConfigError
from gmsop_jax.models import create_model
from gmsop_jax.training import parallel
from gmsop_jax.training.checkpoint import Checkpoints, Progress
from gmsop_jax.training.optimizer import create_optimizer
from gmsop_jax.training.parallel import AXIS, create_mesh
from gmsop_jax.training.setup import prepare
from gmsop_jax.training.step import TrainState, create_state, make_train_step, normalize

MEAN_RGB = (70.0, 80.0, 90.0)


def small_model(head: str = "gmsop", **fields: Any) -> ConfigDict:
    """The configuration of a small network. It is hashable, for functions that cache their results."""
    c = model_defaults()
    c.head = head
    c.num_classes = 8
    c.blocks_per_stage = 1
    c.stage_widths = (4, 8)
    c.stage_strides = (2, 1)
    c.stem_width = 4
    c.num_candidates = 4
    c.num_selected = 2
    c.candidate_widths = (8,)
    c.gate_widths = (4,)
    c.dropout_rate = 0.3
    c.update(fields)
    return cast(ConfigDict, FrozenConfigDict(c))


def batches(count: int, size: int, side: int = 8) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 256, (size, side, side, 3), np.uint8),
            "label": rng.integers(0, 8, size).astype(np.int32),
        }
        for _ in range(count)
    ]


def data_config(folder: Path, num_images: int) -> ConfigDict:
    """The configuration of a small network, and the manifest of a data set whose shards are missing."""
    train, val = (Split(num_images, (8, 8), (num_images, 0), (Shard(n, num_images, 2**20, ""),)) for n in "ab")
    Manifest("none", ("a", "b"), MEAN_RGB, (MEAN_RGB,) * 3, {"train": train, "val": val}, {}).save(folder)
    config = default_config()
    fields = small_model("gap").to_dict()
    del fields["compute_dtype"], fields["num_classes"]
    config.model.update(fields)
    config.data.dir, config.data.on_corrupt = str(folder), "skip"
    return config


def create_initial_state(model: ConfigDict, side: int = 8, averaged: bool = False) -> TrainState:
    variables = create_model(model).init(jax.random.key(1), jnp.zeros((1, side, side, 3)))
    sgd = create_optimizer(default_config().train, lambda _: 0.05, model.pixel_scale)
    return create_state(variables, sgd, averaged=averaged)


@functools.cache
def initial_state(model: ConfigDict, averaged: bool = False) -> TrainState:
    """The same for any number of devices, which a step may donate: so it is kept on the host."""
    return jax.device_get(jax.jit(functools.partial(create_initial_state, model, averaged=averaged))())


class Trainer:
    """What `train.py` does with a step, without files."""

    def __init__(
        self,
        num_devices: int,
        model: ConfigDict,
        *,
        mode: str = "jit",
        per_device_bn: bool = False,
        sub_batches: int = 1,
        averaged: bool = False,
        **training: Any,
    ):
        self.mesh = parallel.create_mesh(jax.devices()[:num_devices])
        train = default_config().train
        train.update(training, sub_batches=sub_batches)
        sgd = create_optimizer(train, lambda _: 0.05, model.pixel_scale)
        step = make_train_step(
            create_model(model, axis_name=AXIS, per_device_bn=per_device_bn),
            sgd,
            train,
            seed=3,
            mean_rgb=MEAN_RGB,
            balance_ddof=model.balance_ddof,
            axis_name=AXIS,
        )
        self.step, self.place = parallel.compile_train_step(step, self.mesh, mode)
        self.initial = lambda: parallel.replicate(initial_state(model, averaged), self.mesh)

    def run(self, data: list[dict[str, np.ndarray]], state: TrainState | None = None) -> tuple[TrainState, np.ndarray]:
        """Trains; returns (state, losses and balance losses [steps, 2])."""
        current: TrainState = self.initial() if state is None else state
        logged = []
        for batch in data:
            current, metrics = self.step(current, self.place(batch))
            assert int(metrics["count"]) == len(batch["label"])
            logged.append([float(metrics["loss_sum"]), float(metrics["balance_loss"])])
        return current, np.array(logged)


_trainer = functools.cache(Trainer)


def trainer(num_devices: int, model: ConfigDict | None = None, mode: str = "jit", **options: Any) -> Trainer:
    """Returns the trainer that all test cases with the same arguments share, because its step compiles for seconds."""
    return _trainer(num_devices, model or small_model(), mode=mode, **options)


def assert_same(a, b, rtol: float = 2e-4, atol: float = 2e-4) -> None:
    a, b = jax.device_get((a, b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@functools.cache
def one_device():
    return trainer(1).run(batches(3, 16))


@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "pmap"}],
    ids=["jit", "pmap"],
)
def test_eight_devices_train_as_one(options):
    state, logged = trainer(8, **options).run(batches(3, 16))
    expected_state, expected = one_device()
    np.testing.assert_allclose(logged, expected, rtol=1e-5)
    assert_same(state, expected_state)


def test_mixup_and_averages_on_eight_devices():
    training = {"mixup_alpha": 0.4, "label_smoothing": 0.1, "ema_decay": 0.9, "averaged": True}
    model, data = small_model("gap"), batches(2, 16)
    expected_state, expected = trainer(1, model, **training).run(data)
    for mode in ("jit", "pmap"):
        state, logged = trainer(8, model, mode=mode, **training).run(data)
        np.testing.assert_allclose(logged, expected, rtol=1e-5)
        assert_same(state, expected_state)
    _, plain = trainer(1, model).run(data)
    assert np.abs(plain[:, 0] / expected[:, 0] - 1).max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "num_images", "message"),
    [
        ({"mixup_alpha": 0.2, "batch_size": 16}, 104, None),
        (
            {"mixup_alpha": 0.2, "batch_size": 8},
            104,
            r"batch_size = 8 gives each of 8 devices an odd number of rows \(1",
        ),
        ({"batch_size": 8}, 104, None),
        (
            {"mixup_alpha": 0.2, "batch_size": 32, "drop_last": False},
            104,
            "batch_size = 32 with config.train.drop_last = False leaves a last batch of 8 of 104 images, which gives"
            " each of 8 devices an odd number of rows",
        ),
        ({"batch_size": 16, "drop_last": False}, 104, None),
        (
            {"batch_size": 16, "drop_last": False},
            100,
            "a last batch of 4 of 100 images, which doesn't split evenly over 8 devices",
        ),
        (
            {"batch_size": 32, "drop_last": False, "sub_batches": 2},
            104,
            "a last batch of 8 of 104 images, which doesn't split evenly over 8 devices × 2 sub-batches",
        ),
    ],
)
def test_batches_that_can_not_be_split_are_refused(tmp_path, fields, num_images, message):
    config = data_config(tmp_path, num_images)
    config.train.update(fields)
    with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
        prepare(config, tmp_path / "run")


def test_a_last_batch_of_one_image_a_device_is_refused(tmp_path):
    """Batch norm would compute its statistics from single images, whose spread may be 0."""
    config = data_config(tmp_path, 24)
    config.train.update(batch_size=16, drop_last=False)
    prepare(config, tmp_path / "run")  # the last batch of 8 is normalised as a whole
    config.parallel.batch_norm = "device"
    with pytest.raises(
        ConfigError,
        match="leaves a last batch of 8 of 24 images, which makes batch norm compute its statistics from single images",
    ):
        prepare(config, tmp_path / "run")
    config.train.drop_last = True
    prepare(config, tmp_path / "run")


SLOW_PMAP = pytest.param("pmap", marks=pytest.mark.slow)


@pytest.mark.parametrize("mode", ["jit", SLOW_PMAP])
def test_smaller_last_batch(mode):
    data = [*batches(1, 16), *batches(1, 8)]
    model = small_model("gap")
    state, logged = trainer(8, model, mode=mode).run(data)
    expected_state, expected = trainer(1, model).run(data)
    np.testing.assert_allclose(logged, expected, rtol=1e-5)
    assert_same(state, expected_state)


@pytest.mark.parametrize("mode", ["jit", SLOW_PMAP])
def test_batch_norm_per_device_is_that_of_sub_batches(mode):
    """Two devices that normalise by themselves do what one does with two sub-batches."""
    model = small_model(dropout_rate=0.0, num_candidates=2, num_selected=2)  # no draw of candidates
    data = [{**batch, "gate_noise": np.linspace(-1, 1, 16, dtype=np.float32)} for batch in batches(2, 16)]
    interleaved = np.arange(16).reshape(2, 8).T.reshape(-1)  # sub-batch j has the rows j, j + 2, …
    parts = [{name: x[interleaved] for name, x in batch.items()} for batch in data]
    state, logged = trainer(2, model, mode=mode, per_device_bn=True).run(data)
    expected_state, expected = trainer(1, model, sub_batches=2).run(parts)
    np.testing.assert_allclose(logged, expected, rtol=1e-5)
    assert_same(state, expected_state)


@pytest.mark.slow
def test_sub_batches_on_many_devices():
    state, logged = trainer(4, sub_batches=2).run(batches(2, 16))
    for other_trainer in (trainer(1, sub_batches=2), trainer(4, sub_batches=2, mode="pmap")):
        other_state, other = other_trainer.run(batches(2, 16))
        np.testing.assert_allclose(logged, other, rtol=1e-5)
        assert_same(state, other_state)


@pytest.mark.parametrize("num_devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_checkpoint_goes_onto_other_devices(tmp_path: Path, num_devices):
    data = batches(3, 16)
    state, _ = trainer(8).run(data[:2])
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(state, Progress(2, 0, 1.0))
        checkpoints.wait()
        other = trainer(num_devices)
        sharding = parallel.replicated(other.mesh)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
        restored, progress = checkpoints.restore(like, 2)
    assert progress == Progress(2, 0, 1.0)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    assert {len(x.devices()) for x in jax.tree.leaves(restored)} == {num_devices}
    _, logged = other.run(data[2:], restored)
    np.testing.assert_allclose(logged, one_device()[1][2:], rtol=1e-5)


@functools.cache
def training_pass(axis_name: str | None):
    """(variables, images, labels' worth of rows) → (logits, balance loss), with noise, ties and dropout."""
    model = create_model(small_model(), axis_name=axis_name)
    variables = initial_state(small_model()).variables
    rngs = {"gating": jax.random.key(2), "dropout": jax.random.key(3)}

    def apply(images):
        (logits, aux), _ = model.apply(
            variables, normalize(images, MEAN_RGB), train=True, rngs=rngs, mutable=["batch_stats"]
        )
        return logits, aux["balance_loss"]

    return apply


@pytest.mark.parametrize("transformation", ["jit", "vmap", SLOW_PMAP, "shard_map"])
def test_network_under_transformations(transformation):
    images = batches(1, 16)[0]["image"]
    expected, balance = training_pass(None)(images)
    parts = images.reshape(8, 2, *images.shape[1:])
    apply = training_pass(AXIS)
    if transformation == "jit":
        logits, balances = jax.jit(training_pass(None))(images)
    elif transformation == "vmap":
        logits, balances = jax.vmap(apply, axis_name=AXIS)(parts)
    elif transformation == "pmap":
        logits, balances = jax.pmap(apply, axis_name=AXIS)(parts)
    else:
        rows, same = PartitionSpec(AXIS), PartitionSpec()
        mapped = jax.shard_map(apply, mesh=create_mesh(), in_specs=rows, out_specs=(rows, same), check_vma=False)
        logits, balances = jax.jit(mapped)(images)
    np.testing.assert_allclose(np.reshape(logits, expected.shape), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(balances, np.full(np.shape(balances), balance), rtol=1e-5)


# ---- docs/scaling.md

_COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_SHAPE = re.compile(r"\b(pred|s32|f32)\[([\d,]*)\]")


def collectives(program: str) -> tuple[set[str], int, int]:
    """Kinds, number and bytes of the collectives in a compiled program."""
    kinds, number, size = set(), 0, 0
    for found in filter(None, map(_COLLECTIVE.search, program.splitlines())):
        kinds.add(found["kind"])
        number += 1
        for dtype, shape in _SHAPE.findall(found["shapes"]):
            size += {"pred": 1, "s32": 4, "f32": 4}[dtype] * math.prod(map(int, filter(None, shape.split(","))))
    return kinds, number, size


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("head", ["gmsop", pytest.param("srsop", marks=pytest.mark.slow)])
def test_collectives_are_those_of_the_count(mode, head):
    model = small_model(head)
    trained, counts = trainer(8, model, mode=mode), count(model, 8)
    program = trained.step.lower(trained.initial(), trained.place(batches(1, 16)[0])).compile().as_text()
    kinds, number, size = collectives(program)
    assert kinds == {"all-reduce"}
    # XLA sends equal sums once: the bias gradients of a block's last two batch norms
    assert 0.99 * counts.bytes_reduced() < size <= counts.bytes_reduced()
    assert counts.batch_norms < number <= counts.most_reductions


@pytest.mark.slow
def test_collectives_of_the_published_network():
    """GM-SOP-16-8 on ResNet-18, 64×64, 1,000 classes: the figure of docs/scaling.md."""
    model = model_defaults()
    model.num_classes = 1000
    published = trainer(8, cast(ConfigDict, FrozenConfigDict(model)))
    sharding = parallel.replicated(published.mesh)
    state = jax.eval_shape(functools.partial(create_initial_state, model, side=64))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
    program = published.step.lower(state, published.place(batches(1, 8, side=64)[0])).compile().as_text()
    kinds, number, size = collectives(program)
    counts = count(model, 64)
    assert kinds == {"all-reduce"}
    assert 0.999 * counts.bytes_reduced() < size <= counts.bytes_reduced() == 41_686_772
    assert counts.batch_norms < number <= counts.most_reductions
