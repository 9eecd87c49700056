import os
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxlib
import jaxtyping
import pytest
from jax.experimental.compilation_cache import compilation_cache

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Without LLVM's optimisations (see `compile_quickly`), XLA's older emitters of fused loops compile a training step in a
# third of the time. jaxlib 0.12 no longer has them, and ends every process that sets the flag.
if jaxlib.version.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}".strip()
# Under nohup or in the background of a script, these signals are ignored, also in the processes that tests start.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores, because many tests wait for processes that they start."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(autouse=True, scope="session")
def compile_quickly() -> None:
    """Tiny networks take longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="session")
def skip_fsync() -> Iterator[None]:
    """Files of tests have to outlive killed processes, but no power failure; waiting for the disk takes minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """For networks that take longer to run than to compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """For a test that passes wrong types or shapes to see the library's own error: annotations are not checked."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where compiled programs are kept for other tests and for the processes that they start."""
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def compile_once(compiled: Path) -> Iterator[None]:
    """Keeps compiled programs, since every start of the trainer compiles the same ones."""
    fields = {
        "jax_compilation_cache_dir": str(compiled),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in fields}
    for name, value in fields.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def environment(compiled: Path) -> dict[str, str]:
    """Environment variables with which a process started by a test does the same as `compile_once`."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])),
    }


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working directory of a small GM-SOP after two epochs on some Fashion-MNIST; not to be written to."""
    from gmsop_jax.config import default_config, validate
    from gmsop_jax.conversion.convert import convert
    from gmsop_jax.training.loop import train_and_evaluate

    folder = tmp_path_factory.mktemp("trained")
    convert("fashion-mnist", None, folder / "data", limit=200, workers=1)
    c = default_config()
    c.data.dir = str(folder / "data")
    c.data.source = "fashion-mnist"
    c.model.blocks_per_stage = 1
    c.model.stage_widths = (8, 12)
    c.model.stage_strides = (2, 2)
    c.model.gate_widths = (6,)
    c.model.candidate_widths = (5,)
    c.model.num_candidates = 4
    c.model.num_selected = 2
    c.train.batch_size = 40
    c.train.learning_rates = ((0.05, 2),)
    c.train.num_epochs = 2
    c.train.log_every_steps = 2
    c.eval.batch_size = 64
    validate(c)
    train_and_evaluate(c, folder / "run", profile=range(3, 5))
    return folder / "run"


@pytest.fixture(scope="session")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded sample, converted to three training shards; tests only read it."""
    from gmsop_jax.conversion.convert import convert

    directory = tmp_path_factory.mktemp("fashion") / "set"
    convert("fashion-mnist", None, directory, shards=3, progress=False)
    return directory
