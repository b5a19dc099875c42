"""Pretraining of language models with low-dimensional projected attention (LPA)."""

__version__ = "0.1.0"
