"""How a module or a method says in JSON what it is built of, beside its state."""

from __future__ import annotations

from typing import Any

Structure = dict[str, Any]
"""Written by ``structure`` and read by ``restore`` of the same class; nobody else looks inside."""
