"""Residual networks of basic blocks: the authors' narrow ResNet and its wide form (WRN)."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmsop_jax.models.layers import BatchNorm, he_normal

_Map = Float[Array, "b h w c"]


class BasicBlock(nn.Module):
    """ReLU(x' + BN(conv3×3(ReLU(BN(conv3×3(x)))))); x' is x, or BN(conv1×1(x)) if its shape differs.

    Attributes:
      width: output channels.
      stride: of the first convolution and of the shortcut.
      dtype, axis_name: as in `ResNet`.
    """

    width: int
    stride: int = 1
    dtype: jnp.dtype | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: _Map, *, train: bool) -> _Map:
        """Applies the block."""

        def convolution(x, size, stride, name):
            pad = (size - 1) // 2  # at stride 2 too, where 'SAME' would pad one side only
            x = nn.Conv(
                self.width,
                (size, size),
                stride,
                padding=((pad, pad), (pad, pad)),
                use_bias=False,
                dtype=self.dtype,
                kernel_init=he_normal,
                name=name,
            )(x)
            normalize = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=f"{name}_bn")
            return normalize(x, train=train)

        y = jax.nn.relu(convolution(x, 3, self.stride, "conv1"))
        y = convolution(y, 3, 1, "conv2")
        if x.shape[-1] != self.width or self.stride != 1:
            x = convolution(x, 1, self.stride, "shortcut")
        return jax.nn.relu(x + y)


class ResNet(nn.Module):
    """Residual network for small images: a 3×3 stem and stages of `BasicBlock`s.

    ResNet-18 of the paper is the default; 4 blocks a stage at width factor 2 is WRN-36-2; 6 blocks a
    stage is the paper's 64×64 "ResNet-50".

    Attributes:
      blocks_per_stage: basic blocks in each stage.
      width_factor: multiplies `stage_widths`, not the stem.
      stage_widths: channels of each stage.
      stage_strides: stride of each stage's first block; the last is 1 for second-order heads (a 16×16
        map of 64×64 images), 2 for first-order ones.
      stem_width: channels of the stem.
      pixel_scale: typical size of an input value. The stem's kernel starts divided by it; the trainer
        divides that kernel's learning rate by its square. 60 for mean-subtracted pixels of 0–255 (as
        the authors), 1 for standardised input.
      dtype: of the computation; None follows the input and the parameters.
      axis_name: pmap or shard_map axis over which batch norm takes its moments.
    """

    blocks_per_stage: int = 2
    width_factor: int = 1
    stage_widths: Sequence[int] = (16, 32, 64, 128)
    stage_strides: Sequence[int] = (1, 2, 2, 1)
    stem_width: int = 16
    pixel_scale: float = 60.0
    dtype: jnp.dtype | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: _Map, *, train: bool) -> _Map:
        """Features of the last stage.

        Args:
          images: floating, of any size; mean-subtracted.
          train: whether batch norm uses the batch's moments and updates the running ones.

        Returns: the map after the last block.

        Raises:
          TypeError: for integer images.
        """
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(
                f"images must be floating with their mean subtracted, got {images.dtype};"
                " for example images.astype(jnp.float32) - mean_rgb"
            )
        x = nn.Conv(
            self.stem_width,
            (3, 3),
            padding=((1, 1), (1, 1)),
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(2.0 / self.pixel_scale**2, "fan_in", "normal"),
            name="stem",
        )(images)
        x = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name="stem_bn")(x, train=train)
        x = jax.nn.relu(x)
        stages = zip(self.stage_widths, self.stage_strides, strict=True)
        for stage, (width, first_stride) in enumerate(stages, 1):
            for block in range(1, self.blocks_per_stage + 1):
                x = BasicBlock(
                    width * self.width_factor,
                    first_stride if block == 1 else 1,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f"stage{stage}_block{block}",
                )(x, train=train)
        return x
