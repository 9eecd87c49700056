"""Validation of a configuration: the type and the value of every field, and whether the fields fit each other."""

from collections.abc import Iterator, Mapping
from typing import Any

from gmsop_jax.config.fields import FIELDS, ConfigDict, Field, is_number
from gmsop_jax.errors import ConfigError, did_you_mean
from gmsop_jax.models.network import GATED, MIXTURES
from gmsop_jax.ops.coefficients import MINIMAX_LOWER_ENDS


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
      ConfigError: if a field is invalid; the message states the field, its value, and the allowed values.
    """
    fields = dict(flatten(config))
    for name in fields:
        check_known(name)
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
        raise ConfigError(wrong_type(name, value, f"its default is {field.default!r}"))
    if kind is float and not is_number(value):
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
        raise ConfigError(
            "config.model.projection_batch_norm needs config.model.projection_widths, which is (); set both or neither"
        )
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
            raise ConfigError(
                f"config.model.{name} applies to the backbone 'narrow' only, not to {m.backbone!r}; remove"
                f" config.model.{name}={m[name]}"
            )
    if len(m.stage_strides) != 4:
        raise ConfigError(f"config.model.stage_strides needs four entries for {m.backbone}, got {m.stage_strides}")


def _check_data(config: ConfigDict) -> None:
    size, resize = config.data.image_size, config.eval.resize
    if resize and not size:
        raise ConfigError("config.eval.resize needs config.data.image_size, the side of the centre crop, which is 0")
    if 0 < resize < size:
        raise ConfigError(
            f"config.eval.resize = {resize} is smaller than config.data.image_size = {size}, the side of the centre"
            " crop; increase it"
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
        raise ConfigError(
            f"config.train.nesterov applies to 'sgd', not to {t.optimizer!r}; set --config.train.nesterov=false"
        )


def check_known(name: str) -> None:
    """Raises ConfigError if the field does not exist; the message suggests a similar name."""
    if name not in FIELDS:
        leaf = name.rpartition(".")[2]
        same_leaf = [field for field in FIELDS if field.rpartition(".")[2] == leaf]
        hint = f"did you mean {same_leaf[0]}?" if same_leaf else did_you_mean(name, FIELDS)
        raise ConfigError(f"there is no field config.{name}; {hint}")


def wrong_type(name: str, value: Any, comparison: str) -> str:
    """Returns the message about a value of the wrong type; `comparison` states one of the right type."""
    kind = type(FIELDS[name].default).__name__
    article = "an" if kind == "int" else "a"
    return f"config.{name} must be {article} {kind} ({comparison}), but got {value!r}"
