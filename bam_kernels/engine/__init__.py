"""Engines: they compute the loss and its gradient from row kernels and matrix products."""
