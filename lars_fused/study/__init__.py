"""Instruments for large-batch training, and the experiments behind LARS as programs to run."""
