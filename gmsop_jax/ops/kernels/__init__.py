"""Kernels for accelerators, in Pallas. None was run or timed on one yet, so none is ever chosen by itself."""

from gmsop_jax.ops.kernels.candidates import second_order_candidates

__all__ = ["second_order_candidates"]
