"""The type of arrays that public functions take."""

import numpy as np
from jaxtyping import Array

AnyArray = Array | np.ndarray  # arguments may be either; results are always JAX arrays
