"""Rows on demand: any split, any mix of families, with adjustable redundancy."""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterable, Sequence

from headgate.data.readers.base import Row
from headgate.errors import DataError
from headgate.ops.randomness import derive_seed

from .pretraining import PRETRAINING
from .spec import Family, Template
from .targets import TARGETS

FAMILIES: dict[str, Family] = {**TARGETS, **PRETRAINING}
TARGET_FAMILIES: tuple[str, ...] = tuple(TARGETS)
PRETRAINING_FAMILIES: tuple[str, ...] = tuple(PRETRAINING)
SPLITS = ("train", "validation", "test")
_SHARES = {"validation": 10, "test": 20}  # upper percentiles of the structure hash; the rest trains
_WORDINGS = 1 << 16
VERSION = 1
"""Of the problems: raised by whatever changes a row that was generated before."""


def split_of(structure: str) -> str:
    """The only split a structure may appear in: 80% train, 10% validation, 10% test."""
    percentile = int(structure, 16) % 100
    return next((split for split, bound in _SHARES.items() if percentile < bound), "train")


def generate(
    split: str,
    count: int,
    *,
    families: Sequence[str] | None = None,
    difficulty: int | Iterable[int] | None = None,
    redundancy: float = 0.0,
    seed: int = 0,
) -> list[Row]:
    """``count`` rows of ``split``; the target families unless ``families`` names others.

    ``redundancy`` is the share of rows that retell an earlier row: the same structure in other words, or one
    number changed by one. At zero no two rows are equal, and no structure repeats while unseen ones are easily
    found. Raises DataError for unknown families, an empty selection and a space too small for ``count``.
    """
    if split not in SPLITS:
        raise DataError(f"wordmath has no split '{split}': use one of {', '.join(SPLITS)}")
    if not 0.0 <= redundancy < 1.0:
        raise DataError(f"redundancy={redundancy} is no share: use 0 <= redundancy < 1")
    choices = _choices(families, difficulty)
    rng = random.Random(derive_seed("wordmath", split, seed))
    rows: list[Row] = []
    structures: set[str] = set()
    questions: set[str] = set()
    while len(rows) < count:
        if rows and rng.random() < redundancy:
            row = _near_duplicate(rng, rng.choice(rows), split)
        else:
            row = _fresh(rng, choices, split, structures, questions)
        rows.append(row)
        structures.add(row["structure"])
        questions.add(row["question"])
    return rows


def paraphrase(row: Row) -> Row:
    """The same structure in other words; a function of the row, so that repeating it walks through wordings."""
    family, template, numbers, wording = _decode(row["example_id"])
    for attempt in range(1, 100):
        told = family.tell(template, numbers, (wording * 31 + attempt) % _WORDINGS)
        if told["question"] != row["question"]:
            return told
    raise DataError(f"{row['example_id']} has no other wording")


def _choices(
    families: Sequence[str] | None, difficulty: int | Iterable[int] | None
) -> list[list[tuple[Family, Template]]]:
    """Per family the templates to draw from: families weigh the same whatever their number of templates."""
    if isinstance(families, str):
        families = [families]
    names = TARGET_FAMILIES if families is None else tuple(families)
    for name in names:
        if name not in FAMILIES:
            close = difflib.get_close_matches(name, FAMILIES, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"the families are {', '.join(FAMILIES)}"
            raise DataError(f"wordmath has no family '{name}': {hint}")
    levels = (
        {1, 2, 3} if difficulty is None else {difficulty} if isinstance(difficulty, int) else set(difficulty)
    )
    choices = [[(FAMILIES[n], t) for t in FAMILIES[n].templates if t.difficulty in levels] for n in names]
    choices = [choice for choice in choices if choice]
    if not choices:
        raise DataError(
            f"no wordmath problem has difficulty {sorted(levels)} in families {list(names)}: use 1, 2 or 3"
        )
    return choices


def _fresh(
    rng: random.Random,
    choices: list[list[tuple[Family, Template]]],
    split: str,
    structures: set[str],
    questions: set[str],
) -> Row:
    for attempt in range(2000):
        family, template = rng.choice(rng.choice(choices))
        numbers = template.draw(rng)
        structure = family.structure(template, numbers)
        if split_of(structure) != split or (attempt < 20 and structure in structures):
            continue
        row = family.tell(template, numbers, rng.randrange(_WORDINGS))
        if row["question"] not in questions:
            return row
    raise DataError(
        f"wordmath has no further distinct {split} problem after {len(questions)} rows: "
        "ask for fewer rows, more families or a higher difficulty"
    )


def _near_duplicate(rng: random.Random, row: Row, split: str) -> Row:
    family, template, numbers, _ = _decode(row["example_id"])
    if rng.random() < 0.5:
        for _ in range(20):
            position, change = rng.randrange(len(numbers)), rng.choice((-1, 1))
            nudged = tuple(n + change * (i == position) for i, n in enumerate(numbers))
            if template.solve(nudged) is not None and split_of(family.structure(template, nudged)) == split:
                numbers = nudged
                break
    return family.tell(template, numbers, rng.randrange(_WORDINGS))


def _decode(example_id: str) -> tuple[Family, Template, tuple[int, ...], int]:
    family, template, numbers, wording = example_id.split(".")
    return (
        FAMILIES[family],
        FAMILIES[family].by_name[template],
        tuple(int(number) for number in numbers.split("-")),
        int(wording),
    )
