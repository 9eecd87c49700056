"""The array type of the arguments of public functions."""

import numpy as np
from jaxtyping import Array

AnyArray = Array | np.ndarray  # arguments may be either; results are always JAX arrays
