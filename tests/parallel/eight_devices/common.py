"""A small GM-SOP, batches for it, and its training on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np

from gmsop_jax import parallel
from gmsop_jax.config import ConfigDict, model_defaults
from gmsop_jax.models import create_model
from gmsop_jax.optimizer import create_optimizer, piecewise_schedule
from gmsop_jax.train_step import TrainState, create_state, make_train_step

MEAN_RGB = (70.0, 80.0, 90.0)


def small_model(head: str = "gmsop", dropout_rate: float = 0.3) -> ConfigDict:
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
    c.dropout_rate = dropout_rate
    return c


def batches(count: int, size: int, side: int = 8) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 256, (size, side, side, 3), np.uint8),
            "label": rng.integers(0, 8, size).astype(np.int32),
        }
        for _ in range(count)
    ]


class Trainer:
    """What `train.py` does with a step, without files."""

    def __init__(
        self,
        num_devices: int,
        model: ConfigDict | None = None,
        *,
        mode: str = "jit",
        per_device_bn: bool = False,
        sub_batches: int = 1,
        optimizer: bool = False,
        classifier: bool = False,
    ):
        model = model or small_model()
        self.mesh = parallel.create_mesh(jax.devices()[:num_devices])
        sgd = create_optimizer(piecewise_schedule([(0.05, 9)], 1))

        def make_step(axis_name):
            network = create_model(model, axis_name=axis_name, per_device_bn=per_device_bn and axis_name is not None)
            return make_train_step(
                network, sgd, mean_rgb=MEAN_RGB, seed=3, sub_batches=sub_batches, axis_name=axis_name
            )

        def initial() -> TrainState:
            return create_state(create_model(model).init(jax.random.key(1), jnp.zeros((1, 8, 8, 3))), sgd)

        self.shardings = parallel.state_shardings(
            jax.eval_shape(initial), self.mesh, optimizer=optimizer, classifier=classifier
        )
        self.initial = jax.jit(initial, out_shardings=self.shardings)
        self.step = parallel.compile_train_step(
            make_step, self.mesh, self.shardings, mode=mode, per_device_bn=per_device_bn, sub_batches=sub_batches
        )

    def run(self, data: list[dict[str, np.ndarray]], state: TrainState | None = None):
        """Trains; returns (state, losses and balance losses [steps, 2])."""
        state = self.initial() if state is None else state
        told = []
        for batch in data:
            state, metrics = self.step(state, batch, len(batch["label"]))
            assert int(metrics["count"]) == len(batch["label"])
            told.append([float(metrics["loss_sum"]), float(metrics["balance_loss"])])
        return state, np.array(told)


def assert_same(a, b, rtol: float = 2e-4, atol: float = 2e-4) -> None:
    a, b = jax.device_get((a, b))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)
