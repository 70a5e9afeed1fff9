"""gramian: structured matrices and Gram matrices for machine learning."""

__version__ = "0.1.0"
