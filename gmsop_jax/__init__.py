"""Second-order pooling in JAX: covariance pooling, iSQRT-COV and GM-SOP as Flax (Linen) modules."""

__version__ = "0.1.0"
