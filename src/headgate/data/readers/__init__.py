"""Readers: one raw row of a known data set becomes one normalised row."""

from .base import Reader, Row, field
from .catalogue import SOURCES, Source, register_source, source_named

__all__ = ["SOURCES", "Reader", "Row", "Source", "field", "register_source", "source_named"]
