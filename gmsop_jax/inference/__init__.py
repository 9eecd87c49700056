"""Uses trained networks: prediction and export."""
