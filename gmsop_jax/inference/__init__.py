"""Uses trained networks: evaluation, prediction and export."""
