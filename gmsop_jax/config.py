"""Configurations: fields with their defaults, files, overrides from the command line, and validation.

A configuration file is a Python program with a function `get_config()` that returns a `ConfigDict` made with
`default_config()`. It is executed, so run only files that you trust. One file can hold several configurations: for
`file.py:argument`, `get_config(argument)` is called.
"""

import ast
import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import re
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_collections
from flax.traverse_util import unflatten_dict

from gmsop_jax.errors import ConfigError, did_you_mean, reason
from gmsop_jax.files import read_bytes
from gmsop_jax.models.heads import CrossCovarianceHead, GatedMixtureHead, MPNCOVHead, SecondOrderHead
from gmsop_jax.models.network import BACKBONES, GATED, HEADS, MIXTURES
from gmsop_jax.models.resnet import ResNet
from gmsop_jax.ops.coefficients import MINIMAX_LOWER_ENDS

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


def _is_number(value: Any) -> bool:
    """Returns whether a value is a finite number in float32, the dtype of the network."""
    return type(value) in (int, float) and abs(value) < 3.4e38


def _is_epochs(value: Any) -> bool:
    return type(value) is int and 0 < value <= 10**6


def _are_pairs(value: tuple, first: Callable[[Any], bool], second: Callable[[Any], bool]) -> bool:
    return all(isinstance(p, tuple | list) and len(p) == 2 and first(p[0]) and second(p[1]) for p in value)


def _are_sizes(value: tuple) -> bool:
    return all(type(size) is int and 0 < size < 2**20 for size in value)


def _is_area(value: tuple) -> bool:
    return len(value) == 2 and all(map(_is_number, value)) and 0 < value[0] <= value[1] <= 1


LOG_BACKENDS = ("tensorboard", "wandb", "trackio")

_ANY = Allowed(lambda value: True, "anything")
_FRACTION = Allowed(lambda value: 0 <= value < 1, "in [0, 1)")
_POSITIVE = Allowed(lambda value: value > 0, "positive")
_SHARE = Allowed(lambda value: 0 < value <= 1, "in (0, 1]")
_AREA = Allowed(_is_area, "(least, largest) share in (0, 1]")
_SIZES = Allowed(lambda value: bool(value) and _are_sizes(value), "positive integers, like (256, 128)")
_OPTIONAL_SIZES = Allowed(_are_sizes, "positive integers, like (256,), or ()")
_DTYPES = _one_of("", "float32", "bfloat16", "float64")
_RATES = Allowed(
    lambda value: bool(value) and _are_pairs(value, lambda r: _is_number(r) and r > 0, _is_epochs),
    "pairs (rate > 0, epochs ≥ 1), like ((0.1, 40), (0.01, 10))",
)
_BACKENDS = Allowed(
    lambda value: all(
        isinstance(name, str) and (name in LOG_BACKENDS or re.fullmatch(r"\w+(\.\w+)*:\w+", name)) for name in value
    ),
    'names of backends, like ("tensorboard", "wandb"), or ()',
)
_FACTORS = Allowed(
    lambda value: _are_pairs(value, lambda n: isinstance(n, str), lambda f: _is_number(f) and f >= 0),
    'pairs (part, factor ≥ 0), like (("backbone", 0.1), ("backbone/stem", 0))',
)


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a configuration.

    Attributes:
      default: its default, which also determines its type.
      meaning: what it means, for the reference in docs/configuration.md.
      allowed: its values.
      resumable: whether a resumed run may change it, because the results do not depend on it (other than by rounding).
    """

    default: Any
    meaning: str
    allowed: Allowed = _ANY
    resumable: bool = False


# The defaults are GM-SOP-16-8 + ResNet-18 on 64×64 ImageNet, with the authors' recipe. Where a module has a default of
# its own, it is taken from there.
# fmt: off
FIELDS = {
    "seed": Field(0, "seed of initialization, data order, augmentation, gate noise and dropout", _between(0, 2**32 - 1)),
    "compute_dtype": Field("", "dtype of the convolutions; '' means that of the parameters, float32", _DTYPES),
    "model.num_classes": Field(0, "number of classes; 0 means as many as the data set has", _between(0, 10**6)),
    "model.compute_dtype": Field("", "the same value as `compute_dtype`", _DTYPES),
    # backbone
    "model.backbone": Field("narrow", "`narrow` (the authors' ResNet of basic blocks), or a ResNet or ResNeXt for ImageNet", _one_of(*BACKBONES)),
    "model.blocks_per_stage": Field(ResNet.blocks_per_stage, "narrow: 2 gives ResNet-18, 4 gives WRN-36, 6 gives the authors' 64×64 ResNet-50", _between(1, 1000)),
    "model.width_factor": Field(ResNet.width_factor, "narrow: factor for `stage_widths`; 2 gives WRN-36-2", _between(1, 1000)),
    "model.stage_widths": Field(ResNet.stage_widths, "narrow: channels of each stage", _SIZES),
    "model.stem_width": Field(ResNet.stem_width, "narrow: channels of the first convolution", _between(1, 2**16)),
    "model.stem": Field("small", "`small`: 3×3, stride 1; `large`: 7×7, stride 2, max-pooling, for 224×224 (not narrow)", _one_of("small", "large")),
    "model.stage_strides": Field(ResNet.stage_strides, "stride of the first block of each stage; the last one is 2 for first-order heads", _SIZES),
    "model.pixel_scale": Field(ResNet.pixel_scale, "typical pixel value; the stem's kernel starts smaller by this factor, and learns slower by its square", _POSITIVE),
    "model.batch_norm_rate": Field(0.3, "weight of the current batch in the running moments of batch norm", _SHARE),
    # head
    "model.head": Field("gmsop", "pooling and classifier, see docs/heads.md", _one_of(*HEADS)),
    "model.projection_widths": Field(SecondOrderHead.projection_widths, "heads without a mixture: channels of 1×1 convolutions before the pooling", _OPTIONAL_SIZES),
    "model.projection_batch_norm": Field(SecondOrderHead.projection_batch_norm, "apply batch norm after each of these convolutions, as iSQRT-COV does"),
    "model.num_iters": Field(SecondOrderHead.num_iters, "Newton–Schulz iterations; iSQRT-COV uses 5", _between(1, 100)),
    "model.coefficients": Field(SecondOrderHead.coefficients, "coefficients of the iterations: `newton_schulz`, or `minimax` for a more accurate root with up to 12 iterations", _one_of("newton_schulz", "minimax")),
    "model.pool_precision": Field("", "precision of the products in covariances and their roots; '' depends on the device, see docs/accuracy.md", _one_of("", "highest", "high", "BF16_BF16_F32_X3", "BF16_BF16_F32_X6"), resumable=True),
    "model.power": Field(MPNCOVHead.power, "exponent α of the heads `mpncov` and `sot`", _POSITIVE),
    "model.num_heads": Field(CrossCovarianceHead.num_heads, "sot: number of cross-covariance matrices", _between(1, 2**12)),
    "model.head_width": Field(CrossCovarianceHead.head_width, "sot: side of each of these matrices", _between(1, 2**12)),
    # mixtures
    "model.num_candidates": Field(GatedMixtureHead.num_candidates, "N, the number of candidates in the bank", _between(1, 10**6)),
    "model.num_selected": Field(GatedMixtureHead.num_selected, "K, the number of candidates selected per image; gated mixtures only", _between(1, 10**6)),
    "model.candidate_widths": Field(GatedMixtureHead.candidate_widths, "channels of a candidate's 1×1 convolutions; the last one is pooled", _SIZES),
    "model.dispatch": Field(GatedMixtureHead.dispatch, "how the selected candidates are computed; `auto` decides by the backend", _one_of("auto", "gather", "group", "loop"), resumable=True),
    "model.dropout_rate": Field(GatedMixtureHead.dropout_rate, "dropout before the classifier of a mixture", _FRACTION),
    # gate
    "model.gate_widths": Field(GatedMixtureHead.gate_widths, "channels of the 1×1 convolutions of the gate", _SIZES),
    "model.gate_order": Field(GatedMixtureHead.gate_order, "pooling of the gate: 1 averages, 2 covariances, 0 the order of the candidates", _one_of(0, 1, 2)),
    "model.gate_init": Field(GatedMixtureHead.gate_init, "initial gate weights; with `constant`, all logits are equal at first", _one_of("constant", "random")),
    "model.gate_noise": Field(GatedMixtureHead.gate_noise, "noise of the logits: `image` or `candidate` (one draw per …, learned scale), `fixed` (1/N), `none`", _one_of("image", "candidate", "fixed", "none")),
    "model.gate_softmax": Field(GatedMixtureHead.gate_softmax, "softmax over the `selected` logits, or over `all` N with the other weights set to 0", _one_of("selected", "all")),
    "model.gate_gradient": Field(GatedMixtureHead.gate_gradient, "gradient of the weights; the authors' is `masked`", _one_of("straight_through", "masked")),
    "model.balance_on": Field(GatedMixtureHead.balance_on, "balance the gate's `weights`, or the `softmax` over all N logits", _one_of("weights", "softmax")),
    "model.balance_ddof": Field(GatedMixtureHead.balance_ddof, "1 divides the variance in the balance loss by N − 1, 0 by N", _one_of(0, 1)),
    # data
    "data.dir": Field("data/imagenet64", "folder with the shards and dataset.json that `gmsop convert` wrote", resumable=True),
    "data.source": Field("imagenet64", "source that `gmsop convert` converted the data from"),
    "data.auto_convert": Field(False, "convert the source's embedded sample if `data.dir` does not exist", resumable=True),
    "data.image_size": Field(0, "side to which images are resized; 0 means that they keep their size", _between(0, 4096)),
    "data.flip": Field(True, "mirror half of the training images"),
    "data.crop": Field("none", "random crop of training images: `padded` pads and cuts, `resized` cuts and resizes", _one_of("none", "padded", "resized")),
    "data.crop_padding": Field(4, "crop `padded`: pixels of mean colour added on each side", _between(0, 4096)),
    "data.crop_area": Field((0.08, 1.0), "crop `resized`: smallest and largest share of the image's area", _AREA),
    "data.num_threads": Field(2, "batches prepared at once; more threads help only where images are resized", _between(1, 1024), resumable=True),
    "data.num_workers": Field(0, "processes that prepare batches instead of threads; useful for slow resizing", _between(0, 1024), resumable=True),
    "data.on_corrupt": Field("stop", "at a damaged shard or record, `stop`, or `skip` it and log that", _one_of("stop", "skip"), resumable=True),
    "data.verify": Field(True, "verify the checksums of the shards before the first step", resumable=True),
    # training
    "train.batch_size": Field(256, "images per step, over all devices", _between(1, 2**24)),
    "train.num_epochs": Field(60, "passes over the training split; a finished run may be given more", _between(1, 10**6), resumable=True),
    "train.optimizer": Field("sgd", "`sgd` or `adamw`", _one_of("sgd", "adamw")),
    "train.learning_rates": Field(((0.1, 40), (0.01, 10), (0.001, 5), (0.0001, 5)), "pairs (rate, epochs)", _RATES),
    "train.schedule": Field("steps", "`steps` uses the pairs in turn; `cosine` decays a single pair's rate to 0", _one_of("steps", "cosine")),
    "train.warmup_epochs": Field(0.0, "epochs of linear warm-up", _at_least(0.0)),
    "train.rate_factors": Field((), "pairs (part, factor) for the learning rates of parts, like (('backbone', 0.1),); 0 freezes a part", _FACTORS),
    "train.momentum": Field(0.9, "momentum of SGD; β₁ of AdamW", _FRACTION),
    "train.beta2": Field(0.999, "β₂ of AdamW", _FRACTION),
    "train.nesterov": Field(False, "use Nesterov's momentum (SGD)"),
    "train.weight_decay": Field(1e-4, "weight decay of every parameter, including biases, batch norm and gate", _at_least(0.0)),
    "train.label_smoothing": Field(0.0, "share of the target that is spread over all classes", _FRACTION),
    "train.mixup_alpha": Field(0.0, "α of the Beta(α, α) that mixes pairs of images; 0 turns mixup off", _at_least(0.0)),
    "train.ema_decay": Field(0.0, "decay of the parameter averages, which are then evaluated; 0 turns them off", _FRACTION),
    "train.init_from": Field("", "working directory of a run whose parameters this run starts from"),
    "train.balance_weight": Field(100.0, "α; the loss is the mean cross entropy + α/B · balance loss", _at_least(0.0)),
    "train.drop_last": Field(True, "drop the smaller last batch of an epoch; the authors train on it"),
    "train.sub_batches": Field(1, "parts of a batch that are computed one after the other; needs less memory and more time", _between(1, 2**24)),
    "train.on_nonfinite": Field("stop", "if the loss is not finite: `stop`, or `rollback` to the last checkpoint and skip that batch", _one_of("stop", "rollback"), resumable=True),
    "train.log_every_steps": Field(100, "log training metrics every this many steps, and at the end of each epoch", _between(1, 10**6), resumable=True),
    # log
    "log.backends": Field(("tensorboard",), "where to log, besides `metrics.jsonl`: `tensorboard`, `wandb`, `trackio`, or a class `module:Class` of your own", _BACKENDS, resumable=True),
    # devices
    "parallel.mode": Field("jit", "compile the step with `jit` (and shard_map) or with `pmap`; both run the same function", _one_of("jit", "pmap"), resumable=True),
    "parallel.cpu_devices": Field(1, "number of JAX devices to split the CPU into; 0 means one per core, faster for small networks", _between(0, 1024), resumable=True),
    "parallel.batch_norm": Field("global", "batch norm over the `global` batch or over each `device`'s part", _one_of("global", "device")),
    # evaluation
    "eval.split": Field("val", "split that is evaluated after each epoch"),
    "eval.batch_size": Field(256, "images per step in evaluation and prediction, over all devices", _between(1, 2**24), resumable=True),
    "eval.resize": Field(0, "resize the shorter side to this and use the centre; 0 resizes the whole image to `data.image_size`", _between(0, 8192)),
    "eval.flip_average": Field(False, "average the logits of each image and its mirror image"),
    # checkpoints
    "checkpoint.keep": Field(3, "number of latest checkpoints to keep, besides the best", _between(1, 10**6), resumable=True),
    "checkpoint.every_steps": Field(0, "save a checkpoint every this many steps too; 0 saves at the end of each epoch only", _between(0, 10**9), resumable=True),
}
# fmt: on

# What the config.json of earlier versions may contain that no longer exists: fields with the values that did not change
# the results, and values of fields with what replaces them.
_REMOVED_FIELDS = {"parallel.shard_optimizer": (False, True), "parallel.shard_classifier": (False, True)}
_REMOVED_VALUES = {("model.dispatch", "pallas"): "auto"}


def default_config() -> ConfigDict:
    """Creates a configuration with all fields at their defaults: GM-SOP-16-8 + ResNet-18 on 64×64 ImageNet."""
    config = ConfigDict(unflatten_dict({name: field.default for name, field in FIELDS.items()}, sep="."))
    config.model.compute_dtype = config.get_ref("compute_dtype")
    return config


def model_defaults() -> ConfigDict:
    """Creates the section `model` of `default_config()` alone; its `compute_dtype` is independent of other fields."""
    return ConfigDict(default_config().model.to_dict())


def _locate(config: ConfigDict, name: str) -> tuple[ConfigDict, str]:
    """Returns the section that contains a field, and the field's name in it."""
    section, _, leaf = name.rpartition(".")
    return (config[section] if section else config), leaf


def load(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a configuration file, applies overrides, and validates the result.

    Args:
      path: `file.py`, `file.py:argument`, or the name of a packaged configuration, `name` or `name:argument`.
      overrides: assignments `field=value`, see `override`.

    Raises:
      ConfigError: if the file does not exist or has no `get_config`, and as `override` and `validate`.
    """
    file, argument = split_argument(path)
    module = run_file(file)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{file} has no function get_config()")
    with _naming_line(file):
        config = module.get_config(*argument)
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"get_config() of {file} returns {config!r}; it should return default_config() with changes")
    apply_overrides(config, overrides)
    return config


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Sets fields, see `override`, and validates the result.

    Raises:
      ConfigError: as `override` and `validate`.
    """
    for assignment in overrides:
        override(config, assignment)
    validate(config)


def run_file(file: pathlib.Path) -> types.ModuleType:
    """Executes a configuration file and returns it as a module.

    Raises:
      ConfigError: if the file does not exist or raises an exception.
    """
    if not file.is_file():
        names = [packaged.stem for packaged in packaged_files()]
        raise ConfigError(
            f"configuration file {file} does not exist, and the package contains no configuration of that name;"
            f" {did_you_mean(file.stem, names)}"
        )
    spec = importlib.util.spec_from_file_location(f"gmsop_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is not a Python file; a configuration is one with a function get_config()")
    module = importlib.util.module_from_spec(spec)
    with _naming_line(file):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _naming_line(file: pathlib.Path) -> Iterator[None]:
    """Turns any exception of a user's file into a ConfigError that names the line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file)]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        where = f"{file}, line {line}" if line else str(file)
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error


def split_argument(path: str | pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    """Splits `file.py:argument` into the file and a list with the argument, or an empty list without one.

    Instead of `file.py`, a packaged configuration can be given by its name, as in `imagenet:resnet50,gmsop`.

    Example:
      >>> split_argument("my/imagenet.py:resnet50,gmsop")
      (PosixPath('my/imagenet.py'), ['resnet50,gmsop'])
      >>> file, arguments = split_argument("imagenet:resnet50,gmsop")
      >>> file.name, file.exists(), arguments
      ('imagenet.py', True, ['resnet50,gmsop'])
    """
    file, separator, argument = str(path).partition(".py:")
    if separator:
        return pathlib.Path(f"{file}.py"), [argument]
    name, separator, argument = file.partition(":")
    packaged = _packaged_folder() / f"{name}.py"
    if "/" not in name and packaged.is_file() and not pathlib.Path(file).is_file():
        return packaged, [argument] if separator else []
    return pathlib.Path(file), []


def packaged_files() -> list[pathlib.Path]:
    """Returns the configuration files that come with the package."""
    return sorted(_packaged_folder().glob("*.py"))


def _packaged_folder() -> pathlib.Path:
    """Returns the folder `configs` of a checkout, which an installed package contains."""
    package = pathlib.Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def run_name(path: str | pathlib.Path) -> str:
    """Creates a name for the runs of a configuration from its file and argument.

    Example:
      >>> run_name("imagenet:resnet50,gmsop")
      'imagenet-resnet50-gmsop'
    """
    file, argument = split_argument(path)
    return "-".join([file.stem, *argument]).replace(",", "-").replace("/", "-")


def override(config: ConfigDict, assignment: str) -> None:
    """Sets one field from text, as in `train.batch_size=64`. The text is read as the field's type.

    Raises:
      ConfigError: if there is no such field or the value does not have its type.

    Example:
      >>> config = default_config()
      >>> override(config, "train.batch_size=64")
      >>> config.train.batch_size
      64
      >>> override(config, "train.batchsize=64")
      Traceback (most recent call last):
      ...
      gmsop_jax.errors.ConfigError: there is no field config.train.batchsize; did you mean train.batch_size?
    """
    name, separator, text = assignment.partition("=")
    if not separator:
        raise ConfigError(f"--config.{name} needs a value: --config.{name}=…")
    _check_known(name)
    section, leaf = _locate(config, name)
    try:
        section[leaf] = _PARSERS[type(FIELDS[name].default)](text)
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError) as error:
        raise ConfigError(_wrong_type(name, text, f"it is currently {section[leaf]!r}")) from error


def _check_known(name: str) -> None:
    if name not in FIELDS:
        leaf = name.rpartition(".")[2]
        same_leaf = [field for field in FIELDS if field.rpartition(".")[2] == leaf]
        hint = f"did you mean {same_leaf[0]}?" if same_leaf else did_you_mean(name, FIELDS)
        raise ConfigError(f"there is no field config.{name}; {hint}")


def _wrong_type(name: str, value: Any, comparison: str) -> str:
    kind = type(FIELDS[name].default).__name__
    article = "an" if kind == "int" else "a"
    return f"config.{name} must be {article} {kind} ({comparison}), but got {value!r}"


def _parse_tuple(text: str) -> tuple:
    value = as_tuples(ast.literal_eval(text))
    if not isinstance(value, tuple):
        raise ValueError(text)
    return value


_PARSERS: dict[type, Callable[[str], Any]] = {
    str: str,
    int: lambda text: int(text, 10),
    float: float,
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    tuple: _parse_tuple,
}


def as_tuples(value: Any) -> Any:
    """Returns the value with all lists in it replaced by tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) for every field."""
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def validate(config: ConfigDict) -> None:
    """Checks the type and the value of every field, and that the fields fit each other.

    Raises:
      ConfigError: naming the field, its value, and the values that are allowed.
    """
    fields = dict(flatten(config))
    for name in fields:
        _check_known(name)
    for name, field in FIELDS.items():
        if name not in fields:
            raise ConfigError(f"config.{name} is missing; start from default_config()")
        _check_value(name, field, fields[name])
    _check_model(config.model)
    _check_data(config)
    _check_train(config.train)


def _check_value(name: str, field: Field, value: Any) -> None:
    kind = type(field.default)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ConfigError(_wrong_type(name, value, f"its default is {field.default!r}"))
    if kind is float and not _is_number(value):
        raise ConfigError(f"config.{name} must be a finite number, got {value}")
    if not field.allowed.contains(value):
        strings = [choice for choice in field.allowed.choices if isinstance(choice, str) and choice]
        hint = f"; {did_you_mean(str(value), strings, quote=True)}" if strings else ""
        raise ConfigError(f"config.{name} must be {field.allowed.description}, got {value!r}{hint}")


def _check_model(m: ConfigDict) -> None:
    if m.head in GATED and m.num_selected > m.num_candidates:
        raise ConfigError(
            f"config.model.num_selected (K = {m.num_selected}) exceeds config.model.num_candidates"
            f" (N = {m.num_candidates}); lower K or raise N"
        )
    if m.projection_widths and m.head in MIXTURES:
        raise ConfigError(
            f"config.model.projection_widths = {m.projection_widths} applies to heads without a mixture, but"
            f" config.model.head is {m.head!r}; use candidate_widths instead"
        )
    if m.head == "sot" and m.power > 1:
        raise ConfigError(f"config.model.power = {m.power} must be at most 1 for the head 'sot'; set 0.5, for example")
    if m.coefficients == "minimax" and m.num_iters > len(MINIMAX_LOWER_ENDS):
        raise ConfigError(
            f"config.model.num_iters = {m.num_iters} must be at most {len(MINIMAX_LOWER_ENDS)} if"
            " config.model.coefficients is 'minimax'"
        )
    if m.projection_batch_norm and not m.projection_widths:
        raise ConfigError("config.model.projection_batch_norm needs config.model.projection_widths, which is ()")
    if m.backbone == "narrow":
        if m.stem != "small":
            raise ConfigError(f"config.model.stem = {m.stem!r} needs a backbone other than 'narrow'")
        if len(m.stage_widths) != len(m.stage_strides):
            raise ConfigError(
                f"config.model.stage_widths {m.stage_widths} and stage_strides {m.stage_strides} need one entry for"
                " each stage"
            )
        return
    for name in ("blocks_per_stage", "width_factor", "stage_widths", "stem_width"):
        if m[name] != FIELDS[f"model.{name}"].default:
            raise ConfigError(f"config.model.{name} applies to the backbone 'narrow' only, not to {m.backbone!r}")
    if len(m.stage_strides) != 4:
        raise ConfigError(f"config.model.stage_strides needs four entries for {m.backbone}, got {m.stage_strides}")


def _check_data(config: ConfigDict) -> None:
    size, resize = config.data.image_size, config.eval.resize
    if resize and not size:
        raise ConfigError("config.eval.resize needs config.data.image_size, the side of the centre that is cut out")
    if 0 < resize < size:
        raise ConfigError(
            f"config.eval.resize = {resize} is smaller than config.data.image_size = {size}, the side of the centre"
            " that is cut out"
        )
    if not config.data.dir:
        raise ConfigError("config.data.dir is empty; set --config.data.dir=DIR to the folder of a data set")


def _check_train(t: ConfigDict) -> None:
    epochs = sum(epochs for _, epochs in t.learning_rates)
    if t.schedule == "cosine" and len(t.learning_rates) != 1:
        raise ConfigError(
            "config.train.schedule = 'cosine' takes one pair (rate, epochs) in config.train.learning_rates, like"
            f" ((0.1, 100),); got {t.learning_rates}"
        )
    if t.schedule == "cosine" and t.num_epochs > epochs:
        raise ConfigError(
            f"config.train.num_epochs = {t.num_epochs} is more than the {epochs} epochs of the cosine, after which the"
            f" learning rate is 0; set config.train.learning_rates=(({t.learning_rates[0][0]}, {t.num_epochs}),)"
        )
    if t.warmup_epochs > epochs:
        raise ConfigError(
            f"config.train.warmup_epochs = {t.warmup_epochs} is longer than the {epochs} epochs of"
            " config.train.learning_rates"
        )
    if t.nesterov and t.optimizer != "sgd":
        raise ConfigError(f"config.train.nesterov applies to 'sgd', but config.train.optimizer is {t.optimizer!r}")


def to_json(config: ConfigDict) -> str:
    """Returns the configuration as JSON text."""
    return json.dumps(config.to_dict(), indent=2)


def from_json(text: str, place: str = "the stored configuration") -> ConfigDict:
    """Reads what `to_json` returned. Fields that are missing, because they were added later, have their defaults.

    Args:
      text: the JSON text.
      place: where it was found, for error messages.

    Raises:
      ConfigError: if the text is not JSON, or contains an unknown field or a value of another type.
    """
    try:
        stored = json.loads(text)
        fields = list(flatten(stored)) if isinstance(stored, dict) else []
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON ({error})") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"{place} contains {text.strip()[:40]} instead of an object with fields")
    if "library_name" in stored:
        raise ConfigError(f"{place} is that of an exported network; give the working directory of a training run")
    config = default_config()
    for name, value in fields:
        if value in _REMOVED_FIELDS.get(name, ()):
            continue
        if name not in FIELDS:
            raise ConfigError(
                f"{place} has the field config.{name} = {value!r}, which this version of gmsop_jax"
                " does not know; use the version that wrote it"
            )
        section, leaf = _locate(config, name)
        try:
            if value is None:
                raise TypeError  # ml_collections accepts it for every field
            section[leaf] = _REMOVED_VALUES.get((name, value), value) if isinstance(value, str) else as_tuples(value)
        except TypeError as error:
            raise ConfigError(f"{place} has config.{name} = {value!r}, of the wrong type") from error
    return config


def read(file: pathlib.Path) -> ConfigDict:
    """Reads the `config.json` of a run.

    Raises:
      ConfigError: if the file can't be read, and as `from_json`.
    """
    try:
        text = read_bytes(file).decode()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} can't be read ({reason(error)}); it should be in the working directory of a run"
        ) from error
    return from_json(text, str(file))


def differences(config: ConfigDict, other: ConfigDict) -> list[str]:
    """Returns a line `config.field: a → b` for each difference in a field that a resumed run may not change."""
    a, b = dict(flatten(config)), dict(flatten(other))
    return [
        f"config.{name}: {a[name]!r} → {b[name]!r}"
        for name, field in FIELDS.items()
        if not field.resumable and a[name] != b[name]
    ]
