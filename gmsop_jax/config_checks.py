"""Values that the fields of a configuration may have, alone and beside each other."""

import difflib
from typing import Any

from gmsop_jax.errors import ConfigError
from gmsop_jax.models.network import BACKBONES, HEADS


def check_values(config: Any, defaults: Any) -> None:
    """Checks every field against its range and the others.

    Args:
      config: all fields, each of its type.
      defaults: the same fields, as they are by themselves.

    Raises:
      ConfigError: naming the field, the value and what would be right.
    """
    for name, least in _LEAST.items():
        section, _, leaf = name.rpartition(".")
        value = (config[section] if section else config)[leaf]
        if value < least:
            raise ConfigError(f"config.{name} must be at least {least}, got {value}")
    _check_model(config.model, defaults.model)
    _check_data(config)
    _check_train(config.train)
    _check_parallel(config.parallel)


_LEAST = {
    "seed": 0,
    "data.image_size": 0,
    "data.num_threads": 1,
    "data.num_workers": 0,
    "data.crop_padding": 0,
    "train.batch_size": 1,
    "train.num_epochs": 1,
    "train.weight_decay": 0.0,
    "train.warmup_epochs": 0.0,
    "train.mixup_alpha": 0.0,
    "train.balance_weight": 0.0,
    "train.sub_batches": 1,
    "train.log_every_steps": 1,
    "parallel.cpu_devices": 0,
    "eval.batch_size": 1,
    "eval.resize": 0,
    "checkpoint.keep": 1,
    "checkpoint.every_steps": 0,
    "model.num_classes": 0,
    "model.blocks_per_stage": 1,
    "model.width_factor": 1,
    "model.stem_width": 1,
    "model.num_candidates": 1,
    "model.num_selected": 1,
    "model.num_iters": 1,
}


_MODEL_CHOICES = {
    "compute_dtype": ("", "float32", "bfloat16", "float64"),
    "backbone": BACKBONES,
    "stem": ("small", "large"),
    "head": HEADS,
    "dispatch": ("auto", "gather", "loop"),
    "gate_order": (0, 1, 2),
    "gate_init": ("constant", "random"),
    "gate_noise": ("image", "candidate", "fixed", "none"),
    "gate_softmax": ("selected", "all"),
    "gate_gradient": ("straight_through", "masked"),
    "balance_on": ("weights", "softmax"),
    "balance_ddof": (0, 1),
}
_NARROW = ("blocks_per_stage", "width_factor", "stage_widths", "stem_width")  # of the narrow backbone alone


def _check_model(m: Any, defaults: Any) -> None:
    for name, allowed in _MODEL_CHOICES.items():
        _one_of(f"model.{name}", m[name], allowed)
    gated = m.head in ("gmgap", "gmsop")
    if gated and m.num_selected > m.num_candidates:
        raise ConfigError(
            f"config.model.num_selected (K = {m.num_selected}) exceeds config.model.num_candidates"
            f" (N = {m.num_candidates}); lower K or raise N"
        )
    for name in ("stage_widths", "stage_strides", "candidate_widths", "gate_widths", "projection_widths"):
        if (not m[name] and name != "projection_widths") or any(type(v) is not int or v < 1 for v in m[name]):
            raise ConfigError(f"config.model.{name} must be positive integers, like {defaults[name]}; got {m[name]}")
    if m.projection_widths and m.head not in ("gap", "sop", "srsop", "mpncov"):
        raise ConfigError(
            f"config.model.projection_widths = {m.projection_widths} is of heads without mixture; config.model.head is"
            f" {m.head!r}, which has candidate_widths"
        )
    if m.projection_batch_norm and not m.projection_widths:
        raise ConfigError("config.model.projection_batch_norm needs config.model.projection_widths, which is ()")
    _check_backbone(m, defaults)
    if not m.pixel_scale > 0:
        raise ConfigError(f"config.model.pixel_scale must be positive, got {m.pixel_scale}")
    if not m.power > 0:
        raise ConfigError(f"config.model.power must be positive, got {m.power}")
    if not 0 < m.batch_norm_rate <= 1:
        raise ConfigError(f"config.model.batch_norm_rate must be in (0, 1], got {m.batch_norm_rate}")
    if not 0 <= m.dropout_rate < 1:
        raise ConfigError(f"config.model.dropout_rate must be in [0, 1), got {m.dropout_rate}")


def _check_backbone(m: Any, defaults: Any) -> None:
    if m.backbone == "narrow":
        if m.stem != "small":
            raise ConfigError(f"config.model.stem = {m.stem!r} needs a backbone other than 'narrow'")
    else:
        for name in _NARROW:
            if m[name] != defaults[name]:
                raise ConfigError(f"config.model.{name} is of the narrow backbone; {m.backbone} has its own")
        if len(m.stage_strides) != 4:
            raise ConfigError(f"config.model.stage_strides needs four entries for {m.backbone}, got {m.stage_strides}")
    if m.backbone == "narrow" and len(m.stage_widths) != len(m.stage_strides):
        raise ConfigError(
            f"config.model.stage_widths {m.stage_widths} and stage_strides {m.stage_strides}"
            " need one entry for each stage"
        )


def _check_data(config: Any) -> None:
    d = config.data
    _one_of("data.on_corrupt", d.on_corrupt, ("stop", "skip"))
    _one_of("data.crop", d.crop, ("none", "padded", "resized"))
    areas = d.crop_area
    if len(areas) != 2 or any(type(a) not in (int, float) for a in areas) or not 0 < areas[0] <= areas[1] <= 1:
        raise ConfigError(f"config.data.crop_area must be (least, largest) share in (0, 1], got {areas}")
    if 0 < config.eval.resize < d.image_size:
        raise ConfigError(
            f"config.eval.resize = {config.eval.resize} is smaller than config.data.image_size = {d.image_size},"
            " the centre that is cut out of it"
        )
    if config.eval.resize and not d.image_size:
        raise ConfigError("config.eval.resize needs config.data.image_size, the side of the centre that is cut out")


def _check_train(t: Any) -> None:
    _check_rates(t.learning_rates)
    _one_of("train.on_nonfinite", t.on_nonfinite, ("stop", "rollback"))
    _one_of("train.optimizer", t.optimizer, ("sgd", "adamw"))
    _one_of("train.schedule", t.schedule, ("steps", "cosine"))
    for name in ("momentum", "beta2", "label_smoothing", "ema_decay"):
        if not 0 <= t[name] < 1:
            raise ConfigError(f"config.train.{name} must be in [0, 1), got {t[name]}")
    if t.schedule == "cosine" and len(t.learning_rates) != 1:
        raise ConfigError(
            "config.train.schedule = 'cosine' takes one pair (rate, epochs) in config.train.learning_rates, like"
            f" ((0.1, 100),); got {t.learning_rates}"
        )
    epochs = sum(epochs for _, epochs in t.learning_rates)
    if t.schedule == "cosine" and t.num_epochs > epochs:
        raise ConfigError(
            f"config.train.num_epochs = {t.num_epochs} goes on after the cosine of {epochs} epochs, at a rate of 0;"
            f" give config.train.learning_rates its epochs: (({t.learning_rates[0][0]}, {t.num_epochs}),)"
        )
    if t.warmup_epochs > epochs:
        raise ConfigError(
            f"config.train.warmup_epochs = {t.warmup_epochs} is longer than the {epochs} epochs of"
            " config.train.learning_rates"
        )
    if t.nesterov and t.optimizer != "sgd":
        raise ConfigError(f"config.train.nesterov is of sgd; config.train.optimizer is {t.optimizer!r}")
    pairs = all(isinstance(p, tuple | list) and len(p) == 2 for p in t.rate_factors)
    if not pairs or any(not isinstance(n, str) or type(f) not in (int, float) or f < 0 for n, f in t.rate_factors):
        raise ConfigError(
            "config.train.rate_factors must be pairs (part, factor ≥ 0), like"
            f' (("backbone", 0.1), ("backbone/stem", 0)); got {t.rate_factors}'
        )


def _check_rates(rates: tuple) -> None:
    pairs = all(isinstance(r, tuple | list) and len(r) == 2 for r in rates)
    numbers = pairs and all(type(r) in (int, float) and type(e) is int for r, e in rates)
    if not rates or not numbers or any(not r > 0 or e < 1 for r, e in rates):
        raise ConfigError(
            "config.train.learning_rates must be pairs (rate > 0, epochs ≥ 1), like"
            f" ((0.1, 40), (0.01, 10)); got {rates}"
        )


def _check_parallel(p: Any) -> None:
    _one_of("parallel.mode", p.mode, ("jit", "pmap"))
    _one_of("parallel.batch_norm", p.batch_norm, ("global", "device"))
    for name in ("shard_optimizer", "shard_classifier"):
        if p.mode == "pmap" and p[name]:
            raise ConfigError(f"config.parallel.{name} needs config.parallel.mode = 'jit', got 'pmap'")


def _one_of(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        close = difflib.get_close_matches(str(value), [a for a in allowed if isinstance(a, str)], 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"config.{name} must be one of {allowed}, got {value!r}{hint}")
