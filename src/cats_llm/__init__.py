"""CATS: contextually-aware thresholding for sparsity."""

__version__ = "0.1.0"
