"""What a network costs and what it learned: counts, sweeps and reports."""
