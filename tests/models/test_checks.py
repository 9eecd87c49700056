"""Fields and inputs that the modules refuse."""

import functools
from typing import Any

import flax.nnx
import jax
import jax.numpy as jnp
import pytest

import gmsop_jax
from gmsop_jax.models import (
    BatchNorm,
    BottleneckResNet,
    CovarianceHead,
    CrossCovarianceHead,
    DropCovHead,
    GAPHead,
    Gate,
    GatedMixture,
    GatedMixtureHead,
    Mixture,
    MixtureHead,
    MPNCOVHead,
    ResNet,
    SecondOrderHead,
)

pytestmark = pytest.mark.usefixtures("unchecked_types")
KEY = jax.random.key(0)
HEADS: list[Any] = [
    GAPHead,
    CovarianceHead,
    CrossCovarianceHead,
    DropCovHead,
    SecondOrderHead,
    MPNCOVHead,
    MixtureHead,
    GatedMixtureHead,
]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "10"])
def test_number_of_classes_must_be_a_positive_int(head, value):
    with pytest.raises(ValueError, match=rf"{head.__name__}\.num_classes must be an int of at least 1, got {value!r}"):
        head(value)


@pytest.mark.parametrize("module", [MixtureHead, GatedMixtureHead, GatedMixture, Mixture])
@pytest.mark.parametrize("value", [(), 128, (0,), (64, -1), (64.0,), "64", None])
def test_candidate_widths_must_be_a_tuple_of_ints(module: Any, value):
    classes = (5,) if "Head" in module.__name__ else ()
    with pytest.raises(ValueError, match=r"candidate_widths must be a tuple of one or more positive ints, such as"):
        module(*classes, candidate_widths=value)


@pytest.mark.parametrize(
    ("module", "field", "values"),
    [
        (GatedMixtureHead, "dropout_rate", [1.5, 1, -0.1, float("nan"), "0.2"]),
        (MixtureHead, "dropout_rate", [1.5, 1, -0.1]),
        (SecondOrderHead, "projection_widths", [256, (0,)]),
        (GatedMixtureHead, "gate_widths", [256, (0,), None]),
        (GatedMixtureHead, "num_candidates", [0, 1.5]),
        (GatedMixtureHead, "num_selected", [0, -1]),
        (SecondOrderHead, "num_iters", [0, -1, 2.5, True, "5", None]),
        (GatedMixtureHead, "num_iters", [0, 2.5, True, "5"]),
        (GatedMixtureHead, "order", [0, 3]),
        (GatedMixtureHead, "gate_order", [3, -1]),
        (GatedMixtureHead, "gate_noise", ["loud", True, None]),
        (GatedMixtureHead, "gate_softmax", ["none"]),
        (GatedMixtureHead, "gate_gradient", ["hard"]),
        (GatedMixtureHead, "gate_init", ["zeros"]),
        (GatedMixtureHead, "balance_on", ["logits"]),
        (GatedMixtureHead, "balance_ddof", [2, -1, True]),
        (GatedMixtureHead, "dispatch", ["pallas"]),
        (MixtureHead, "combine", ["add"]),
        (MPNCOVHead, "power", [0, -0.5]),
    ],
)
def test_fields_out_of_range_are_refused(module: Any, field, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"{module.__name__}\.{field} must be .*, got "):
            module(5, **{field: value})


def test_fields_of_layers_and_backbones_out_of_range_are_refused():
    refused: list[tuple[Any, dict[str, Any]]] = [
        (BatchNorm, {"running_rate": 1.1}),
        (BatchNorm, {"epsilon": -1e-5}),
        (Gate, {"num_candidates": 0}),
        (ResNet, {"stage_widths": 16}),
        (ResNet, {"stage_widths": ()}),
        (ResNet, {"width_factor": 0}),
        (ResNet, {"pixel_scale": 0}),
        (ResNet, {"stem": "huge"}),
        (BottleneckResNet, {"stem": "huge"}),
        (BottleneckResNet, {"groups": 0}),
    ]
    for module, fields in refused:
        (field,) = fields
        with pytest.raises(ValueError, match=rf"{module.__name__}\.{field} must be "):
            module(**fields)


@pytest.mark.parametrize(
    ("backbone", "field"),
    [
        (ResNet(stage_strides=(1, 2)), "stage_strides"),
        (ResNet(blocks_per_stage=(3, 4, 6)), "blocks_per_stage"),
        (BottleneckResNet(stage_strides=(1, 2)), "stage_strides"),
        (BottleneckResNet(blocks_per_stage=(3, 4, 6)), "blocks_per_stage"),
    ],
)
def test_backbones_need_an_entry_for_each_stage(backbone, field):
    with pytest.raises(ValueError, match=rf"{field} must be 4 positive ints, one for each stage, got \("):
        backbone.init(KEY, jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize("module", [*(head(5) for head in HEADS), GatedMixture(), Mixture()])
@pytest.mark.parametrize("shape", [(5,), (2, 6), (2, 1, 3, 3, 6)])
def test_a_head_needs_three_or_four_axes(module, shape):
    with pytest.raises(ValueError, match=rf"\[b, h, w, c\] or tokens \[b, l, c\], got shape \({shape[0]}, ?"):
        module.init(KEY, jnp.ones(shape))


@pytest.mark.parametrize("head", [*HEADS, gmsop_jax.nnx.SecondOrderHead, gmsop_jax.nnx.MixtureHead])
def test_a_mask_in_the_place_of_train_is_refused(head):
    x, mask = jnp.ones((2, 7, 4)), jnp.ones((2, 7), bool)
    call = functools.partial(head(5).init, KEY) if head in HEADS else head(4, 5, rngs=flax.nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"got an array of shape \(2, 7\); pass a mask as where="):
        call(x, mask)


@pytest.mark.parametrize("head", [DropCovHead(5), MixtureHead(5, candidate_widths=(3,))])
def test_training_without_a_key_for_the_dropout_is_refused(head):
    x = jnp.ones((2, 7, 4))
    variables = jax.jit(functools.partial(head.init, train=True))(KEY, x)  # draws from the stream `params`
    with pytest.raises(ValueError, match=r"pass rngs=\{'dropout': key\} to apply"):
        head.apply(variables, x, train=True, mutable=["batch_stats"])
