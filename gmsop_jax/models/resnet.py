"""Residual networks: ResNets of basic blocks, such as the authors' narrow ones, and of bottleneck blocks."""

import functools
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gmsop_jax.models.checks import CheckedModule, check_stages
from gmsop_jax.models.layers import BatchNorm, ModuleFactory, he_normal
from gmsop_jax.ops.arrays import AnyArray

_BOTTLENECK_WIDTHS = (64, 128, 256, 512)  # widths of the 3×3 convolutions in the four stages of a ResNet

_Map = Float[AnyArray, "b h w c"]
_Result = Float[Array, "b h2 w2 c2"]


class _Block(CheckedModule):
    """Base class of the residual blocks: convolutions with batch norm, and the shortcut."""

    width: int
    stride: int = 1
    norm: ModuleFactory = BatchNorm
    dtype: DTypeLike | None = None

    def _convolution(self, x, width, size, stride, name, *, train, groups=1):
        pad = (size - 1) // 2  # also at stride 2, where 'SAME' would pad only one side
        x = nn.Conv(
            width,
            (size, size),
            stride,
            padding=((pad, pad), (pad, pad)),
            feature_group_count=groups,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=he_normal,
            name=name,
        )(x)
        return self.norm(dtype=self.dtype, name=f"{name}_bn")(x, train=train)

    def _add_shortcut(self, x, y, *, train):
        if x.shape[-1] != y.shape[-1] or self.stride != 1:
            x = self._convolution(x, y.shape[-1], 1, self.stride, "shortcut", train=train)
        return jax.nn.relu(x + y)


class BasicBlock(_Block):
    """ReLU(x' + BN(conv3×3(ReLU(BN(conv3×3(x)))))); x' is x, or BN(conv1×1(x)) if the block changes the shape.

    Attributes:
      width: number of channels of the two convolutions.
      stride: stride of the first 3×3 convolution, and of the 1×1 convolution.
      norm: creates the batch norms.
      dtype: see `ResNet`.
    """

    @nn.compact
    def __call__(self, x: _Map, train: bool = False) -> _Result:
        """Applies the block; the result has `width` channels."""
        y = jax.nn.relu(self._convolution(x, self.width, 3, self.stride, "conv1", train=train))
        y = self._convolution(y, self.width, 3, 1, "conv2", train=train)
        return self._add_shortcut(x, y, train=train)


class BottleneckBlock(_Block):
    """1×1, grouped 3×3 and 1×1 convolutions with batch norm, ReLU between them, and the shortcut of `BasicBlock`.

    The 3×3 convolution has the block's stride, as in torchvision. In He et al. 2016, the first convolution has it.

    Attributes:
      width: number of channels of a ResNet's 3×3 convolution, and a quarter of those of the result.
      groups: number of groups of the 3×3 convolution: 1 in ResNet, and the cardinality in ResNeXt (Xie et al. 2017).
      group_width: channels of each group in a block of width 64; it grows in proportion to the width of the block.
      others: see `BasicBlock`.
    """

    groups: int = 1
    group_width: int = 64

    @nn.compact
    def __call__(self, x: _Map, train: bool = False) -> _Result:
        """Applies the block; the result has 4 · `width` channels."""
        inner = self.width * self.group_width // 64 * self.groups
        y = jax.nn.relu(self._convolution(x, inner, 1, 1, "conv1", train=train))
        y = self._convolution(y, inner, 3, self.stride, "conv2", train=train, groups=self.groups)
        y = self._convolution(jax.nn.relu(y), 4 * self.width, 1, 1, "conv3", train=train)
        return self._add_shortcut(x, y, train=train)


class ResNet(CheckedModule):
    """Residual network of a stem and stages of `BasicBlock`s.

    The defaults give the paper's ResNet-18 for small images. 4 blocks per stage with width factor 2 give WRN-36-2, and
    6 blocks per stage give the network that the paper calls ResNet-50 on 64×64 images. (3, 4, 6, 3) blocks of widths
    (64, 128, 256, 512) after a stem of width 64 give ResNet-34 for ImageNet.

    Attributes:
      blocks_per_stage: number of basic blocks in each stage: one number for all stages, or one for each.
      width_factor: multiplies `stage_widths`, but not the width of the stem.
      stage_widths: number of channels of each stage.
      stage_strides: stride of each stage's first block. The last one is 1 for second-order heads (a 16×16
        map for 64×64 images), and 2 for first-order heads.
      stem_width: number of channels of the stem.
      stem: `small` is a 3×3 convolution with bias and stride 1. `large` is that of `BottleneckResNet`.
      pixel_scale: typical magnitude of an input value. The initial kernel of the stem is divided by it, and the
        trainer scales down the updates of that kernel accordingly. Use 60 for mean-subtracted pixels of 0–255
        (as the authors do), and 1 for standardised input.
      norm: creates the batch norms.
      dtype: dtype of the computation; None infers it from the input and the parameters.
    """

    blocks_per_stage: int | Sequence[int] = 2
    width_factor: int = 1
    stage_widths: Sequence[int] = (16, 32, 64, 128)
    stage_strides: Sequence[int] = (1, 2, 2, 1)
    stem_width: int = 16
    stem: Literal["small", "large"] = "small"
    pixel_scale: float = 60.0
    norm: ModuleFactory = BatchNorm
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, images: _Map, train: bool = False) -> _Result:
        """Computes the features of the last stage.

        Args:
          images: mean-subtracted floating-point images of any size.
          train: whether batch norm uses the statistics of the batch and updates the running ones.

        Returns: the feature map after the last block.

        Raises:
          TypeError: for integer images.
          ValueError: if `stage_strides` or `blocks_per_stage` does not have one entry for each stage.
        """
        x = _stem(self, images, self.stem_width, use_bias=self.stem == "small", train=train)
        check_stages(self, len(self.stage_widths), "stage_strides")
        blocks_per_stage = self.blocks_per_stage
        if isinstance(blocks_per_stage, Sequence):
            check_stages(self, len(self.stage_widths), "blocks_per_stage")
        else:
            blocks_per_stage = (blocks_per_stage,) * len(self.stage_widths)
        stages = zip(blocks_per_stage, self.stage_widths, self.stage_strides, strict=True)
        for stage, (blocks, width, first_stride) in enumerate(stages, 1):
            for block in range(1, blocks + 1):
                stride = first_stride if block == 1 else 1
                name = f"stage{stage}_block{block}"
                x = BasicBlock(width * self.width_factor, stride, self.norm, self.dtype, name=name)(x, train=train)
        return x


class BottleneckResNet(CheckedModule):
    """ResNet or ResNeXt for ImageNet: a stem and four stages of `BottleneckBlock`s, with 2048 output channels.

    Attributes:
      blocks_per_stage: (3, 4, 6, 3) in networks of 50 layers, and (3, 4, 23, 3) in networks of 101 layers.
      groups, group_width: 1 and 64 in ResNet; 32 and 4 in ResNeXt 32x4d, 64 and 4 in ResNeXt 64x4d.
      stem: `large` is a 7×7 convolution with stride 2 and 3×3 max pooling with stride 2, for 224×224 images.
        `small` is a 3×3 convolution with stride 1, without pooling, for 64×64 images.
      stage_strides: stride of each stage's first block: (1, 2, 2, 2) for first-order heads, and (1, 2, 2, 1) for
        second-order heads, as in iSQRT-COV.
      pixel_scale, norm, dtype: see `ResNet`.
    """

    blocks_per_stage: Sequence[int] = (3, 4, 6, 3)
    groups: int = 1
    group_width: int = 64
    stem: Literal["large", "small"] = "large"
    stage_strides: Sequence[int] = (1, 2, 2, 2)
    pixel_scale: float = 60.0
    norm: ModuleFactory = BatchNorm
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, images: _Map, train: bool = False) -> _Result:
        """Computes the features of the last stage; arguments and errors are those of `ResNet`."""
        x = _stem(self, images, 64, use_bias=False, train=train)
        check_stages(self, len(_BOTTLENECK_WIDTHS), "blocks_per_stage", "stage_strides")
        stages = zip(self.blocks_per_stage, _BOTTLENECK_WIDTHS, self.stage_strides, strict=True)
        for stage, (blocks, width, first_stride) in enumerate(stages, 1):
            for block in range(1, blocks + 1):
                x = BottleneckBlock(
                    width,
                    first_stride if block == 1 else 1,
                    self.norm,
                    self.dtype,
                    self.groups,
                    self.group_width,
                    name=f"stage{stage}_block{block}",
                )(x, train=train)
        return x


def _stem(module, images, width, *, use_bias, train):
    """A 3×3 convolution with stride 1, or a 7×7 one and max pooling, each with stride 2; with batch norm and ReLU."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images must be floating-point, with their mean subtracted, got {images.dtype};"
            " for example images.astype(jnp.float32) - mean_rgb"
        )
    size, stride = (7, 2) if module.stem == "large" else (3, 1)
    pad = (size - 1) // 2
    x = nn.Conv(
        width,
        (size, size),
        stride,
        padding=((pad, pad), (pad, pad)),
        use_bias=use_bias,
        dtype=module.dtype,
        kernel_init=nn.initializers.variance_scaling(2.0 / module.pixel_scale**2, "fan_in", "normal"),
        name="stem",
    )(images)
    x = jax.nn.relu(module.norm(dtype=module.dtype, name="stem_bn")(x, train=train))
    return _max_pool(x) if module.stem == "large" else x


def _max_pool(x: Array) -> Array:
    """Maximum over 3×3 windows with stride 2, and padding 1 on each side.

    Computed as the maximum of nine slices, because the gradient of `nn.max_pool` is not deterministic on a GPU.
    """
    height, width = ((side - 1) // 2 + 1 for side in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (1, 2), (1, 2), (0, 0)), constant_values=-jnp.inf)
    windows = [x[:, i : i + 2 * height : 2, j : j + 2 * width : 2] for i in range(3) for j in range(3)]
    return functools.reduce(jnp.maximum, windows)
