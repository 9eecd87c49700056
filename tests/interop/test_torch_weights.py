"""PyTorch's ResNets against logits that torchvision computed, and files of weights."""

import argparse
import contextlib
import json
import pathlib
import pickle
import re
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmsop_jax.config import default_config, validate
from gmsop_jax.errors import CheckpointError
from gmsop_jax.interop import torch_weights
from gmsop_jax.interop.layers import triangle_order
from gmsop_jax.interop.torch_weights import MEAN_RGB, from_torch, read_state
from gmsop_jax.models import create_model


@pytest.fixture(scope="module")
def names_and_shapes(maker):
    """A function from a network's name to arrays of torchvision's names and shapes, all 0, in no memory."""

    def zeros(network):
        return {n: np.broadcast_to(np.float32(0), shape) for n, shape in maker.names_and_shapes(network).items()}

    return zeros


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.mark.parametrize("network", ["resnet34", "resnet50", "resnext50_32x4d", "isqrt_resnet50", "dropcov_resnet34"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float64", 1e-13)])
def test_logits_are_torchvisions(maker, network, dtype, tolerance):
    """Padding included: a border of pixels that are 0 before the mean is subtracted would show."""
    state, expected = maker.load(network)
    with jax.enable_x64(dtype == "float64"):
        config, variables = from_torch({name: array.astype(dtype) for name, array in state.items()})
        images = jnp.asarray(maker.images(), dtype) - jnp.asarray(MEAN_RGB, dtype)
        logits, _ = jax.jit(create_model(config).apply)(variables, images)
        assert logits.dtype == dtype
    np.testing.assert_allclose(logits, expected[dtype], rtol=0, atol=tolerance * np.abs(expected[dtype]).max())


def test_the_example_of_the_docstring_runs(names_and_shapes):
    assert torch_weights.__doc__
    example = re.findall(r"^    (\S.*)$", torch_weights.__doc__, re.MULTILINE)
    assert len(example) == 2, torch_weights.__doc__
    names: dict = {"from_torch": from_torch, "create_model": create_model, "images": jnp.zeros((1, 64, 64, 3))}
    names["read_state"] = lambda file: names_and_shapes(file.removesuffix(".safetensors"))
    exec("\n".join(example), names)
    assert names["logits"].shape == (1, 10)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet50", "isqrt_resnet50", "dropcov_resnet34"])
def test_the_stored_logits_are_what_torchvision_computes(maker, network):
    pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    net = maker.build(network)
    assert maker.names_and_shapes(network) == {n: tuple(x.shape) for n, x in net.state_dict().items() if x.ndim}
    expected = maker.load(network)[1]["float64"]
    np.testing.assert_allclose(maker.logits(net, "float64"), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("network", "backbone", "head"),
    [
        ("resnet34", "resnet34", "gap"),
        ("resnet50", "resnet50", "gap"),
        ("resnet101", "resnet101", "gap"),
        ("resnext50_32x4d", "resnext50_32x4d", "gap"),
        ("resnext101_64x4d", "resnext101_64x4d", "gap"),
        ("isqrt_resnet50", "resnet50", "srsop"),
        ("isqrt_resnet101", "resnet101", "srsop"),
    ],
)
def test_networks_are_recognised(names_and_shapes, network, backbone, head):
    model, variables = from_torch(names_and_shapes(network))
    assert (model.backbone, model.head, model.num_classes, model.stem) == (backbone, head, 10, "large")
    assert model.stage_strides == ((1, 2, 2, 1) if head == "srsop" else (1, 2, 2, 2))
    assert model.batch_norm_rate == 0.1
    if head == "srsop":
        assert (model.projection_widths, model.projection_batch_norm, model.num_iters) == ((256,), True, 5)
    assert set(variables) == {"params", "batch_stats"}
    config = default_config()
    config.model.update(model)
    validate(config)


@pytest.mark.parametrize("backbone", ["resnet34", "resnet50"])
@pytest.mark.parametrize("width", [256, 128])
def test_networks_of_dropcov_are_recognised(names_and_shapes, backbone, width):
    """As its authors' training script saves them; the published numbers of parameters are those of 128 channels."""
    kernel = np.array([0.5, -1, 2], np.float32)
    state = names_and_shapes(f"dropcov_{backbone}") | {"eca_layer.conv.weight": kernel.reshape(1, 1, 3)}
    features, channels = width * (width + 1) // 2, 512 if backbone == "resnet34" else 2048
    changed = {f"layer_reduce_bn.{name}": (width,) for name in ("weight", "bias", "running_mean", "running_var")}
    changed |= {"layer_reduce.weight": (width, channels, 1, 1), "fc.weight": (10, features)}
    state |= {name: np.broadcast_to(np.float32(0), shape) for name, shape in changed.items()}
    saved = {f"module.{name}": array for name, array in state.items()}
    model, variables = from_torch({"epoch": 100, "arch": f"{backbone}_ACD", "state_dict": saved, "optimizer": {}})
    assert (model.backbone, model.head, model.stage_strides) == (backbone, "dropcov", (1, 2, 2, 1))
    assert (model.projection_widths, model.projection_batch_norm) == ((width,), True)
    np.testing.assert_array_equal(variables["params"]["head"]["attention"], kernel)
    assert variables["params"]["head"]["classifier"]["kernel"].shape == (features, 10)
    config = default_config()
    config.model.update(model)
    validate(config)
    with pytest.raises(CheckpointError, match=r"eca_layer\.conv\.weight.* has shape \(1, 1, 5\)"):
        from_torch(state | {"eca_layer.conv.weight": np.zeros((1, 1, 5), np.float32)})


def test_other_networks_of_basic_blocks_are_refused(names_and_shapes):
    state = {name: array for name, array in names_and_shapes("resnet34").items() if not name.startswith("layer3.5")}
    with pytest.raises(CheckpointError, match="of resnet32, which is not one of resnet34, resnet50, "):
        from_torch(state)


def test_pixels_and_moments_are_folded(names_and_shapes):
    state = names_and_shapes("resnet50")
    kernel = np.random.default_rng(0).normal(size=(64, 3, 7, 7)).astype(np.float32)
    _, variables = from_torch(state | {"conv1.weight": kernel, "bn1.running_var": np.full(64, 4.0, np.float32)})
    stem = variables["params"]["backbone"]["stem"]["kernel"]
    # (x/255 − 0.406)/0.225 of blue, the third channel
    np.testing.assert_allclose(stem[3, 5, 2, 7], kernel[7, 2, 3, 5] / (255 * 0.225), rtol=1e-6)
    assert stem.dtype == np.float32
    np.testing.assert_allclose(variables["batch_stats"]["backbone"]["stem_bn"]["sigma"], np.sqrt(4 + 1e-5), rtol=1e-7)


def test_prefixes_wrappers_and_counters_are_removed(names_and_shapes):
    plain = names_and_shapes("resnet50")
    wrapped = {f"module.{name}": array for name, array in plain.items()}
    wrapped |= {"module.bn1.num_batches_tracked": np.array(7)}
    config, variables = from_torch(plain)
    for state in (wrapped, {"epoch": 3, "state_dict": wrapped}):
        other_config, other = from_torch(state)
        assert other_config.to_dict() == config.to_dict()
        assert flat(other).keys() == flat(variables).keys()


def test_the_caller_states_the_order_of_the_triangle(names_and_shapes):
    state = names_and_shapes("isqrt_resnet50")
    rows = np.random.default_rng(0).normal(size=(10, 32896)).astype(np.float32)
    columns = np.empty_like(rows)
    columns[:, triangle_order(32896)] = rows
    # the matrix's entries (0, 0), (0, 1), (1, 1), (0, 2)
    np.testing.assert_array_equal(columns[0, :4], rows[0, [0, 1, 256, 2]])
    expected = from_torch(state | {"fc.weight": rows})[1]["params"]["head"]["classifier"]["kernel"]
    kernel = from_torch(state | {"fc.weight": columns}, triangle="column")[1]["params"]["head"]["classifier"]["kernel"]
    np.testing.assert_array_equal(kernel, expected)
    with pytest.raises(ValueError, match="'row' or 'column'"):
        from_torch(state, triangle="lower")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer2.0.bn1.bias": None}, r"'layer2\.0\.bn1\.bias' is missing; give the weights of one whole network"),
        (
            {"layer4.2.conv1.weight": None, "fc.bias": None},
            r"arrays 'layer4\.2\.conv1\.weight', 'fc\.bias' are missing",
        ),
        ({"attention.weight": (3,)}, r"'attention\.weight' is not part of this network"),
        ({"layer1.0.conv1.weight": (32, 64, 1, 1)}, r"conv1\.weight' has shape \(32, 64, 1, 1\).*\(64, 64, 1, 1\)$"),
        ({"bn1.weight": (63,), "bn1.bias": (63,)}, r"bn1\.\w+' has shape \(63,\).*\(64,\)"),
        ({"fc.weight": None}, r"'fc\.weight' is missing; give the weights of one whole network"),
        ({"fc.weight": (10, 2048, 1, 1)}, r"'fc\.weight' has shape .* 2 axes"),
        ({"layer1.0.conv3.weight": None}, r"'layer1\.0\.conv3\.weight' is missing"),
        ({"layer1.0.conv2.weight": (128, 128, 3, 3)}, "of resnext50_1x128d, which is not one of resnet34"),
        ({"layer1.0.conv2.weight": (256, 8, 3, 3)}, "of resnext50_32x8d, which is not one of"),
        ({"layer3.35.conv1.weight": (256, 1024, 1, 1)}, "of resnet140, which is not one of"),
    ],
)
def test_what_does_not_fit_is_named(names_and_shapes, changes, message):
    state = dict(names_and_shapes("resnet50"))
    for name, shape in changes.items():
        if shape is None:
            del state[name]
        else:
            state[name] = np.broadcast_to(np.float32(0), shape)
    with pytest.raises(CheckpointError, match=message):
        from_torch(state)


def test_other_networks_and_types_are_refused(names_and_shapes):
    with pytest.raises(CheckpointError, match="not a ResNet's weights"):
        from_torch({"features.0.weight": np.zeros((64, 3, 3, 3))})
    state = names_and_shapes("resnet50")
    with pytest.raises(CheckpointError, match=r"'fc\.bias' is of type int64"):
        from_torch(state | {"fc.bias": np.zeros(10, np.int64)})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fc.bias", np.nan, r"'fc\.bias' has 10 of 10 values that are NaN"),
        ("bn1.running_mean", -np.inf, r"'bn1\.running_mean' has 64 of 64 values that are NaN, infinite"),
        ("fc.bias", 1e39, "too large for float32"),
        ("bn1.running_var", -1e-3, r"'bn1\.running_var' has 64 of 64 variances below 0"),
        ("bn1.running_var", np.nan, r"'bn1\.running_var' .* NaN"),
    ],
)
def test_import_torch_refuses_nan_weights_and_negative_variances(names_and_shapes, name, value, message):
    state = names_and_shapes("resnet50")
    with pytest.raises(CheckpointError, match=message):
        from_torch(state | {name: np.full(state[name].shape, value)})


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "module._orig_mod.", "model.module."])
def test_import_torch_removes_prefixes(names_and_shapes, prefix):
    plain = names_and_shapes("resnet50")
    state = {f"{prefix}{name}": array for name, array in plain.items()} | {"n_averaged": np.array(3)}
    config, variables = from_torch(state)
    assert config.to_dict() == from_torch(plain)[0].to_dict()
    assert flat(variables).keys() == flat(from_torch(plain)[1]).keys()
    with pytest.raises(CheckpointError, match=r"two arrays are named 'fc\.bias' after removing prefixes"):
        from_torch(state | {"fc.bias": plain["fc.bias"]})


def test_import_torch_removes_the_prefix_of_a_compiled_part(names_and_shapes):
    plain = names_and_shapes("resnet50")
    _, variables = from_torch({name.replace("layer2.", "layer2._orig_mod."): array for name, array in plain.items()})
    assert flat(variables).keys() == flat(from_torch(plain)[1]).keys()


def test_safetensors_are_read(tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    arrays = {"a": np.arange(6, dtype=np.float64).reshape(2, 3), "half": np.array([0.1, -2], np.float16)}
    save_file(arrays | {"brain": np.asarray(jnp.array([1.5], jnp.bfloat16))}, tmp_path / "x.safetensors")
    state = read_state(tmp_path / "x.safetensors")
    assert {name: array.dtype.name for name, array in state.items()} == {
        "a": "float64",
        "half": "float32",
        "brain": "float32",
    }
    np.testing.assert_array_equal(state["a"], arrays["a"])
    np.testing.assert_array_equal(state["half"], arrays["half"].astype(np.float32))
    assert state["brain"] == 1.5


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    with pytest.raises(CheckpointError, match=r"none\.pth does not exist or is not a file"):
        read_state(tmp_path / "none.pth")
    for name in ("x.safetensors", "x.pth"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match=r"x\.safetensors can't be read as safetensors"):
        read_state(tmp_path / "x.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        read_state(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"pip install torch, or save .* as \.safetensors"):
        read_state(tmp_path / "x.pth")


def test_files_of_torch_are_read_and_never_executed(tmp_path):
    torch = pytest.importorskip("torch")
    weights = {"a": torch.arange(3.0), "half": torch.tensor([0.5], dtype=torch.bfloat16), "n": torch.tensor(3)}
    torch.save(weights, tmp_path / "plain.pth")
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)  # as until PyTorch 1.5
    torch.save({"epoch": 1, "state_dict": weights}, tmp_path / "wrapped.pt")
    for name in ("plain.pth", "old.pth", "wrapped.pt"):
        state = read_state(tmp_path / name)
        assert {n: array.dtype.name for n, array in state.items()} == {"a": "float32", "half": "float32", "n": "int64"}
        np.testing.assert_array_equal(state["a"], [0, 1, 2])

    class Trap:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "sprung",))

    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"a": Trap()}))
    torch.save({"a": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "damaged.pth").write_bytes((tmp_path / "plain.pth").read_bytes()[:300])
    for name in ("pickle.pth", "trap.pth", "damaged.pth"):
        with pytest.raises(CheckpointError, match=rf"{name} (is damaged|contains an object of type).*state_dict\(\)"):
            read_state(tmp_path / name)
    assert not (tmp_path / "sprung").exists()
    for content, message in (
        ({"a": 3}, "'a' is not an array"),
        ([1], "does not map names to arrays"),
        ({}, "does not map names to arrays"),
    ):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=message):
            read_state(tmp_path / "other.pth")


def test_import_torch_notices_a_flipped_bit(tmp_path):
    """`torch.load` does not compare the CRCs of the zip archive that it reads."""
    file = tmp_path / "x.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data/0", bytes(range(64)))
    content = bytearray(file.read_bytes())
    content[content.index(bytes(range(64))) + 9] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the CRC of x/data/0 is wrong"):
        read_state(file)


def test_import_torch_reads_checkpoints_with_a_namespace(tmp_path):
    torch = pytest.importorskip("torch")
    args = argparse.Namespace(lr=0.1, out=None, nested=argparse.Namespace(a=1))
    torch.save({"model": {"a": torch.ones(2)}, "args": args}, tmp_path / "x.pth")
    np.testing.assert_array_equal(read_state(tmp_path / "x.pth")["a"], [1, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda torch: torch.empty(2, device="meta"), "meta device and has no values"),
        (lambda torch: torch.eye(2).to_sparse(), r"is sparse \(torch\.sparse_coo\); call to_dense"),
        (lambda torch: torch.eye(2).to_sparse_csr(), r"is sparse \(torch\.sparse_csr\)"),
        (lambda torch: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), r"is quantised \(qint8\)"),
        (lambda torch: torch.zeros(1).expand(10**6, 10**6), "repeats its values by a stride of 0"),
        (lambda torch: torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "is of type float4_e2m1fn_x2"),
    ],
    ids=["meta", "sparse", "csr", "quantised", "expanded", "fp4"],
)
@pytest.mark.filterwarnings("ignore:.*")  # PyTorch's, about formats that it will drop
def test_import_torch_names_tensors_that_are_not_dense_arrays(tmp_path, make, message):
    torch = pytest.importorskip("torch")
    torch.save({"a": make(torch)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"x\.pth: 'a' .*{message}"):
        read_state(tmp_path / "x.pth")


def test_import_torch_widens_fp8_and_lazy_views(tmp_path):
    torch = pytest.importorskip("torch")
    x = torch.tensor([0.5, -2.0])
    state = {"e4m3": x.to(torch.float8_e4m3fn), "e5m2": x.to(torch.float8_e5m2), "grad": x.clone().requires_grad_()}
    state["imag"] = torch.complex(-x, -x).conj().imag
    torch.save(state, tmp_path / "x.pth")
    read = read_state(tmp_path / "x.pth")
    assert {array.dtype for array in read.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal([*read.values()], np.tile([0.5, -2], (4, 1)))


def test_import_torch_refuses_fp8_in_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\x38\x38")
    with pytest.raises(CheckpointError, match=r"NumPy lacks the type .*float8_e4m3fn.*; save it as float32"):
        read_state(tmp_path / "x.safetensors")


class _FakeTorch:
    """A PyTorch whose `load` fails as the real one does; also where PyTorch is not installed."""

    serialization = types.SimpleNamespace(safe_globals=lambda allowed: contextlib.nullcontext())

    def __init__(self, message):
        self._message = message

    def load(self, path, *, map_location, weights_only):
        assert weights_only
        raise pickle.UnpicklingError(self._message)


@pytest.mark.parametrize(
    ("detail", "reason"),
    [
        ("WeightsUnpickler error: Unsupported global: GLOBAL models.Net was not an allowed global", "type models.Net"),
        ("WeightsUnpickler error: Unsupported operand 149", "is damaged"),
    ],
)
def test_import_torch_never_passes_on_the_advice_to_execute_code(tmp_path, monkeypatch, detail, reason):
    advice = "Weights only load failed. Re-running with \x1b[1mweights_only=False\x1b[0m will likely succeed."
    monkeypatch.setitem(sys.modules, "torch", _FakeTorch(f"{advice}\n{detail}"))
    (tmp_path / "x.pth").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_state(tmp_path / "x.pth")
    assert "weights_only" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
