"""The target families: skills that pretraining leaves out and fine-tuning is measured on.

They differ from the pretraining families in vocabulary, in chains of operations (differences that are
multiplied, sums of products, subtraction *from* a third number) and in facts a solver has to know and no
question states: days in a week, a dozen, half, a pair, the legs of a cow.
"""

from __future__ import annotations

from .targets_money import COOKING, SAVINGS, SHOPPING, TRAVEL
from .targets_places import BUILDING, FARM, SCHOOL, SPORTS

TARGETS = {
    family.name: family for family in (SHOPPING, TRAVEL, COOKING, FARM, SAVINGS, SCHOOL, SPORTS, BUILDING)
}
