"""The tiny adapted model and trainer factory of the training tests."""

from tests.training.conftest import make_trainer, rows

__all__ = ["make_trainer", "rows"]
