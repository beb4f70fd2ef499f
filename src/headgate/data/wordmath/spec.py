"""What a problem is made of: a template with numbers, a chain of operations and several wordings.

A problem is a pure function of (family, template, numbers, wording). Its *structure* is everything but the
wording, so names, objects and phrasing can change while the structure, and with it the split, stays.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from headgate.ops.randomness import derive_seed

from .words import NAMES

LARGEST = 100  # no intermediate or final value of a problem exceeds this: a small model can learn the sums
OPERATIONS = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}


@dataclass(frozen=True)
class Step:
    """One calculation ``result = left op right`` and the sentence of the worked solution that states it."""

    result: str
    left: str
    operator: str
    right: str
    sentence: str

    @classmethod
    def parse(cls, calculation: str, sentence: str) -> Step:
        result, expression = calculation.split("=")
        operator = next(symbol for symbol in OPERATIONS if symbol in expression)
        left, right = expression.split(operator)
        return cls(result, left, operator, right, sentence)

    def value(self, values: Mapping[str, int]) -> int | None:
        """The result, or None where it is no integer in 1..LARGEST."""
        left, right = (values[x] if x in values else int(x) for x in (self.left, self.right))
        if self.operator == "/":
            if right == 0 or left % right:
                return None
            result = left // right
        else:
            result = {"+": left + right, "-": left - right, "*": left * right}[self.operator]
        return result if 1 <= result <= LARGEST else None

    def annotation(self, values: Mapping[str, int]) -> str:
        left, right = (values.get(x, x) for x in (self.left, self.right))
        return f"<<{left}{self.operator}{right}={values[self.result]}>>{values[self.result]}"


@dataclass(frozen=True)
class Template:
    """One chain of operations told in several wordings."""

    name: str
    numbers: Mapping[str, range]
    steps: Sequence[Step]
    questions: Sequence[str]

    @property
    def difficulty(self) -> int:
        return len(self.steps)

    @property
    def operations(self) -> list[str]:
        return [OPERATIONS[step.operator] for step in self.steps]

    def solve(self, numbers: Sequence[int]) -> dict[str, int] | None:
        """Every value of the problem by variable name, or None where the numbers do not fit."""
        values: dict[str, int] = {}
        for (variable, allowed), number in zip(self.numbers.items(), numbers):
            if number not in allowed:
                return None
            values[variable] = number
        for step in self.steps:
            value = step.value(values)
            if value is None:
                return None
            values[step.result] = value
        return values

    def draw(self, rng: random.Random) -> tuple[int, ...]:
        """Numbers that solve; uniform over those that do."""
        while True:
            numbers = tuple(rng.choice(allowed) for allowed in self.numbers.values())
            if self.solve(numbers) is not None:
                return numbers

    def space(self) -> Iterator[tuple[int, ...]]:
        """Every combination of numbers that solves: the template's distinct structures."""
        for numbers in itertools.product(*self.numbers.values()):
            if self.solve(numbers) is not None:
                yield numbers


@dataclass(frozen=True)
class Family:
    """A skill: a vocabulary and the templates told in it."""

    name: str
    items: Sequence[tuple[str, str]]  # singular, plural
    places: Sequence[str]
    templates: Sequence[Template]
    by_name: Mapping[str, Template] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {template.name: template for template in self.templates})

    def structure(self, template: Template, numbers: Sequence[int]) -> str:
        text = f"{self.name}/{template.name}/{'-'.join(map(str, numbers))}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def tell(self, template: Template, numbers: Sequence[int], wording: int) -> dict[str, object]:
        """The row of one problem in one wording."""
        values = template.solve(numbers)
        assert values is not None, f"{self.name}/{template.name} does not solve for {numbers}"
        rng = random.Random(derive_seed("wordmath wording", self.name, template.name, wording))
        words = draw_words(rng, self)
        question = rng.choice(template.questions).format(**words, **values)
        known = {name: str(values[name]) for name in template.numbers}
        lines = []
        for step in template.steps:
            known[step.result] = step.annotation(values)
            lines.append(step.sentence.format(**words, **known))
            known[step.result] = str(values[step.result])
        final = values[template.steps[-1].result]
        return {
            "question": question,
            "answer": "\n".join([*lines, f"#### {final}"]),
            "family": self.name,
            "difficulty": template.difficulty,
            "operations": template.operations,
            "structure": self.structure(template, numbers),
            "example_id": f"{self.name}.{template.name}.{'-'.join(map(str, numbers))}.{wording}",
        }


def draw_words(rng: random.Random, family: Family) -> dict[str, str]:
    """Names, pronouns, things and a place for one telling."""
    (name, he), (friend, _) = rng.sample(NAMES, 2)
    (item, items), (other, others) = rng.sample(list(family.items), 2)
    return {
        "name": name, "friend": friend, "he": he, "He": he.capitalize(), "his": (his := "his" if he == "he" else "her"), "His": his.capitalize(),
        "item": item, "items": items, "other": other, "others": others, "place": rng.choice(list(family.places)),
    }  # fmt: skip


def template(name: str, numbers: str, steps: Sequence[tuple[str, str]], *questions: str) -> Template:
    """Compact notation: ``"a:2-9 b:10-40"`` for the ranges and ``("t=a*b", "sentence with {t}")`` per step."""
    ranges = {}
    for part in numbers.split():
        variable, bounds = part.split(":")
        low, high = bounds.split("-")
        ranges[variable] = range(int(low), int(high) + 1)
    return Template(name, ranges, [Step.parse(*step) for step in steps], questions)
