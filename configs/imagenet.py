"""ImageNet's ResNet and ResNeXt with any head, on ImageNet-1K at 224×224 or 64×64.

    gmsop train --config imagenet:BACKBONE,HEAD,SIDE

BACKBONE: resnet34, resnet50, resnet101, resnext50_32x4d, resnext101_32x4d, resnext101_64x4d. HEAD: any of
`config.model.head`. SIDE: 224 or 64. The defaults are resnet50, gap and 224.

Published: with the head gap at 224×224, these backbones have single-crop top-1 errors of 25.81, 23.9, 22.0, 22.2, 21.2
and 20.4 %, in this order; that of ResNet-34 is from the authors of DropCov. The recipe is the usual one of these
networks (He et al. 2016); second-order heads keep a 14×14 feature map, as in iSQRT-COV.
"""

from gmsop_jax.config import ConfigDict, default_config
from gmsop_jax.errors import ConfigError
from gmsop_jax.models.network import BACKBONES, HEADS

ROWS = [f"{b},{h},{side}" for side in (224, 64) for h in ("gap", "srsop", "gmgap", "gmsop") for b in BACKBONES[1:]]


def get_config(network: str = "") -> ConfigDict:
    backbone, head, side = _parse(network)
    c = default_config()
    c.data.dir, c.data.source = ("data/imagenet64", "imagenet64") if side == 64 else ("data/imagenet", "image-folder")
    m = c.model
    m.backbone, m.head = backbone, head
    m.stem = "small" if side == 64 else "large"
    m.stage_strides = (1, 2, 2, 2) if head.endswith("gap") else (1, 2, 2, 1)
    m.batch_norm_rate = 0.1
    if head in ("sop", "srsop", "mpncov", "dropcov"):  # 2048 channels would make 2 million features
        m.projection_widths, m.projection_batch_norm = (256,), True
    m.num_iters = 5 if head == "srsop" else 3
    if head.endswith("gap") and head != "gap":
        m.candidate_widths = (512,)
    if side == 224:
        c.data.image_size, c.data.crop, c.eval.resize = 224, "resized", 256
        c.data.num_workers = 8  # processes, because cropping and resizing images of many sizes is slow
    c.train.learning_rates = ((0.1, 30), (0.01, 30), (0.001, 30))
    c.train.num_epochs = 90
    return c


def _parse(network: str) -> tuple[str, str, int]:
    parts = [*network.split(","), "", ""][:3]
    backbone, head, side = (given or default for given, default in zip(parts, ("resnet50", "gap", "224"), strict=True))
    if network.count(",") > 2 or backbone not in BACKBONES[1:] or head not in HEADS or side not in ("224", "64"):
        raise ConfigError(
            f"imagenet:{network} should be imagenet:BACKBONE,HEAD,SIDE; BACKBONE one of {', '.join(BACKBONES[1:])};"
            f" HEAD one of {', '.join(HEADS)}; SIDE 224 or 64"
        )
    return backbone, head, int(side)
