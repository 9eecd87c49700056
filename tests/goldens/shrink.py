"""Makes this folder from the full set of reference values: python tests/goldens/shrink.py FULL."""

import json
import pathlib
import shutil
import sys

import numpy as np
import scipy.io

HERE = pathlib.Path(__file__).parent
SAMPLES = 512
NETWORK = "r18_gm_sop"
CHECKPOINT = "ckpt/ResNet18-SR-SOP"


def sample(value: np.ndarray, size: int) -> np.ndarray:
    """Part of a tensor of `size` entries: `value` may be all of it or a sample of 2048.

    The full set's samples are entries (i · 2654435761 + 12345) mod size, i = 0, 1, …; these are the
    first of them. Small tensors stay whole.
    """
    if size <= SAMPLES:
        return value
    if value.size < size:
        return value[:SAMPLES]
    return value.ravel()[(np.arange(SAMPLES) * 2654435761 + 12345) % size]


def shrink_layers(full: pathlib.Path) -> None:
    for path in sorted((full / "layers").glob("*.npz")):
        stored = np.load(path)
        keys = stored.files
        if path.stem == "cov_s_16x16_c128":
            continue
        if path.stem == "cov_s_8x8_c128":
            keys = ["x", "dvec", "ns3_out_f64", "ns3_out_f32", "ns3_dx_f64"]
        np.savez_compressed(HERE / "layers" / path.name, **{k: stored[k] for k in keys})


def _per_parameter(key: str) -> bool:
    return key.startswith(("grad/", "drop/grad_s/", "delta1_s/", "delta3_s/", "momentum3_s/"))


def shrink_network(full: pathlib.Path) -> None:
    stored = np.load(full / "nets" / f"{NETWORK}.npz")
    kept = {}
    for key in stored.files:
        value = stored[key]
        size = stored["param/" + key.rpartition("/")[2]].size if _per_parameter(key) else value.size
        if key in ("test/conv5_2", "test/gate_input_f64", "test/fusion_bn_f64"):
            continue
        if _per_parameter(key) or key.endswith(("fusion_f64", "dinput_f64")):
            value = sample(value, size)
        kept[key] = value
    np.savez_compressed(HERE / "nets" / f"{NETWORK}.npz", **kept)


def shrink_checkpoint(full: pathlib.Path) -> None:
    folder = HERE / CHECKPOINT
    shutil.copyfile(full / CHECKPOINT / "net-epoch-5.mat", folder / "net-epoch-5.mat")
    images = scipy.io.loadmat(full / "ckpt/imdb_small.mat")["images"][0, 0]
    validation = images["set"].ravel() == 2
    values = np.load(full / CHECKPOINT / "eval.npz")
    kept = {k: values[k] for k in values.files if k.startswith(("val_logits", "val_loss", "val_top"))}
    kept["images"] = images["data"][..., validation].transpose(3, 0, 1, 2)
    kept["labels_1based"] = images["labels"].ravel()[validation].astype(np.int64)
    np.savez_compressed(folder / "eval.npz", **kept)


def shrink_architectures(full: pathlib.Path) -> None:
    for path in sorted((full / "arch").glob("*-*.json")):
        parts = json.loads(path.read_text())
        kept = {key: parts[key] for key in ("params", "layers")}
        (HERE / "arch" / path.name).write_text(json.dumps(kept, separators=(",", ":")))


def main() -> None:
    full = pathlib.Path(sys.argv[1])
    for folder in ("layers", "nets", "arch", CHECKPOINT):
        (HERE / folder).mkdir(parents=True, exist_ok=True)
    shrink_layers(full)
    shrink_network(full)
    shrink_checkpoint(full)
    shrink_architectures(full)


if __name__ == "__main__":
    main()
