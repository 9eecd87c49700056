"""Makes pytorch/: python tests/goldens/make_torch.py. Needs PyTorch and torchvision.

The weights are not stored: `weights` makes them again from names and shapes, with exact arithmetic. It,
`images`, `names_and_shapes` and `load` need NumPy alone.
"""

# pyright: reportMissingImports=false
import pathlib
import zlib
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).parent
NUM_CLASSES = 10
# of the others names and shapes are stored
COMPUTED = ("resnet34", "resnet50", "resnext50_32x4d", "isqrt_resnet50", "dropcov_resnet34")
NETWORKS = (*COMPUTED, "resnet101", "resnext101_64x4d", "isqrt_resnet101", "dropcov_resnet50")


def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random values, float32, for one array of a network: always the same for the same name."""
    draws = np.random.RandomState(zlib.crc32(name.encode())).randint(-(2**15), 2**15, shape, np.int32)
    x = (draws / 2**15).astype(np.float32)  # -1 … 1
    if len(shape) > 1:
        return x * np.sqrt(6 / np.prod(shape[1:])).astype(np.float32)
    if name.endswith("running_var"):
        return np.float32(1.25) + x
    return np.float32(0.75) + x / 4 if name.endswith("weight") else x / 4


def images() -> np.ndarray:
    """Pixels [2, 75, 90, 3], uint8; odd sizes show on which side is padded."""
    return np.random.RandomState(0).randint(0, 256, (2, 75, 90, 3), np.uint8)


def names_and_shapes(network: str) -> dict[str, tuple[int, ...]]:
    """Of a network's arrays in PyTorch, without what counts batches."""
    with np.load(HERE / "pytorch" / f"{network}.npz") as stored:
        shapes = [tuple(n for n in shape if n) for shape in stored["shapes"].tolist()]
        return dict(zip(stored["names"].tolist(), shapes, strict=True))


def load(network: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(weights as PyTorch's `state_dict` has them, logits by dtype) of a network in COMPUTED."""
    state = {name: weights(name, shape) for name, shape in names_and_shapes(network).items()}
    with np.load(HERE / "pytorch" / f"{network}.npz") as stored:
        return state, {dtype: stored[dtype] for dtype in ("float32", "float64")}


def second_order(network: str) -> Any:
    """The network of iSQRT-COV or DropCov, from torchvision's: stride 1 in the last stage, and the head by formulas."""
    import torch
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    method, _, depth = network.partition("_resnet")
    block = BasicBlock if depth == "34" else Bottleneck

    class Attention(torch.nn.Module):  # used in training alone
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv1d(1, 1, 3, padding=1, bias=False)

    class Network(ResNet):
        def __init__(self):
            super().__init__(block, [3, 4, 23 if depth == "101" else 6, 3])
            for module in self.layer4[0].modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.stride = (1, 1)
            if method == "dropcov":
                self.eca_layer = Attention()
            self.layer_reduce = torch.nn.Conv2d(512 * block.expansion, 256, 1, bias=False)
            self.layer_reduce_bn = torch.nn.BatchNorm2d(256)
            self.fc = torch.nn.Linear(32896, NUM_CLASSES)

        def forward(self, x):
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            x = self.relu(self.layer_reduce_bn(self.layer_reduce(x))).flatten(2)
            centred = x - x.mean(2, keepdim=True)
            sigma = centred @ centred.mT / x.shape[2]
            rows, columns = torch.triu_indices(256, 256)
            return self.fc((sigma if method == "dropcov" else self.root(sigma))[:, rows, columns])

        def root(self, sigma):
            trace = sigma.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
            eye = torch.eye(256, dtype=sigma.dtype)
            y, z = sigma / trace, eye
            for _ in range(5):
                t = (3 * eye - z @ y) / 2
                y, z = y @ t, t @ z
            return trace.sqrt() * y

    return Network()


def build(network: str) -> Any:
    """The network in PyTorch, with `weights`."""
    import torch
    from torchvision import models

    net = second_order(network) if "_resnet" in network else getattr(models, network)(num_classes=NUM_CLASSES)
    state = {name: weights(name, tuple(x.shape)) for name, x in net.state_dict().items() if x.ndim}
    net.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()}, strict=False)
    return net.eval()


def logits(net: Any, dtype: str) -> np.ndarray:
    """Of `images()`, normalised as torchvision does."""
    import torch

    kind = getattr(torch, dtype)
    mean, std = (torch.tensor(x, dtype=kind) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = (torch.from_numpy(images()).to(kind) / 255 - mean) / std
    with torch.no_grad():
        return net.to(kind)(x.permute(0, 3, 1, 2)).numpy()


def main() -> None:
    """Writes pytorch/NETWORK.npz for all networks."""
    (HERE / "pytorch").mkdir(exist_ok=True)
    for network in NETWORKS:
        net = build(network)
        arrays = {name: tuple(x.shape) for name, x in net.state_dict().items() if x.ndim}
        values: dict[str, Any] = {
            "names": np.array(list(arrays)),
            "shapes": np.array([shape + (0,) * (4 - len(shape)) for shape in arrays.values()]),
        }
        if network in COMPUTED:
            values |= {dtype: logits(net, dtype) for dtype in ("float32", "float64")}
        np.savez_compressed(HERE / "pytorch" / f"{network}.npz", **values)


if __name__ == "__main__":
    main()
