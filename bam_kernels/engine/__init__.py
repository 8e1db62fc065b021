"""Engines: how the row kernels and the matrix products are put together into the loss."""
