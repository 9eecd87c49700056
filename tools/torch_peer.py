"""An idiomatic implementation of GM-SOP in PyTorch, with which `benchmark.py` compares gmsop_jax.

For each candidate, the images that selected it are gathered (`index_select`). Autograd differentiates the square root.
"""

# pyright: reportMissingImports=false
import torch
from torch import Tensor, nn
from torch.nn import functional


def second_order_pool(x: Tensor, num_iters: int = 3) -> Tensor:
    """[b, p, c] → [b, c(c + 1)/2], by the iteration as the paper writes it."""
    centred = x - x.mean(1, keepdim=True)
    root = newton_schulz_sqrt(centred.transpose(1, 2) @ centred / x.shape[1], num_iters)
    rows, columns = torch.triu_indices(x.shape[2], x.shape[2], device=x.device)
    return root[:, rows, columns]


def newton_schulz_sqrt(sigma: Tensor, num_iters: int = 3) -> Tensor:
    """Square roots of [b, d, d] by the coupled iteration, without the products that do not reach the result."""
    width = sigma.shape[-1]
    eye = torch.eye(width, device=sigma.device, dtype=sigma.dtype)
    trace = _trace(sigma)
    y, z = sigma / trace, eye.expand_as(sigma)
    for i in range(num_iters):
        t = 1.5 * eye - 0.5 * (z @ y if i else y)
        y = y @ t
        if i < num_iters - 1:
            z = t @ z if i else t
    return trace.sqrt() * y


class ISqrtCov(torch.autograd.Function):
    """`newton_schulz_sqrt`, for two or more iterations, with the backward pass of iSQRT-COV's authors.

    It uses the stored iterates. With T = 3I − YZ at each step, ∂Y ← ½(∂Y·T − Z·∂Z·Z − Z·Y·∂Y) and
    ∂Z ← ½(T·∂Z − Y·∂Y·Y − ∂Z·Z·Y). The normalisation by the trace is differentiated last (Li et al. 2018, eq. 8–11).
    """

    @staticmethod
    def forward(ctx, sigma: Tensor, num_iters: int) -> Tensor:
        """Computes the roots and stores every iterate."""
        trace = _trace(sigma)
        a = sigma / trace
        thrice = 3 * torch.eye(sigma.shape[-1], device=sigma.device, dtype=sigma.dtype)
        t = 0.5 * (thrice - a)
        iterates = [(a @ t, t)]
        for _ in range(num_iters - 2):
            y, z = iterates[-1]
            t = 0.5 * (thrice - z @ y)
            iterates.append((y @ t, t @ z))
        y, z = iterates[-1]
        last = 0.5 * (y @ (thrice - z @ y))
        ctx.save_for_backward(sigma, trace, a, thrice, last, *(matrix for pair in iterates for matrix in pair))
        return trace.sqrt() * last

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        """Computes the gradient from the stored iterates."""
        sigma, trace, a, thrice, last, *matrices = ctx.saved_tensors
        *iterates, (y, z) = zip(matrices[::2], matrices[1::2], strict=True)
        dy = trace.sqrt() * gradient
        dy, dz = 0.5 * (dy @ (thrice - y @ z) - z @ y @ dy), -0.5 * (y @ dy @ y)
        for y, z in reversed(iterates):
            t, zy = thrice - y @ z, z @ y
            dy, dz = 0.5 * (dy @ t - z @ dz @ z - zy @ dy), 0.5 * (t @ dz - y @ dy @ y - dz @ zy)
        da = 0.5 * (dy @ (thrice - a) - a @ dy - dz)
        through_trace = (gradient * last).sum((1, 2), keepdim=True) / (2 * trace.sqrt())
        through_a = (da * sigma).sum((1, 2), keepdim=True) / trace**2
        return da / trace + (through_trace - through_a) * thrice / 3, None


def _trace(sigma: Tensor) -> Tensor:
    return sigma.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]


def synchronize(device: str) -> None:
    """Waits until the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1, bias: bool = False) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, (size - 1) // 2, bias=bias)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """Basic residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = _convolution(inputs, outputs, 3, stride)
        self.second = _convolution(outputs, outputs, 3)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[b, inputs, h, w] → [b, outputs, h/stride, w/stride]."""
        return functional.relu(self.shortcut(x) + self.second(functional.relu(self.first(x))))


def resnet18() -> nn.Sequential:
    """The narrow ResNet-18 with a 16×16 map of 64×64 images."""
    layers: list[nn.Module] = [_convolution(3, 16, 3, bias=True), nn.ReLU()]
    width = 16
    for outputs, stride in ((16, 1), (32, 2), (64, 2), (128, 1)):
        layers += [Block(width, outputs, stride), Block(outputs, outputs, 1)]
        width = outputs
    return nn.Sequential(*layers)


class Head(nn.Module):
    """GM-SOP head: gate, candidates, batch norm, dropout, classifier."""

    def __init__(self, num_candidates: int = 16, num_selected: int = 8, num_classes: int = 1000):
        super().__init__()
        self.num_selected = num_selected
        trunk = [_convolution(128, 256, 1), nn.ReLU(), _convolution(256, 128, 1), nn.ReLU()]
        self.trunk = nn.Sequential(*trunk)
        dimension = 128 * 129 // 2
        # not constant, because equal logits would make all images select the same candidates and change the timing
        self.kernel = nn.Parameter(1 / dimension + 1e-3 * torch.randn(dimension, num_candidates))
        self.noise_kernel = nn.Parameter(torch.full((dimension, num_candidates), 1 / dimension))
        self.candidates = nn.ModuleList(
            nn.Sequential(nn.Conv2d(128, 256, 1, bias=False), nn.ReLU(), nn.Conv2d(256, 128, 1, bias=False), nn.ReLU())
            for _ in range(num_candidates)
        )
        self.bn, self.dropout = nn.BatchNorm1d(dimension), nn.Dropout(0.2)
        self.classifier = nn.Linear(dimension, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[b, 128, h, w] → (logits, balance loss)."""
        features = _pool(self.trunk(x))
        noise = torch.randn(len(x), 1, device=x.device)
        logits = features @ self.kernel + noise * functional.softplus(features @ self.noise_kernel)
        values, indices = logits.topk(self.num_selected, 1)
        weights = torch.zeros_like(logits).scatter(1, indices, values.softmax(1))
        fused = torch.zeros(len(x), features.shape[1], device=x.device)
        for i, candidate in enumerate(self.candidates):
            chosen = (indices == i).any(1).nonzero()[:, 0]
            if len(chosen):
                pooled = _pool(candidate(x.index_select(0, chosen)))
                fused = fused.index_add(0, chosen, weights[chosen, i : i + 1] * pooled)
        usage = weights.sum(0)
        return self.classifier(self.dropout(self.bn(fused))), (usage.std() / usage.mean()) ** 2


def _pool(x: Tensor) -> Tensor:
    return second_order_pool(x.flatten(2).transpose(1, 2))


class Trainer:
    """Network, optimiser and a training step on one batch. `backend` is that of torch.compile; "" means eager."""

    def __init__(self, num_candidates: int, device: str, backend: str = ""):
        self.device = device
        model = nn.Sequential(resnet18(), Head(num_candidates)).to(device)
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.model = torch.compile(model, backend=backend) if backend else model
        self.optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One step on mean-subtracted images [b, 3, h, w] and labels [b]."""
        self.optimizer.zero_grad(set_to_none=True)
        logits, balance = self.model(images / 60)
        loss = functional.cross_entropy(logits, labels) + 100 / len(labels) * balance
        loss.backward()
        self.optimizer.step()
