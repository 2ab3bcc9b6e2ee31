"""The tiny experiments of the sweeps' tests."""

from tests.sweep.conftest import tiny

__all__ = ["tiny"]
