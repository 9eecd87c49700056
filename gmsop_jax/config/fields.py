"""The fields of a configuration: their defaults, meanings and allowed values."""

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ml_collections
from flax.traverse_util import unflatten_dict

from gmsop_jax.models.heads import CrossCovarianceHead, GatedMixtureHead, MPNCOVHead, SecondOrderHead
from gmsop_jax.models.network import BACKBONES, HEADS
from gmsop_jax.models.resnet import ResNet

if TYPE_CHECKING:

    class ConfigDict(ml_collections.ConfigDict):
        """The class of ml_collections, with fields that a type checker cannot know."""

        def __getattr__(self, name: str) -> Any: ...
        def __getitem__(self, key: str) -> Any: ...

else:
    ConfigDict = ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True)
class Allowed:
    """The values that a field may have.

    Attributes:
      contains: whether a value of the field's type is allowed.
      description: completes the sentence "the field must be …".
      choices: the values, if there are only a few.
    """

    contains: Callable[[Any], bool]
    description: str
    choices: tuple[Any, ...] = ()


def _one_of(*choices: Any) -> Allowed:
    return Allowed(lambda value: value in choices, f"one of {choices}", choices)


def _between(low: float, high: float) -> Allowed:
    return Allowed(lambda value: low <= value <= high, f"between {low} and {high}")


def _at_least(low: float) -> Allowed:
    return Allowed(lambda value: value >= low, f"at least {low}")


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number in float32, the dtype of the network."""
    return type(value) in (int, float) and abs(value) < 3.4e38


def _is_epochs(value: Any) -> bool:
    return type(value) is int and 0 < value <= 10**6


def _are_pairs(value: tuple, first: Callable[[Any], bool], second: Callable[[Any], bool]) -> bool:
    return all(isinstance(p, tuple | list) and len(p) == 2 and first(p[0]) and second(p[1]) for p in value)


def _are_sizes(value: tuple) -> bool:
    return all(type(size) is int and 0 < size < 2**20 for size in value)


def _is_area(value: tuple) -> bool:
    return len(value) == 2 and all(map(is_number, value)) and 0 < value[0] <= value[1] <= 1


LOG_BACKENDS = ("tensorboard", "wandb", "trackio")

_ANY = Allowed(lambda value: True, "any string")  # also for booleans, which are listed as True and False
_FRACTION = Allowed(lambda value: 0 <= value < 1, "in [0, 1)")
_POSITIVE = Allowed(lambda value: value > 0, "positive")
_SHARE = Allowed(lambda value: 0 < value <= 1, "in (0, 1]")
_AREA = Allowed(_is_area, "a pair (smallest, largest) of fractions in (0, 1]")
_SIZES = Allowed(lambda value: bool(value) and _are_sizes(value), "positive integers, like (256, 128)")
_OPTIONAL_SIZES = Allowed(_are_sizes, "positive integers, like (256,), or ()")
_DTYPES = _one_of("", "float32", "bfloat16", "float64")
_RATES = Allowed(
    lambda value: bool(value) and _are_pairs(value, lambda r: is_number(r) and r > 0, _is_epochs),
    "pairs (rate > 0, epochs ≥ 1), like ((0.1, 40), (0.01, 10))",
)
_BACKENDS = Allowed(
    lambda value: all(
        isinstance(name, str) and (name in LOG_BACKENDS or re.fullmatch(r"\w+(\.\w+)*:\w+", name)) for name in value
    ),
    'names of backends, like ("tensorboard", "wandb"), or ()',
)
_FACTORS = Allowed(
    lambda value: _are_pairs(value, lambda n: isinstance(n, str), lambda f: is_number(f) and f >= 0),
    'pairs (part, factor ≥ 0), like (("backbone", 0.1), ("backbone/stem", 0))',
)


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a configuration.

    Attributes:
      default: its default, which also determines its type.
      meaning: what it means, for the reference in docs/configuration.md.
      allowed: its allowed values.
      resumable: whether a resumed run may change it, because it does not affect the results (except for rounding).
    """

    default: Any
    meaning: str
    allowed: Allowed = _ANY
    resumable: bool = False


# The defaults are GM-SOP-16-8 + ResNet-18 on 64×64 ImageNet, with the authors' recipe except for `model.gate_gradient` and
# `train.drop_last`; those of modules are taken from the modules.
# fmt: off
FIELDS = {
    "seed": Field(0, "seed of initialisation, data order, augmentation, gate noise and dropout", _between(0, 2**32 - 1)),
    "compute_dtype": Field("", "dtype of the convolutions; '' means float32, the dtype of the parameters", _DTYPES),
    "model.num_classes": Field(0, "number of classes; 0 means as many as the data set has", _between(0, 10**6)),
    "model.compute_dtype": Field("", "always equal to `compute_dtype`; set that field instead", _DTYPES),
    # backbone
    "model.backbone": Field("narrow", "`narrow` (the authors' ResNet of basic blocks), or a ResNet or ResNeXt for ImageNet", _one_of(*BACKBONES)),
    "model.blocks_per_stage": Field(ResNet.blocks_per_stage, "narrow: 2 gives ResNet-18, 4 gives WRN-36, 6 gives the authors' 64×64 ResNet-50", _between(1, 1000)),
    "model.width_factor": Field(ResNet.width_factor, "narrow: factor for `stage_widths`; 2 gives WRN-36-2", _between(1, 1000)),
    "model.stage_widths": Field(ResNet.stage_widths, "narrow: channels of each stage", _SIZES),
    "model.stem_width": Field(ResNet.stem_width, "narrow: channels of the first convolution", _between(1, 2**16)),
    "model.stem": Field("small", "`small`: 3×3, stride 1; `large`: 7×7, stride 2, max pooling, for 224×224 (not for `narrow`)", _one_of("small", "large")),
    "model.stage_strides": Field(ResNet.stage_strides, "stride of the first block of each stage; first-order heads use 2 in the last stage", _SIZES),
    "model.pixel_scale": Field(ResNet.pixel_scale, "typical magnitude of a pixel; divides the initial kernel of the stem, and its updates as docs/training.md describes", _POSITIVE),
    "model.batch_norm_rate": Field(0.3, "weight of the current batch in the running statistics of batch norm", _SHARE),
    # head
    "model.head": Field("gmsop", "pooling and classifier, see docs/heads.md", _one_of(*HEADS)),
    "model.projection_widths": Field(SecondOrderHead.projection_widths, "heads without a mixture: channels of 1×1 convolutions before the pooling", _OPTIONAL_SIZES),
    "model.projection_batch_norm": Field(SecondOrderHead.projection_batch_norm, "apply batch norm after each convolution of `projection_widths`, as iSQRT-COV does"),
    "model.num_iters": Field(SecondOrderHead.num_iters, "Newton–Schulz iterations; iSQRT-COV uses 5", _between(1, 100)),
    "model.coefficients": Field(SecondOrderHead.coefficients, "coefficients of the iterations: `newton_schulz`, or `minimax` for a more accurate root with up to 12 iterations", _one_of("newton_schulz", "minimax")),
    "model.pool_precision": Field("", "precision of the products in covariances and their roots; '' depends on the device, see docs/accuracy.md", _one_of("", "highest", "high", "BF16_BF16_F32_X3", "BF16_BF16_F32_X6"), resumable=True),
    "model.power": Field(MPNCOVHead.power, "exponent α of the heads `mpncov` and `sot`", _POSITIVE),
    "model.num_heads": Field(CrossCovarianceHead.num_heads, "sot: number of heads, each with one cross-covariance matrix", _between(1, 2**12)),
    "model.head_width": Field(CrossCovarianceHead.head_width, "sot: channels of a head's queries and keys, the side of its matrix", _between(1, 2**12)),
    # mixtures
    "model.num_candidates": Field(GatedMixtureHead.num_candidates, "N, the number of candidates", _between(1, 10**6)),
    "model.num_selected": Field(GatedMixtureHead.num_selected, "K, the number of candidates selected per image; gated mixtures only", _between(1, 10**6)),
    "model.candidate_widths": Field(GatedMixtureHead.candidate_widths, "channels of a candidate's 1×1 convolutions; the output of the last one is pooled", _SIZES),
    "model.dispatch": Field(GatedMixtureHead.dispatch, "how the selected candidates are computed, see docs/performance.md; `auto` depends on the backend", _one_of("auto", "gather", "group", "loop"), resumable=True),
    "model.dropout_rate": Field(GatedMixtureHead.dropout_rate, "dropout before the classifier of a mixture", _FRACTION),
    # gate
    "model.gate_widths": Field(GatedMixtureHead.gate_widths, "channels of the 1×1 convolutions of the gate", _SIZES),
    "model.gate_order": Field(GatedMixtureHead.gate_order, "pooling of the gate: 1 average, 2 covariance, 0 the same as the candidates", _one_of(0, 1, 2)),
    "model.gate_init": Field(GatedMixtureHead.gate_init, "initial gate weights; with `constant`, all logits are equal at first", _one_of("constant", "random")),
    "model.gate_noise": Field(GatedMixtureHead.gate_noise, "noise of the logits: one draw per `image` or per `candidate` with a learned scale, the `fixed` scale 1/N, or `none`", _one_of("image", "candidate", "fixed", "none")),
    "model.gate_softmax": Field(GatedMixtureHead.gate_softmax, "softmax over the `selected` logits, or over `all` N with the other weights set to 0", _one_of("selected", "all")),
    "model.gate_gradient": Field(GatedMixtureHead.gate_gradient, "gradient of the gate's weights; the authors use `masked`", _one_of("straight_through", "masked")),
    "model.balance_on": Field(GatedMixtureHead.balance_on, "balance the gate's `weights`, or the `softmax` over all N logits", _one_of("weights", "softmax")),
    "model.balance_ddof": Field(GatedMixtureHead.balance_ddof, "1 divides the variance in the balance loss by N − 1, 0 by N", _one_of(0, 1)),
    # data
    "data.dir": Field("data/imagenet64", "folder with the shards and dataset.json that `gmsop convert` wrote", resumable=True),
    "data.source": Field("imagenet64", "SOURCE of `gmsop convert` from which the data were converted"),
    "data.auto_convert": Field(False, "convert the source's embedded sample if `data.dir` does not exist", resumable=True),
    "data.image_size": Field(0, "side to which images are resized; 0 keeps their size", _between(0, 4096)),
    "data.flip": Field(True, "flip training images horizontally, each with probability ½"),
    "data.crop": Field("none", "random crop of training images: `padded` pads and crops, `resized` crops and resizes", _one_of("none", "padded", "resized")),
    "data.crop_padding": Field(4, "crop `padded`: pixels of mean colour added on each side", _between(0, 4096)),
    "data.crop_area": Field((0.08, 1.0), "crop `resized`: smallest and largest fraction of the image's area", _AREA),
    "data.num_threads": Field(2, "number of threads, each of which prepares a batch; more than 2 help only if images are resized", _between(1, 1024), resumable=True),
    "data.num_workers": Field(0, "number of processes that prepare batches instead of threads; useful if resizing is slow", _between(0, 1024), resumable=True),
    "data.on_corrupt": Field("stop", "what to do about a damaged shard or record: `stop`, or log it and `skip` it", _one_of("stop", "skip"), resumable=True),
    "data.verify": Field(True, "verify the checksums of the shards before the first step", resumable=True),
    # training
    "train.batch_size": Field(256, "images per step, over all devices", _between(1, 2**24)),
    "train.num_epochs": Field(60, "passes over the training split; increase it to continue a finished run", _between(1, 10**6), resumable=True),
    "train.optimizer": Field("sgd", "`sgd` or `adamw`", _one_of("sgd", "adamw")),
    "train.learning_rates": Field(((0.1, 40), (0.01, 10), (0.001, 5), (0.0001, 5)), "pairs (rate, epochs): each learning rate, and for how many epochs it applies", _RATES),
    "train.schedule": Field("steps", "`steps` applies the pairs of `learning_rates` in turn; `cosine` takes a single pair, and its rate decays to 0", _one_of("steps", "cosine")),
    "train.warmup_epochs": Field(0.0, "epochs of linear warm-up", _at_least(0.0)),
    "train.rate_factors": Field((), "pairs (part, factor) for the learning rates of parts, like (('backbone', 0.1),); 0 freezes a part", _FACTORS),
    "train.momentum": Field(0.9, "momentum of SGD; β₁ of AdamW", _FRACTION),
    "train.beta2": Field(0.999, "β₂ of AdamW", _FRACTION),
    "train.nesterov": Field(False, "use Nesterov's momentum (SGD)"),
    "train.weight_decay": Field(1e-4, "weight decay of every parameter, including biases, batch norm and gate", _at_least(0.0)),
    "train.label_smoothing": Field(0.0, "fraction of the target probability that is spread over all classes", _FRACTION),
    "train.mixup_alpha": Field(0.0, "α of the Beta(α, α) distribution of mixup's weights; 0 disables mixup", _at_least(0.0)),
    "train.ema_decay": Field(0.0, "decay of the exponential moving average of the parameters, which is then evaluated; 0 disables it", _FRACTION),
    "train.init_from": Field("", "trained network that this run starts from: a working directory, the folder of one step in it, or an exported network"),
    "train.balance_weight": Field(100.0, "α: the loss is the mean cross entropy + α/B · balance loss for batches of B images", _at_least(0.0)),
    "train.drop_last": Field(True, "drop the smaller last batch of an epoch; the authors' code trains on it"),
    "train.sub_batches": Field(1, "gradient accumulation: number of parts of a batch, which are computed in turn to save memory", _between(1, 2**24)),
    "train.on_nonfinite": Field("stop", "if the loss, its gradient or the state is not finite: `stop`, or `rollback` to the last checkpoint and skip that batch", _one_of("stop", "rollback"), resumable=True),
    "train.log_every_steps": Field(100, "number of steps between logs of the training metrics, which are also logged at the end of each epoch", _between(1, 10**6), resumable=True),
    # log
    "log.backends": Field(("tensorboard",), "where to log in addition to `metrics.jsonl`: `tensorboard`, `wandb`, `trackio`, or a class `module:Class` of your own", _BACKENDS, resumable=True),
    # devices
    "parallel.mode": Field("jit", "compile the step with `jit` (and shard_map) or with `pmap`; both run the same function", _one_of("jit", "pmap"), resumable=True),
    "parallel.cpu_devices": Field(1, "number of JAX devices that the CPU is split into; 0 means up to one per core, which is faster for small networks", _between(0, 1024), resumable=True),
    "parallel.batch_norm": Field("global", "batch norm over the `global` batch or over each `device`'s part", _one_of("global", "device")),
    # evaluation
    "eval.split": Field("val", "split that is evaluated after each epoch"),
    "eval.batch_size": Field(256, "images per step in evaluation and prediction, over all devices", _between(1, 2**24), resumable=True),
    "eval.resize": Field(0, "length to which the shorter side is resized before the centre is cropped; 0 resizes the whole image to `data.image_size`", _between(0, 8192)),
    "eval.flip_average": Field(False, "average the logits of each image and its mirror image"),
    # checkpoints
    "checkpoint.keep": Field(3, "number of latest checkpoints to keep, in addition to the best one", _between(1, 10**6), resumable=True),
    "checkpoint.every_steps": Field(0, "number of steps between additional checkpoints within an epoch; 0 saves only at the end of each epoch", _between(0, 10**9), resumable=True),
}
# fmt: on


def default_config() -> ConfigDict:
    """Creates a configuration with all fields at their defaults: GM-SOP-16-8 + ResNet-18 on 64×64 ImageNet."""
    config = ConfigDict(unflatten_dict({name: field.default for name, field in FIELDS.items()}, sep="."))
    config.model.compute_dtype = config.get_ref("compute_dtype")
    return config


def model_defaults() -> ConfigDict:
    """Creates the section `model` of `default_config()` alone; its `compute_dtype` is independent of other fields."""
    return ConfigDict(default_config().model.to_dict())
