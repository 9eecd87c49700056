from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmsop_jax.models import BottleneckResNet, ResNet

TINY = {"blocks_per_stage": 1, "stage_widths": (4, 8), "stage_strides": (1, 2), "stem_width": 4}


def map_shape(network: ResNet, *shape: int) -> tuple[int, ...]:
    def run(key, images):
        return network.init_with_output(key, images, train=False)[0]

    return jax.eval_shape(run, jax.random.key(0), jnp.zeros(shape)).shape


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({}, (2, 16, 16, 128)),  # second order: strides 1, 2, 2, 1
        ({"stage_strides": (1, 2, 2, 2)}, (2, 8, 8, 128)),  # first order
        ({"blocks_per_stage": 4, "width_factor": 2}, (2, 16, 16, 256)),  # WRN-36-2
        ({"blocks_per_stage": 6}, (2, 16, 16, 128)),  # the paper's ResNet-50 at 64×64
    ],
)
def test_map_of_64_by_64_images(fields, shape):
    assert map_shape(ResNet(**fields), 2, 64, 64, 3) == shape


@pytest.mark.parametrize(("size", "side"), [(28, 7), (100, 25), (33, 9)])
def test_any_input_size(size, side):
    # padding 1 on both sides of a 3×3 kernel: stride 2 gives ⌈side/2⌉; 33 → 17 → 9
    assert map_shape(ResNet(), 1, size, size, 3) == (1, side, side, 128)
    assert map_shape(ResNet(), 1, size, 64, 3) == (1, side, 16, 128)


def test_layers_and_their_parameters():
    images = jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(lambda: ResNet(**TINY).init(jax.random.key(0), images, train=False))["params"]
    assert params["stem"]["kernel"].shape == (3, 3, 3, 4)
    # only the stem's convolution has a bias; projections only where the shape changes
    assert {name for name, layer in params.items() if "bias" in layer and not name.endswith("_bn")} == {"stem"}
    assert set(params["stage1_block1"]) == {"conv1", "conv1_bn", "conv2", "conv2_bn"}
    assert set(params["stage2_block1"]) == {"conv1", "conv1_bn", "conv2", "conv2_bn", "shortcut", "shortcut_bn"}
    assert set(params["stage2_block1"]["conv1"]) == {"kernel"}
    assert params["stage2_block1"]["shortcut"]["kernel"].shape == (1, 1, 4, 8)


def test_wide_network_projects_in_its_first_stage_too():
    images = jnp.zeros((1, 8, 8, 3))
    wide = ResNet(width_factor=2, stem_width=16)
    params = jax.eval_shape(lambda: wide.init(jax.random.key(0), images, train=False))["params"]
    assert params["stage1_block1"]["shortcut"]["kernel"].shape == (1, 1, 16, 32)


def test_initial_scales():
    params = ResNet().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)["params"]
    # N(0, 2/fan_in); fan_in = 9 · 128 in the last stage, 9 · 3 in the stem, whose kernel is divided by 60
    last = np.asarray(params["stage4_block2"]["conv2"]["kernel"])
    np.testing.assert_allclose(last.std(), np.sqrt(2 / (9 * 128)), rtol=0.01)
    stem = np.asarray(params["stem"]["kernel"])
    np.testing.assert_allclose(stem.std(), np.sqrt(2 / 27) / 60, rtol=0.15)  # 432 numbers
    np.testing.assert_array_equal(params["stem"]["bias"], np.zeros(16))
    plain: Any = ResNet(pixel_scale=1.0).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
    np.testing.assert_allclose(plain["params"]["stem"]["kernel"], 60 * stem, rtol=1e-5)


def test_stride_two_pads_both_sides():
    # a 3×3 kernel of ones over a 4×4 image of ones at stride 2 with one row of padding on each side: output (0, 0)
    # sees 2×2 ones, (1, 1) sees 3×3; 'SAME' would pad at the end only and give 9 and 4
    network = ResNet(blocks_per_stage=1, stage_widths=(1,), stage_strides=(2,), stem_width=1)
    params = network.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), train=False)
    one = jax.tree.map(jnp.ones_like, params["params"])
    block = {name: jax.tree.map(jnp.zeros_like, layer) for name, layer in one["stage1_block1"].items()}
    for layer, norm in (("conv1", "conv1_bn"), ("conv2", "conv2_bn")):
        block[layer] = {"kernel": one["stage1_block1"][layer]["kernel"]}
        block[norm]["scale"] = jnp.ones(1)
    block["conv2"] = {"kernel": jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)}
    stem = {"kernel": jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0), "bias": jnp.zeros(1)}
    by_hand = {"stem": stem, "stem_bn": {"scale": jnp.ones(1), "bias": jnp.zeros(1)}, "stage1_block1": block}
    x = network.apply({**params, "params": by_hand}, jnp.ones((1, 4, 4, 1)), train=False)
    np.testing.assert_array_equal(jnp.asarray(x)[0, :, :, 0], [[4.0, 6.0], [6.0, 9.0]])


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32])
def test_integer_images_are_refused(dtype):
    with pytest.raises(TypeError, match=r"mean subtracted, got u?int.*astype\(jnp.float32\) - mean_rgb"):
        ResNet(**TINY).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3), dtype), train=False)


@pytest.mark.parametrize("size", [16, 18, 33])
def test_the_large_stem_pools_as_flax_does_without_a_scatter(size):
    network: Any = BottleneckResNet((1, 1, 1, 1))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, size, size, 3)).astype(np.float32))
    variables = network.init(jax.random.key(0), x)

    def first_block_input(variables, x):
        _, state = network.apply(
            variables, x, capture_intermediates=lambda module, _: module.name in names, mutable=True
        )
        return state["intermediates"]

    names = {"stem_bn", "conv1"}
    captured = first_block_input(variables, x)
    stem = jax.nn.relu(captured["stem_bn"]["__call__"][0])
    pooled = nn.max_pool(stem, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
    expected = pooled @ variables["params"]["stage1_block1"]["conv1"]["kernel"][0, 0]
    np.testing.assert_allclose(captured["stage1_block1"]["conv1"]["__call__"][0], expected, rtol=1e-4, atol=1e-4)

    slope = jax.grad(lambda params: jnp.sum(network.apply({**variables, "params": params}, x)))
    assert "scatter" not in jax.jit(slope).lower(variables["params"]).as_text()
