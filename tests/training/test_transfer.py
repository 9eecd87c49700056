import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmsop_jax.errors import ConfigError
from gmsop_jax.training.transfer import Source, choose, merge


def network(value: float, classes: int = 2, **head) -> dict:
    def full(*shape):
        return jnp.full(shape, value)

    params = {
        "backbone": {"stem": {"kernel": full(3, 4)}, "norm": {"scale": full(4)}},
        "head": {"classifier": {"kernel": full(4, classes), "bias": full(classes)}, **head},
    }
    return {"params": params, "batch_stats": {"backbone": {"norm": {"mean": full(4)}}}}


def source(variables: dict) -> Source:
    return Source("runs/x", 7, (0.0, 0.0, 0.0), variables)


def test_the_same_network_is_taken_whole():
    taken, line = choose(jax.eval_shape(lambda: network(0.0)), source(network(5.0)))
    assert line == "5 of 5 arrays are copied from runs/x (step 7); new: none"
    jax.tree.map(np.testing.assert_array_equal, merge(network(0.0), taken), network(5.0))


def test_a_layer_is_taken_whole_or_not_at_all():
    # the same classes from other features: the bias would fit
    here = network(0.0, gate={"trunk": {"kernel": jnp.zeros(2)}, "out": {"kernel": jnp.zeros(3)}}, more=jnp.zeros(1))
    here["params"]["head"]["classifier"]["kernel"] = jnp.zeros((9, 2))
    there = network(5.0, gate={"trunk": {"kernel": jnp.ones(2)}}, unused={"kernel": jnp.ones(2)})
    taken, line = choose(here, source(there))
    assert line == "4 of 8 arrays are copied from runs/x (step 7); new: head/classifier, head/gate/out, head/more"
    merged = merge(here, taken)["params"]["head"]
    assert merged["classifier"]["bias"].tolist() == [0, 0]
    assert merged["gate"]["trunk"]["kernel"].tolist() == [1, 1]
    assert "unused" not in merged


def test_a_head_of_which_nothing_fits_is_named_in_one_word():
    assert choose(network(0.0, classes=3), source(network(5.0)))[1].endswith("; new: head")


def test_dtypes_are_the_new_networks():
    here = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), network(0.0))
    merged = merge(here, choose(here, source(network(5.0)))[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}


def test_another_backbone_is_refused():
    there = network(5.0)
    there["params"]["backbone"]["stem"]["kernel"] = jnp.zeros((3, 5))
    with pytest.raises(ConfigError, match=r"params/backbone/stem/kernel is \(3, 5\) there and \(3, 4\) here"):
        choose(network(0.0), source(there))
    there = network(5.0)
    there["params"]["backbone"]["last"] = {"kernel": jnp.zeros(1)}
    with pytest.raises(ConfigError, match=r"params/backbone/last/kernel is \(1,\) there and absent here"):
        choose(network(0.0), source(there))
