"""What runs inside the sandbox, by the standard library alone.

An isolated interpreter executes this folder (``python -I .../jail``), so its files import each other relatively and
nothing else of Headgate: it need not be readable, or importable, from inside.
"""
