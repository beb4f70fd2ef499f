"""How a matrix of penalties becomes one number: its name, which settings share with the equations, without torch."""

from typing import Literal

Reduction = Literal["mean", "frobenius", "sum"]
