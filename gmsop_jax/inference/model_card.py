"""Model cards: the `README.md` of an exported network."""

import shlex

import gmsop_jax
from gmsop_jax import config as configs
from gmsop_jax.training import exported
from gmsop_jax.training.metrics import error_text
from gmsop_jax.training.restore import Info

_TEMPLATE = """---
license: {license}
library_name: gmsop_jax
pipeline_tag: image-classification
tags: [jax, flax, second-order-pooling, {head}]
---

# {head} on {dataset}

An image classifier, exported by gmsop_jax {version}, which implements [second-order pooling]({paper}).

```python
import gmsop_jax

model, variables, info = gmsop_jax.load("THIS FOLDER")
```

```sh
gmsop predict --checkpoint "THIS FOLDER" --input PHOTOS
```

| | |
|---|---|
| data | {dataset}: {num_classes} classes ({classes}), images of {height}×{width} pixels |
| network | backbone `{backbone}`, head `{head}`, {parameters:,} parameters |
| result | {result} |
| training | {epochs} in batches of {batch_size} images, {optimizer}; this is the network after step {step:,} |

Images are RGB with values from 0 to 255, from which the mean colour {mean_rgb} is subtracted.

To train this network again, convert the data set and run

```sh
{command}
```
"""
_PAPER = "https://papers.nips.cc/paper_files/paper/2018/hash/17c276c8e723eb46aef576537e9d56d0-Abstract.html"
_BASE = "imagenet64_gmsop"  # equals `default_config`, so that every other value is a flag


def model_card(info: Info, num_parameters: int, *, license_name: str) -> str:
    """Describes a trained network in Markdown: data, recipe, result, command and licence of the weights."""
    inputs, train = info.inputs, info.config.train
    shown = ", ".join(" ".join(name.split()).replace("|", "\\|") for name in inputs.classes[:10])
    return _TEMPLATE.format(
        license=license_name,
        paper=_PAPER,
        version=gmsop_jax.__version__,
        dataset=inputs.dataset,
        num_classes=len(inputs.classes),
        classes=shown if len(inputs.classes) <= 10 else f"{shown}, …",
        height=inputs.image_size[0],
        width=inputs.image_size[1],
        mean_rgb=", ".join(f"{value:.2f}" for value in inputs.mean_rgb),
        backbone=info.config.model.backbone,
        head=info.config.model.head,
        parameters=num_parameters,
        result=_result(info),
        step=info.step,
        batch_size=train.batch_size,
        epochs="1 epoch" if train.num_epochs == 1 else f"{train.num_epochs} epochs",
        optimizer=train.optimizer,
        command=command(info),
    )


def _result(info: Info) -> str:
    if not info.metrics:
        return "not evaluated"
    errors = error_text(info.metrics, len(info.inputs.classes))
    return f"{errors} on the split `{info.config.eval.split}`"


def command(info: Info) -> str:
    """The command that trains the network again: every field that differs from its default is a flag."""
    stored = exported.public_config(info.config)
    if info.config.data.source != info.inputs.dataset:  # `auto_convert` would convert the sample of another data set
        stored["data"] |= {"source": info.inputs.dataset, "auto_convert": False}
    flags = [f"--config {_BASE}"]
    for name, value in configs.flatten(stored):
        field = configs.FIELDS[name]
        if configs.as_tuples(value) != field.default and name != "model.compute_dtype":
            flags.append(shlex.quote(f"--config.{name}={value}"))
    return " \\\n  ".join(["gmsop train", *flags])
