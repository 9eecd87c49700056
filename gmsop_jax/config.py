"""Configurations: defaults, overrides from the command line, and validation.

A configuration file is Python with a function `get_config()` that returns a `ConfigDict` made from
`default_config()`; it is executed, so run only files you trust. One file may hold many configurations: in
`file.py:argument` the text after the colon is handed to its `get_config(argument)`.
"""

import ast
import contextlib
import difflib
import importlib.util
import json
import pathlib
import traceback
import types
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ml_collections

from gmsop_jax.config_checks import check_values
from gmsop_jax.errors import ConfigError

if TYPE_CHECKING:

    class ConfigDict(ml_collections.ConfigDict):
        """ml_collections' own, whose fields a type checker can't know."""

        def __getattr__(self, name: str) -> Any: ...
        def __getitem__(self, key: str) -> Any: ...

else:
    ConfigDict = ml_collections.ConfigDict


def model_defaults() -> ConfigDict:
    """Fields of `config.model`; the defaults are GM-SOP-16-8 on ResNet-18, 64×64 images."""
    m = ConfigDict()
    m.num_classes = 0  # 0: as many as the data set has
    m.compute_dtype = ""  # '' follows the parameters (float32); bfloat16 for the convolutions
    # backbone
    m.backbone = "narrow"  # basic blocks; or resnet50 | resnet101 | resnext50_32x4d | resnext101_{32,64}x4d
    m.blocks_per_stage = 2  # narrow: 2 is ResNet-18, 4 WRN-36, 6 the authors' 64×64 "ResNet-50"
    m.width_factor = 1  # narrow: multiplies stage_widths; 2 is WRN-36-2
    m.stage_widths = (16, 32, 64, 128)  # narrow: channels of each stage
    m.stem_width = 16  # narrow: channels of the first convolution
    m.stem = "small"  # 3×3 at stride 1; large: 7×7 at stride 2 and max-pool, for 224×224 (not narrow)
    m.stage_strides = (1, 2, 2, 1)  # of each stage's first block; first-order heads end with 2
    m.pixel_scale = 60.0  # the stem's kernel starts at He's scale over this, learns at its square
    m.batch_norm_rate = 0.3  # share of the batch in the running moments
    # head
    m.head = "gmsop"  # gap | sop | srsop | mpncov, and mixtures {gm,ave,concat} of {gap,sop}: gmgap …
    m.projection_widths = ()  # heads without mixture: 1×1 convolutions before the pooling
    m.projection_batch_norm = False  # batch norm after each of them, as iSQRT-COV
    m.num_iters = 3  # Newton–Schulz steps; iSQRT-COV takes 5
    m.power = 0.5  # α of mpncov
    # mixtures
    m.num_candidates = 16  # N, size of the bank
    m.num_selected = 8  # K, candidates per image; gated mixtures only
    m.candidate_widths = (256, 128)  # 1×1 convolutions of a candidate; the last one is pooled
    m.dispatch = "auto"  # how the selected candidates are run: gather | loop; auto by the backend
    m.dropout_rate = 0.2  # before the classifier of a mixture
    # gate
    m.gate_widths = (256, 128)  # 1×1 convolutions of the gate's trunk
    m.gate_order = 0  # of the gate's pooling: 1 average, 2 covariance; 0: as the candidates'
    m.gate_init = "constant"  # every logit ties at the start; random
    m.gate_noise = "image"  # one draw an image, learned scale | candidate | fixed (1/N) | none
    m.gate_softmax = "selected"  # the weights sum to 1 | all: softmax over the N, the others dropped
    m.gate_gradient = "straight_through"  # or masked, the authors'
    m.balance_on = "weights"  # of the selected | softmax: over all N
    m.balance_ddof = 1  # variance over N − 1; 0: over N
    return m


def default_config() -> ConfigDict:
    """Every field there is; GM-SOP-16-8 + ResNet-18 on 64×64 ImageNet, the authors' recipe."""
    c = ConfigDict()
    c.seed = 0  # of initialisation, data order, augmentation, gate noise and dropout
    c.compute_dtype = ""  # see model.compute_dtype, which follows it
    c.model = model_defaults()
    c.model.compute_dtype = c.get_ref("compute_dtype")

    c.data = ConfigDict()
    c.data.dir = "data/imagenet64"  # shards and dataset.json, as tools/convert.py makes them
    c.data.source = "imagenet64"  # the source that tools/convert.py makes them from
    c.data.auto_convert = False  # convert the source's embedded sample if dir doesn't exist
    c.data.image_size = 0  # side to which images are resized; 0: as stored
    c.data.flip = True  # mirror half of the training images
    c.data.crop = "none"  # padded: random crop after padding | resized: random part, resized
    c.data.crop_padding = 4  # pixels of padding around the image, mean colour
    c.data.crop_area = (0.08, 1.0)  # least and largest share of the image that is cut out and resized
    c.data.num_threads = 2  # batches prepared at once; more gain nothing but where images are resized
    c.data.num_workers = 0  # processes that prepare them instead; for slow resizing
    c.data.on_corrupt = "stop"  # at a damaged shard or record; skip: go on without, and say which
    c.data.verify = True  # compare the shards' checksums before the first step

    c.train = ConfigDict()
    c.train.batch_size = 256  # over all devices
    c.train.num_epochs = 60  # passes over the training split
    c.train.optimizer = "sgd"  # adamw
    c.train.learning_rates = ((0.1, 40), (0.01, 10), (0.001, 5), (0.0001, 5))  # (rate, epochs) …
    c.train.schedule = "steps"  # cosine: from the one rate of learning_rates to 0 in its epochs
    c.train.warmup_epochs = 0.0  # in which the rate rises linearly to what the schedule says
    c.train.rate_factors = ()  # ((part, factor), …), like (("backbone", 0.1),); 0 freezes the part
    c.train.momentum = 0.9  # of SGD; β₁ of AdamW
    c.train.beta2 = 0.999  # of AdamW
    c.train.nesterov = False  # Nesterov's momentum
    c.train.weight_decay = 1e-4  # on every parameter: biases, batch norm and gate too
    c.train.label_smoothing = 0.0  # share of the target that is spread over all classes
    c.train.mixup_alpha = 0.0  # of the Beta(α, α) that mixes pairs of images; 0: none
    c.train.ema_decay = 0.0  # of averaged parameters, which are then evaluated; 0: none
    c.train.init_from = ""  # folder of a run whose parameters this one starts from
    c.train.balance_weight = 100.0  # α; the loss is the mean cross entropy + α/B · balance loss
    c.train.drop_last = True  # False trains on the smaller last batch of an epoch, as the authors
    c.train.sub_batches = 1  # parts of a batch, one after the other: less memory, a forward pass more
    c.train.on_nonfinite = "stop"  # rollback: go on from the last checkpoint without that step's batch
    c.train.log_every_steps = 100  # training metrics are told so often, and at each epoch's end

    c.parallel = ConfigDict()
    c.parallel.mode = "jit"  # one program that XLA splits over all devices | pmap: one for each device
    c.parallel.cpu_devices = 1  # as which a CPU is taken; 0: a device a core, faster for small networks
    c.parallel.batch_norm = "global"  # moments of the whole batch | device: of each device's part
    c.parallel.shard_optimizer = False  # split the optimiser's state over the devices (jit)
    c.parallel.shard_classifier = False  # split the classifier over the devices (jit)

    c.eval = ConfigDict()
    c.eval.split = "val"  # evaluated after each epoch
    c.eval.batch_size = 256  # over all devices; also of --mode predict
    c.eval.resize = 0  # shorter side before the centre is cut out; 0: whole images to data.image_size
    c.eval.flip_average = False  # mean of the logits of each image and its mirror image

    c.checkpoint = ConfigDict()
    c.checkpoint.keep = 3  # the last n are kept, and the best
    c.checkpoint.every_steps = 0  # within an epoch too; 0: at each epoch's end only
    return c


# What a resumed run may change: it decides where things lie and how often they are told, not what is
# computed.
_MAY_DIFFER = (
    "data.dir",
    "data.auto_convert",
    "data.num_threads",
    "data.num_workers",
    "data.on_corrupt",
    "data.verify",
    "model.dispatch",
    "train.num_epochs",  # a finished run may be given more: the last learning rate goes on
    "train.log_every_steps",
    "train.on_nonfinite",
    "parallel.mode",
    "parallel.cpu_devices",
    "parallel.shard_optimizer",
    "parallel.shard_classifier",
    "eval.batch_size",
    "checkpoint.keep",
    "checkpoint.every_steps",
)


def load(path: str | pathlib.Path, overrides: list[str] | tuple[str, ...] = ()) -> ConfigDict:
    """Reads a configuration file, applies `field=value` overrides, and validates the result.

    Args:
      path: `file.py` or `file.py:argument`.
      overrides: see `override`.

    Raises:
      ConfigError: if the file is missing or has no `get_config`, or as `override` and `validate`.
    """
    file, argument = split_argument(path)
    with _explaining(file):
        module = run_file(file)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"{file} has no function get_config()")
        config = module.get_config(*argument)
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"get_config() of {file} returns {config!r}; it should return default_config() with changes")
    for item in overrides:
        override(config, item)
    validate(config)
    return config


def run_file(file: pathlib.Path) -> types.ModuleType:
    """Executes a configuration file, without asking it for a configuration.

    Raises:
      ConfigError: if the file is missing, or what it does goes wrong.
    """
    if not file.is_file():
        raise ConfigError(f"no configuration file {file}; those that come along are in configs/")
    spec = importlib.util.spec_from_file_location(f"gmsop_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is no Python file; a configuration has a function get_config()")
    module = importlib.util.module_from_spec(spec)
    with _explaining(file):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _explaining(file: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's file may raise
        raise ConfigError(f"{file}{_line_in(file, error)}: {type(error).__name__}: {error}") from error


def split_argument(path: str | pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    """The file of `file.py:argument`, and a list that holds the argument if there is one.

    Example:
      >>> split_argument("configs/imagenet.py:resnet50,gmsop")
      (PosixPath('configs/imagenet.py'), ['resnet50,gmsop'])
    """
    file, separator, argument = str(path).partition(".py:")
    return pathlib.Path(file + ".py" if separator else file), [argument] if separator else []


def run_name(path: str | pathlib.Path) -> str:
    """A name for the runs of a configuration: its file's and its argument's.

    Example:
      >>> run_name("configs/imagenet.py:resnet50,gmsop")
      'imagenet-resnet50-gmsop'
    """
    file, argument = split_argument(path)
    return "-".join([file.stem, *argument]).replace(",", "-").replace("/", "-")


def _line_in(path: pathlib.Path, error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    line = lines[-1] if lines else getattr(error, "lineno", None)
    return f", line {line}" if line else ""


def override(config: ConfigDict, assignment: str) -> None:
    """Sets one field from text, as in `train.batch_size=64`; the text is read as the field's type.

    Raises:
      ConfigError: if there is no such field or the value doesn't fit its type.

    Example:
      >>> config = default_config()
      >>> override(config, "train.batch_size=64")
      >>> config.train.batch_size
      64
      >>> override(config, "train.batchsize=64")
      Traceback (most recent call last):
      ...
      gmsop_jax.errors.ConfigError: no field config.train.batchsize; did you mean train.batch_size?
    """
    name, separator, text = assignment.partition("=")
    if not separator:
        raise ConfigError(f"--config.{name} needs a value: --config.{name}=…")
    fields = dict(flatten(config))
    if name not in fields:
        raise ConfigError(f"no field config.{name}; {_suggest(name, fields)}")
    section, _, leaf = name.rpartition(".")
    parent = config[section] if section else config
    value = _parse(name, text, fields[name])
    parent[leaf] = value


def _suggest(name: str, fields: Mapping[str, Any]) -> str:
    by_leaf = [f for f in fields if f.rpartition(".")[2] == name.rpartition(".")[2]]
    close = by_leaf or difflib.get_close_matches(name, fields, 1, 0.6)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(fields)}"


def _parse(name: str, text: str, current: Any) -> Any:
    if isinstance(current, str):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        value = text
    if isinstance(current, float) and type(value) is int:
        value = float(value)
    if isinstance(current, tuple) and isinstance(value, list):
        value = tuple(value)
    if type(value) is not type(current):
        expected = type(current).__name__
        raise ConfigError(f"config.{name} is of type {expected} (now {current!r}); {text!r} is none")
    return value


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every field."""
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def validate(config: ConfigDict) -> None:
    """Checks every field against its type, its range and the others.

    Raises:
      ConfigError: naming the field, the value and what would be right.
    """
    known = dict(flatten(default_config()))
    fields = dict(flatten(config))
    for name, value in fields.items():
        if name not in known:
            raise ConfigError(f"no field config.{name}; {_suggest(name, known)}")
        _parse(name, value if isinstance(value, str) else repr(value), known[name])
    missing = [name for name in known if name not in fields]
    if missing:
        raise ConfigError(f"config.{missing[0]} is missing; start from default_config()")
    check_values(config, default_config())


def to_json(config: ConfigDict) -> str:
    """The resolved configuration as JSON text."""
    return json.dumps(config.to_dict(), indent=2)


def from_json(text: str) -> ConfigDict:
    """Inverse of `to_json`: tuples, which JSON writes as lists, are tuples again.

    Raises:
      ConfigError: if the text is no JSON of a configuration.
    """
    config = default_config()
    try:
        stored = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"the stored configuration is no JSON ({error})") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"the stored configuration is a {type(stored).__name__}, not fields")
    known = dict(flatten(config))
    for name, value in flatten(stored):
        section, _, leaf = name.rpartition(".")
        if name in known and name != "model.compute_dtype":
            parent = config[section] if section else config
            try:
                parent[leaf] = _as_tuple(value)
            except TypeError as error:
                raise ConfigError(f"the stored config.{name} is of another type ({value!r})") from error
    return config


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(v) for v in value) if isinstance(value, list) else value


def differences(config: ConfigDict, other: ConfigDict) -> list[str]:
    """Lines `field: a → b` for the fields that make two runs different computations."""
    a, b = dict(flatten(config)), dict(flatten(other))
    names = [n for n in a if n not in _MAY_DIFFER and a[n] != b.get(n)]
    return [f"config.{n}: {a[n]!r} → {b.get(n)!r}" for n in names]
