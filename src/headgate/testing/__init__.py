"""Floor 7: every law that a Method must obey, checked over anybody's.

    from headgate.testing import conform
    conform("my_method", strength=0.1)          # a registered name, or a Method class; raises LawsBroken
    python -m headgate.testing my_method        # the table of laws; exit code 1 where one is broken

A law is a function of a ``Case`` in ``laws``; it raises AssertionError, which says what was and what should have been, or
``NotApplicable`` with the reason. Nothing in a law knows which method it is looking at.
"""

from headgate.testing.conformance import LawResult, LawsBroken, conform, examine

__all__ = ["LawResult", "LawsBroken", "conform", "examine"]
