"""Reports of a run: summary in words, curves, pictures, HTML page, TensorBoard and Weights & Biases."""
