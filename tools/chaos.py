"""Kills a small training run at random times, resumes it each time, and compares it with an undisturbed run.

python tools/chaos.py --kills 20 --seed 0

Each process is killed with SIGKILL after a random time: while it compiles, trains, evaluates or writes a checkpoint.
The final parameters, batch statistics and optimiser state must be identical, bit for bit. The exit status is 0 if they
are.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gmsop_jax.errors import ArgumentParser, run_command

_OVERRIDES = (
    "data.image_size=12",
    "model.stage_widths=(4, 8)",
    "model.stage_strides=(2, 1)",
    "model.stem_width=4",
    "model.candidate_widths=(6, 4)",
    "model.gate_widths=(6, 4)",
    "model.num_candidates=4",
    "model.num_selected=2",
    "train.learning_rates=((0.02, 4),)",
    "train.num_epochs=4",
    "checkpoint.every_steps=10",
)


def _start(workdir: Path, data: Path, log: Path) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "gmsop_jax.main", "--config", str(root / "configs" / "quickstart.py")]
    command += ["--workdir", str(workdir), f"--config.data.dir={data}", *(f"--config.{o}" for o in _OVERRIDES)]
    environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=root, env=environment, stdout=file, stderr=file)


def _arrays(workdir: Path) -> dict[str, np.ndarray]:
    """All arrays of the last checkpoint, as NumPy arrays."""
    import orbax.checkpoint as ocp
    from jax.tree_util import keystr, tree_leaves_with_path

    step = max((p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    found = {}
    for item in ("params", "batch_stats", "opt_state"):
        tree = ocp.StandardCheckpointer().restore(step / item)
        found |= {f"{item}{keystr(path)}": np.asarray(leaf) for path, leaf in tree_leaves_with_path(tree)}
    return found


def main() -> int:
    """Kills the run repeatedly, compares it with the undisturbed run, and prints a summary as JSON."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times (default: 0)")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    began = time.monotonic()
    _start(folder / "warm", folder / "data", folder / "warm.log").wait()  # converts and compiles
    shutil.rmtree(folder / "warm")
    alone = time.monotonic()
    if _start(folder / "alone", folder / "data", folder / "alone.log").wait():
        print((folder / "alone.log").read_text(), file=sys.stderr)
        return 1
    seconds = time.monotonic() - alone
    kills, steps = 0, []
    while kills < options.kills:
        process = _start(folder / "killed", folder / "data", folder / "killed.log")
        try:
            process.wait(chance.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        if process.wait() == 0:  # the run finished before it was killed: compare it, and start a new one
            if not _check(folder):
                return 1
            shutil.rmtree(folder / "killed")
            continue
        checkpoints = folder / "killed" / "checkpoints"
        found = [int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()] if checkpoints.is_dir() else []
        steps.append(max(found, default=0))
    last = _start(folder / "killed", folder / "data", folder / "killed.log").wait()
    count = _check(folder) if last == 0 else 0
    summary = {"kills": kills, "last_saved_steps": steps, "arrays_compared": count, "same_bits": count > 0}
    print(json.dumps({**summary, "seconds": round(time.monotonic() - began)}))
    if count:
        shutil.rmtree(folder)
    return 0 if count else 1


def _check(folder: Path) -> int:
    """The number of arrays, if all are bitwise equal in both runs; 0 otherwise."""
    alone, killed = _arrays(folder / "alone"), _arrays(folder / "killed")
    same = alone.keys() == killed.keys() and all(x.tobytes() == killed[name].tobytes() for name, x in alone.items())
    if not same:
        print(f"the runs in {folder} differ", file=sys.stderr)
    return len(alone) if same else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
