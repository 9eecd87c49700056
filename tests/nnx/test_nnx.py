"""The NNX heads equal the Linen heads, and work with NNX's own tools."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from gmsop_jax import models
from gmsop_jax import nnx as heads

KEY = jax.random.key(0)
RNGS = {"gating": KEY, "dropout": KEY}
BANK: dict[str, Any] = {"num_candidates": 4, "candidate_widths": (7, 3), "dropout_rate": 0.0}
GATED: dict[str, Any] = {**BANK, "num_selected": 2, "gate_widths": (5, 4), "gate_init": "random"}
NORM = functools.partial(models.BatchNorm, running_rate=0.5, epsilon=1e-3)
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "gap": ("GAPHead", {"projection_widths": (4,), "projection_batch_norm": True, "norm": NORM}),
    "sop": ("CovarianceHead", {}),
    "srsop": ("SecondOrderHead", {"projection_widths": (5, 4), "projection_batch_norm": True, "num_iters": 2}),
    "mpncov": ("MPNCOVHead", {"power": 0.4}),
    "sot": ("CrossCovarianceHead", {"num_heads": 2, "head_width": 3, "power": 0.4}),
    "dropcov": ("DropCovHead", {}),  # of these positively correlated channels none is dropped
    "avesop": ("MixtureHead", BANK),
    "concatgap": ("MixtureHead", {**BANK, "order": 1, "combine": "concatenate"}),
    "gmsop": ("GatedMixtureHead", GATED),
    "gmgap": ("GatedMixtureHead", {**GATED, "order": 1, "norm": NORM, "gate_noise": "candidate"}),
    "vmoe": ("GatedMixtureHead", {**GATED, "gate_noise": "fixed", "gate_softmax": "all", "balance_on": "softmax"}),
}
every_head = pytest.mark.parametrize("name", HEADS)


def maps(*lead: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).gamma(2.0, size=(*lead, 3, 3, 4, 6)).astype(np.float32))


def both(name: str, dtype: Any = np.float32) -> tuple[Any, Any, Any]:
    """A Linen head, its variables, and the NNX head made from them."""
    cls, fields = HEADS[name]
    linen = getattr(models, cls)(5, **fields)
    variables = linen.init(KEY, maps())
    stats = jax.tree.map(lambda leaf: leaf + 0.5, variables.get("batch_stats", {}))  # unlike initial ones
    variables = {**variables, **({"batch_stats": stats} if stats else {})}
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    return linen, variables, heads.from_linen(linen, variables)


def create(name: str, rngs: nnx.Rngs, **changes: Any) -> Any:
    cls, fields = HEADS[name]
    return getattr(heads, cls)(6, 5, rngs=rngs, **{**fields, **changes})


def noise_of(linen: Any) -> jax.Array | None:
    if not isinstance(linen, models.GatedMixtureHead):
        return None
    shape = (3,) if linen.gate_noise == "image" else (3, 4)
    return jnp.asarray(np.random.default_rng(1).normal(size=shape).astype(np.float32))


def assert_equal(a, b, rtol=1e-5):
    a, b = dict(jax.tree_util.tree_leaves_with_path(a)), dict(jax.tree_util.tree_leaves_with_path(b))
    assert set(a) == set(b)
    for path in a:
        np.testing.assert_allclose(a[path], b[path], rtol=rtol, atol=1e-6, err_msg=jax.tree_util.keystr(path))


# ---- equality with Linen


@pytest.mark.parametrize(("name", "masked"), [*((name, True) for name in HEADS), ("srsop", False), ("gmsop", False)])
def test_outputs_gradients_and_batch_statistics_equal_linens(x64, name, masked):
    """In double precision, because the two programs round differently, which shows in gradients that are 0."""
    linen, variables, module = both(name, np.float64)
    x, where, noise = maps().reshape(3, 12, 6).astype(np.float64), None, noise_of(linen)  # tokens
    if masked:
        where = jnp.arange(12) < jnp.array([[12], [7], [9]])
        x = jnp.where(where[..., None], x, jnp.nan)

    def linen_loss(params, x):
        (logits, aux), updates = linen.apply(
            {**variables, "params": params},
            x,
            True,
            noise,
            where,
            rngs={"gating": KEY, "dropout": KEY},
            mutable=["batch_stats"],
        )
        return jnp.sum(logits**2) + aux["balance_loss"], (logits, aux, updates)

    def nnx_loss(module, x):
        logits, aux = module(x, True, noise, where)
        return jnp.sum(logits**2) + aux["balance_loss"], (logits, aux)

    (_, expected), slopes = jax.jit(jax.value_and_grad(linen_loss, (0, 1), has_aux=True))(variables["params"], x)
    (_, got), (gradients, dx) = nnx.jit(nnx.value_and_grad(nnx_loss, argnums=(0, 1), has_aux=True))(module, x)
    assert_equal(got, expected[:2])
    assert_equal((nnx.to_pure_dict(gradients), dx), slopes, rtol=1e-4)
    _, after = heads.to_linen(module)
    assert_equal(after.get("batch_stats", {}), expected[2].get("batch_stats", {}))
    assert_equal(after["params"], variables["params"])


@every_head
def test_conversion_there_and_back_is_exact(name):
    linen, variables, module = both(name)
    back, same = heads.to_linen(module)
    assert back == linen
    assert jax.tree.structure(same) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, same, variables)
    assert module.in_features == 6
    evaluated = jax.jit(lambda x: (module(x), linen.apply(variables, x)))(maps())
    assert_equal(*evaluated)


@every_head
def test_a_new_head_has_the_parameters_of_a_new_linen_head(name):
    linen, variables, _ = both(name)
    new, parameters = heads.to_linen(create(name, nnx.Rngs(1)))
    assert new == linen
    assert jax.tree.map(jnp.shape, parameters) == jax.tree.map(jnp.shape, variables)
    for leaf in jax.tree.leaves(parameters["params"]):
        assert leaf.ndim == 1 or jnp.std(leaf) > 0  # kernels are drawn


def test_queries_and_keys_follow_the_projection():
    head = heads.CrossCovarianceHead(6, 5, num_heads=2, head_width=3, projection_widths=(4,), rngs=nnx.Rngs(0))
    assert head.queries_keys.kernel.shape == (4, 12)
    assert heads.from_linen(*heads.to_linen(head)).in_features == 6


def test_a_wide_initial_kernel_has_he_variance():
    head = heads.GatedMixtureHead(200, 300, num_candidates=3, candidate_widths=(150, 20), rngs=nnx.Rngs(0))
    params = heads.to_linen(head)[1]["params"]
    kernels = (params["mixture"]["candidates1"], 200), (params["classifier"]["kernel"], 210)
    for kernel, fan_in in (*kernels, (params["mixture"]["gate"]["conv1"]["kernel"], 200)):
        np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / fan_in), rtol=0.03)
    np.testing.assert_allclose(params["mixture"]["gate"]["kernel"], 1 / (128 * 129 // 2))  # constant by default


def test_float64_and_numpy_variables(x64):
    linen, variables, _ = both("srsop")
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    x = np.asarray(maps(), np.float64)
    logits, _ = heads.from_linen(linen, variables)(x)
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, linen.apply(variables, x)[0], rtol=1e-12)


def test_variables_that_do_not_fit_are_refused():
    linen, variables, _ = both("srsop")
    with pytest.raises(ValueError, match=r"missing \['projection1_bn/mean', .*unexpected \[\]"):
        heads.from_linen(linen, {"params": variables["params"]})
    with pytest.raises(ValueError, match="collections params and, for batch norm, batch_stats; got"):
        heads.from_linen(linen, variables["params"])
    with pytest.raises(ValueError, match=r"params do not fit SecondOrderHead: classifier/bias must have shape \(3,\)"):
        heads.from_linen(linen.clone(num_classes=3), variables)
    with pytest.raises(TypeError, match=r"heads of gmsop_jax.models .*, got ResNet"):
        heads.from_linen(models.ResNet(), variables)
    with pytest.raises(TypeError, match=r"heads of gmsop_jax.nnx, got Linear"):
        heads.to_linen(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))  # type: ignore[arg-type]


def test_other_batch_norms_and_wrong_fields_are_refused():
    import flax.linen as nn

    with pytest.raises(ValueError, match=r"norm=gmsop_jax.models.BatchNorm or .* norm creates a LayerNorm"):
        create("srsop", nnx.Rngs(0), norm=nn.LayerNorm)
    with pytest.raises(ValueError, match="num_iters must be an int of at least 1, got 0"):
        create("srsop", nnx.Rngs(0), num_iters=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'iterations'"):
        create("srsop", nnx.Rngs(0), iterations=5)
    for width in (0, "6"):
        with pytest.raises(ValueError, match=rf"in_features must be an int of at least 1, got {width!r}"):
            heads.GAPHead(width, 5, rngs=nnx.Rngs(0))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"rngs must be an nnx\.Rngs, such as nnx\.Rngs\(0\), got int"):
        heads.GAPHead(6, 5, rngs=0)  # type: ignore[arg-type]


@every_head
def test_a_missing_argument_names_the_head(name):
    head: Any = getattr(heads, HEADS[name][0])
    with pytest.raises(TypeError, match=rf"^{head.__name__}\.__init__\(\) missing .* keyword-only argument: 'rngs'$"):
        head(6, 5)
    with pytest.raises(TypeError, match=rf"^{head.__name__}\.__init__\(\) missing .* argument: 'num_classes'$"):
        head(6, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["srsop", "avesop", "gmsop"])
def test_features_of_another_width_are_refused(name):
    with pytest.raises(ValueError, match=r"must have in_features=6 channels, got shape \(3, 7, 5\)"):
        create(name, nnx.Rngs(0))(jnp.ones((3, 7, 5)))


def test_the_signature_of_a_head_has_its_fields():
    parameters = inspect.signature(heads.SecondOrderHead).parameters
    assert list(parameters)[:4] == ["in_features", "num_classes", "rngs", "projection_widths"]
    assert parameters["num_iters"].default == 3
    assert not {"parent", "name", "fields"} & set(parameters)
    assert "dispatch" in inspect.signature(heads.GatedMixtureHead).parameters
    assert "where" in inspect.signature(create("gap", nnx.Rngs(0))).parameters  # of a call

    class Own(heads.GAPHead):
        def __init__(self, rngs: nnx.Rngs):
            super().__init__(6, 5, rngs=rngs)

    assert "num_iters" not in inspect.signature(Own).parameters


# ---- modes and random draws


def test_train_and_eval_switch_the_mode_and_the_argument_overrides_it():
    head = create("gmsop", nnx.Rngs(0), dropout_rate=0.5)
    x = maps()
    evaluated = head(x)[0]
    np.testing.assert_array_equal(head(x)[0], evaluated)  # evaluation by default
    head.train()
    assert (head(x)[0] != head(x)[0]).any()  # noise and dropout
    head.eval()
    trained = head(x)[0]
    assert (trained != evaluated).any()  # training moved the statistics
    assert (head(x, train=True)[0] != trained).any()


def test_a_view_has_its_own_mode_and_the_same_variables():
    head = create("srsop", nnx.Rngs(0))
    x = maps()
    evaluated = head(x)[0]
    view = nnx.view(head, deterministic=False)
    np.testing.assert_array_equal(head(x)[0], evaluated)
    assert (view(x)[0] != evaluated).any()  # by the moments of the batch
    assert (head(x)[0] != evaluated).any()  # the view has updated the running ones
    np.testing.assert_array_equal(nnx.view(view, deterministic=True)(x)[0], head(x)[0])


def test_layers_outside_a_head_follow_the_mode():
    x = maps().reshape(3, 12, 6)
    norm = heads.BatchNorm(6, rngs=nnx.Rngs(0))
    gate = heads.Gate(6, num_candidates=4, num_selected=2, gate_widths=(5,), rngs=nnx.Rngs(0))
    mixture = heads.GatedMixture(6, num_candidates=4, num_selected=2, candidate_widths=(3,), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(norm(x), x)
    assert (gate(x).weights == gate(x).weights).all()
    for layer in (norm, gate, mixture):
        layer.train()
    np.testing.assert_allclose(jnp.mean(norm(x), (0, 1)), 0, atol=1e-5)
    assert (gate(x).weights != gate(x).weights).any()  # drawn anew
    assert (mixture(x)[1]["gate_weights"] != mixture(x)[1]["gate_weights"]).any()


def test_draws_depend_on_the_seed_of_their_stream():
    x = maps()

    def run(**streams):
        head = create("gmsop", nnx.Rngs(params=0, **streams), dropout_rate=0.5)
        logits, aux = head(x, train=True)
        return np.asarray(logits), np.asarray(aux["gate_weights"])

    first, same, gating, dropout = (run(gating=g, dropout=d) for g, d in ((1, 1), (1, 1), (2, 1), (1, 2)))
    np.testing.assert_array_equal(first[0], same[0])
    assert (first[1] != gating[1]).any()
    np.testing.assert_array_equal(first[1], dropout[1])
    assert (first[0] != dropout[0]).any()


def test_dropout_drops_with_its_rate():
    dropout = heads.MixtureHead(6, 5, candidate_widths=(3,), dropout_rate=0.25, rngs=nnx.Rngs(0)).dropout
    y = dropout(jnp.ones((200, 500)), True)
    np.testing.assert_allclose(np.unique(y), [0, 4 / 3])
    assert abs(jnp.mean(y == 0) - 0.25) < 0.01
    np.testing.assert_array_equal(dropout(jnp.ones((2, 5))), np.ones((2, 5)))


def test_dropcov_drops_channels_in_training_alone():
    head = create("dropcov", nnx.Rngs(0))
    x = jax.random.normal(KEY, (3, 20, 3))
    x = jnp.concatenate([x, -x], axis=-1)  # the rows of the covariances sum to 0, and so does the similarity
    run = nnx.jit(lambda head, x, train: head(x, train)[1]["features"], static_argnames="train")
    assert (run(head, x, train=True) == 0).any()
    assert (run(head, x, train=False) != 0).all()


# ---- NNX's own tools


@pytest.mark.parametrize("name", ["mpncov", "gmsop"])
def test_split_and_merge(name):
    head = create(name, nnx.Rngs(0))
    graph, state = nnx.split(head)
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    assert_equal(run(state, maps()), nnx.jit(lambda head, x: head(x))(head, maps()))


@pytest.mark.parametrize("name", ["srsop", "gmsop"])
def test_shapes_without_arrays_and_recomputed_activations(name):
    head = create(name, nnx.Rngs(0))
    abstract = nnx.eval_shape(lambda: create(name, nnx.Rngs(0)))
    assert jax.tree.map(jnp.shape, nnx.state(abstract)) == jax.tree.map(jnp.shape, nnx.state(head))

    def loss(head, x, call):
        return jnp.sum(call(head, x)[0] ** 2)

    def gradients(call):
        return nnx.to_pure_dict(nnx.jit(nnx.grad(functools.partial(loss, call=call)))(head, maps()))

    assert_equal(gradients(nnx.remat(lambda head, x: head(x))), gradients(lambda head, x: head(x)), rtol=1e-4)


@pytest.mark.parametrize("name", ["gap", "gmsop"])
def test_vmap_over_heads(name):
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def create_heads(rngs):
        return create(name, rngs, **({"dropout_rate": 0.5} if "dropout_rate" in HEADS[name][1] else {}))

    both_heads = create_heads(nnx.Rngs(0))
    graph, state = nnx.split(both_heads)
    one = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[1], state))
    logits, _ = nnx.jit(nnx.vmap(lambda head, x: head(x, train=True), in_axes=(0, 0)))(both_heads, maps(2))
    expected, _ = nnx.jit(lambda head, x: head(x, train=True))(one, maps(2)[1])
    np.testing.assert_allclose(logits[1], expected, rtol=1e-3, atol=1e-5)


def train(head: Any, steps: int) -> list[float]:
    optimizer = nnx.Optimizer(head, optax.adam(3e-2), wrt=nnx.Param)
    labels = jnp.arange(3)

    @nnx.jit
    def step(head, optimizer):
        def loss(head):
            logits, aux = head(maps(), train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean() + aux["balance_loss"]

        value, gradients = nnx.value_and_grad(loss)(head)
        optimizer.update(head, gradients)
        return value

    return [float(step(head, optimizer)) for _ in range(steps)]


@pytest.mark.parametrize("name", ["srsop", "gmsop"])
def test_an_optimizer_lowers_the_loss(name):
    losses = train(create(name, nnx.Rngs(0)), 40)
    assert losses[-1] < 0.5 * losses[0]


def test_checkpoints_hold_parameters_statistics_and_streams(tmp_path):
    head = create("gmsop", nnx.Rngs(0), dropout_rate=0.5)
    train(head, 2)
    _, keys, state = nnx.split(head, nnx.RngKey, ...)
    keys = jax.tree.map(jax.random.key_data, keys)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "head", {"keys": nnx.to_pure_dict(keys), "state": nnx.to_pure_dict(state)})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "head")
    other = create("gmsop", nnx.Rngs(7), dropout_rate=0.5)
    graph, keys, state = nnx.split(other, nnx.RngKey, ...)
    nnx.replace_by_pure_dict(keys, jax.tree.map(jax.random.wrap_key_data, restored["keys"]))
    nnx.replace_by_pure_dict(state, restored["state"])
    run = nnx.jit(lambda head, x: head(x, train=True))
    assert_equal(run(nnx.merge(graph, keys, state), maps()), run(head, maps()))  # draws included
