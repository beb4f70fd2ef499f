"""The pretraining families, arithmetic lines and little stories: the language the embedded model learns.

Ten everyday vocabularies share a few plain chains of operations (more, less, groups, equal shares). None of
the target families' problems, questions or worked solutions occurs here. Their *statements* occur, shuffled and
with arbitrary numbers, so that a fine-tune has to learn what to compute and not how to spell; and number puzzles
exercise the operations in sequence, apart from any story.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from .spec import Family, Step, draw_words, template


def _family(name: str, items: str, places: str, get: str, lose: str, box: str) -> Family:
    """The plain chains told with one family's things, places, verbs and containers."""
    boxes = box + ("es" if box[-1] in "xh" else "s")
    templates = [
        template(
            "more", "a:2-80 b:2-80",
            [("t=a+b", "{name} has {t} {items}.")],
            f"{{name}} has {{a}} {{items}}. {{He}} {get} {{b}} more. How many {{items}} does {{he}} have now?",
            f"{{name}} {get} {{a}} {{items}} and then {{b}} {{items}}. How many {{items}} does {{he}} have?",
        ),
        template(
            "less", "a:4-99 b:2-90",
            [("t=a-b", "{name} has {t} {items}.")],
            f"{{name}} has {{a}} {{items}}. {{He}} {lose} {{b}} of them. How many {{items}} does {{he}} have now?",
            f"There are {{a}} {{items}} in the {{place}}. {{name}} {lose} {{b}} {{items}}. How many {{items}} does {{he}} have?",
        ),
        template(
            "times", "a:2-12 b:2-12",
            [("t=a*b", "There are {t} {items}.")],
            f"{{name}} has {{a}} {boxes} with {{b}} {{items}} in each {box}. How many {{items}} are there?",
            f"There are {{b}} {{items}} in each {box}. {{name}} has {{a}} {boxes}. How many {{items}} are there?",
        ),
        template(
            "share", "a:4-100 b:2-12",
            [("t=a/b", "Each {box} has {t} {items}.".replace("{box}", box))],
            f"{{name}} puts {{a}} {{items}} in {{b}} {boxes} so that each has the same. How many {{items}} are in each {box}?",
        ),
        template(
            "more_less", "a:2-80 b:2-70 c:2-90",
            [("t=a+b", "First {name} has {t} {items}."), ("u=t-c", "At the end {he} has {u} {items}.")],
            f"{{name}} has {{a}} {{items}} and {get} {{b}} more. Then {{he}} {lose} {{c}}. How many {{items}} does {{he}} have?",
            f"{{name}} {get} {{b}} {{items}} in the {{place}}. Before that {{he}} had {{a}}. Then {{he}} {lose} {{c}}. How many {{items}} are left?",
        ),
        template(
            "less_less", "a:10-99 b:2-60 c:2-60",
            [("t=a-b", "First {t} {items} are left."), ("u=t-c", "Then {u} {items} are left.")],
            f"{{name}} has {{a}} {{items}}. {{He}} {lose} {{b}} and {{friend}} takes {{c}}. How many {{items}} are left?",
        ),
        template(
            "times_more", "a:2-12 b:2-12 c:2-80",
            [("t=a*b", "In the {boxes} are {t} {items}.".replace("{boxes}", boxes)), ("u=t+c", "{name} has {u} {items}.")],
            f"{{name}} has {{a}} {boxes} of {{b}} {{items}} and {get} {{c}} more. How many {{items}} does {{he}} have?",
            f"{{name}} has {{c}} {{items}} and {{a}} {boxes} with {{b}} {{items}} each. How many {{items}} does {{he}} have?",
        ),
        template(
            "times_less", "a:2-12 b:2-12 c:2-80",
            [("t=a*b", "In the {boxes} are {t} {items}.".replace("{boxes}", boxes)), ("u=t-c", "{name} has {u} {items} left.")],
            f"{{name}} has {{a}} {boxes} of {{b}} {{items}}. {{He}} {lose} {{c}}. How many {{items}} are left?",
        ),
        template(
            "times_more_less", "a:2-12 b:2-12 c:2-60 d:2-60",
            [("t=a*b", "In the {boxes} are {t} {items}.".replace("{boxes}", boxes)), ("u=t+c", "{name} has {u} {items}."), ("v=u-d", "At the end {he} has {v} {items}.")],
            f"{{name}} has {{a}} {boxes} of {{b}} {{items}} and {get} {{c}} more. Then {{he}} {lose} {{d}}. How many {{items}} does {{he}} have?",
        ),
        template(
            "three_more", "a:2-60 b:2-60 c:2-60",
            [("t=a+b", "{name} and {friend} have {t} {items}."), ("u=t+c", "In all there are {u} {items}.")],
            "{name} has {a} {items}, {friend} has {b} {items} and there are {c} in the {place}. How many {items} are there in all?",
        ),
    ]  # fmt: skip
    pairs = [(word.split("/")[0], word.split("/")[-1]) for word in items.split()]
    return Family(name, pairs, places.split(), templates)


PRETRAINING = {
    family.name: family
    for family in (
        _family("collecting", "sticker/stickers marble/marbles card/cards stamp/stamps coin/coins",
                "drawer room album", "finds", "loses", "album"),
        _family("garden", "flower/flowers tree/trees rose/roses seed/seeds bush/bushes",
                "garden park yard", "plants", "cuts", "bed"),
        _family("library", "book/books map/maps comic/comics letter/letters",
                "library office attic", "borrows", "returns", "row"),
        _family("pets", "cat/cats dog/dogs fish/fish bird/birds rabbit/rabbits",
                "house shop zoo", "gets", "sells", "cage"),
        _family("toys", "block/blocks doll/dolls car/cars robot/robots kite/kites",
                "cellar room corner", "wins", "breaks", "box"),
        _family("party", "balloon/balloons candle/candles cup/cups plate/plates",
                "party hall tent", "brings", "drops", "pack"),
        _family("fruit", "apple/apples pear/pears plum/plums lemon/lemons peach/peaches",
                "orchard village kitchen", "picks", "eats", "basket"),
        _family("sweets", "candy/candies nut/nuts cake/cakes mint/mints",
                "shop cupboard tin", "takes", "gives away", "bag"),
        _family("crafts", "bead/beads crayon/crayons ribbon/ribbons button/buttons",
                "workshop class studio", "makes", "uses", "tray"),
        _family("beach", "shell/shells stone/stones crab/crabs feather/feathers",
                "beach harbor island", "collects", "throws back", "bucket"),
    )
}  # fmt: skip


def arithmetic_line(rng: random.Random) -> str:
    """A few bare calculations, such as ``12+30=42``, one per line."""
    lines = []
    for _ in range(rng.randint(4, 8)):
        symbol = rng.choice("++--*/")
        if symbol == "*":
            a, b = rng.randint(2, 12), rng.randint(2, 12)
            lines.append(f"{a}*{b}={a * b}" if a * b <= 100 else f"{a}+{b}={a + b}")
        elif symbol == "/":
            b = rng.randint(2, 12)
            value = rng.randint(2, 100 // b)
            lines.append(f"{value * b}/{b}={value}")
        else:
            a = rng.randint(1, 98)
            b = rng.randint(1, 100 - a)
            lines.append(f"{a}+{b}={a + b}" if symbol == "+" else f"{a + b}-{a}={b}")
    return "\n".join(f"<<{line}>>{line.split('=')[1]}" for line in lines)


def number_puzzle(rng: random.Random) -> str:
    """One to three operations on a running number, spelled out: the operations apart from any story."""
    while True:
        value = rng.randint(2, 60)
        asked = [rng.choice(("Take {}.", "Start with {}.", "Think of {}.")).format(value)]
        worked: list[str] = []
        for _ in range(rng.randint(1, 3)):
            symbol, number = rng.choice("+-*/r"), rng.randint(2, 12)
            number = number if symbol in "*/" else rng.randint(1, 99)
            left, right = (number, value) if symbol == "r" else (value, number)
            step = Step("t", str(left), "-" if symbol == "r" else symbol, str(right), "")
            result = step.value({})
            if result is None:
                break
            asked.append(rng.choice(_INSTRUCTIONS[symbol]).format(number))
            worked.append(f"{('First', 'Then', 'Now')[len(worked)]} {step.annotation({'t': result})}.")
            value = result
        else:
            question = " ".join([*asked, rng.choice(("What is it?", "What number is it now?"))])
            return question + "\nThe answer is: " + "\n".join([*worked, f"#### {value}"])


_INSTRUCTIONS: dict[str, Sequence[str]] = {
    "+": ("Add {}.", "Make it {} more.", "Count {} more."),
    "-": ("Subtract {}.", "Make it {} less.", "Take away {}."),
    "*": ("Multiply by {}.", "Take it {} times."),
    "/": ("Divide by {}.", "Share it by {}."),
    "r": ("Subtract that from {}.", "How much is missing to {}?"),
}
_FRAMES: Sequence[str] = (
    "{name} and {friend} are at the {place}.", "There is a new {item} at the {place}.", "{He} saw a {item} and {a} {others}.",
    "There were {b} {items} and a {other}.", "{name} asked {friend} for a {item}.", "{friend} has {c} {items} at home.",
    "The {item} was old but the {other} was new.", "Then {name} went home.", "They had a good day at the {place}.",
)  # fmt: skip
_VARIABLES = "abcdtuv"


def statements(family: Family) -> list[str]:
    """The family's sentences that ask nothing, one by one: its language without its problems."""
    found: dict[str, None] = {}
    for told in family.templates:
        for text in (*told.questions, *(step.sentence for step in told.steps)):
            for sentence in re.split(r"(?<=[.?]) ", text):
                if sentence.endswith("."):
                    found[sentence] = None
    return list(found)


def story(rng: random.Random, family: Family, sentences: Sequence[str]) -> str:
    """Three to six unconnected statements with arbitrary numbers: nothing is asked and nothing follows."""
    words = draw_words(rng, family)
    chosen = [
        rng.choice(sentences) if rng.random() < 0.8 else rng.choice(_FRAMES) for _ in range(rng.randint(3, 6))
    ]
    return " ".join(s.format(**words, **{x: rng.randint(2, 100) for x in _VARIABLES}) for s in chosen)
