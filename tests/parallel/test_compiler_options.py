import logging

import jax
import pytest

from gmsop_jax.training import parallel


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    parallel.compiler_options.cache_clear()
    yield
    parallel.compiler_options.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """JAX runs on this machine's CPU, whose compiler takes the options of GPUs too."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def passed_options(monkeypatch, compile_step) -> dict:
    """The options with which a step is compiled."""
    seen = []

    def spy(*arguments, compiler_options=None, **options):
        seen.append(compiler_options)
        return jit(*arguments, compiler_options=compiler_options, **options)

    jit = jax.jit
    with monkeypatch.context() as patch:
        patch.setattr(jax, "jit", spy)
        compile_step(parallel.create_mesh())
    return seen[-1]


def compile_train_step(mesh):
    parallel.compile_train_step(lambda state, batch: (state, {}), mesh, "jit")


def compile_eval_step(mesh):
    parallel.compile_eval_step(lambda variables, batch: {}, mesh)


@pytest.mark.parametrize("compile_step", [compile_train_step, compile_eval_step])
def test_steps_on_gpus_are_deterministic(gpu, monkeypatch, compile_step):
    assert passed_options(monkeypatch, compile_step) == {"xla_gpu_deterministic_ops": True}


def test_only_training_steps_take_an_option_on_cpus(monkeypatch):
    assert passed_options(monkeypatch, compile_train_step) == parallel.OPTIONS["cpu"]
    assert passed_options(monkeypatch, compile_eval_step) is None


def test_options_in_the_environment_are_left_alone(gpu, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    assert parallel.compiler_options() == {}


def test_rejected_options_are_reported_once(gpu, monkeypatch, caplog):
    monkeypatch.setitem(parallel.OPTIONS, "gpu", {"xla_no_such_option": True})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert parallel.compiler_options() == {}
    assert caplog.text.count("rejects the options xla_no_such_option, so ") == 1
