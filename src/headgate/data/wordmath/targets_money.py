"""Target families about goods, ways and money: shopping, travel, cooking, savings. See ``targets``."""

from __future__ import annotations

from .spec import Family, template

SHOPPING = Family(
    "shopping",
    [("shirt", "shirts"), ("hat", "hats"), ("lamp", "lamps"), ("mug", "mugs"), ("scarf", "scarves"), ("belt", "belts")],
    ["store", "market", "mall"],
    [
        template(
            "half_price", "a:4-98",
            [("t=a/2", "Today it costs {t} dollars.")],
            "A {item} at the {place} costs {a} dollars. Today every {item} is half price. How many dollars does it cost today?",
            "{name} wants a {item} with a price of {a} dollars. The {place} sells it for half price. What does {he} pay?",
        ),
        template(
            "change", "a:2-12 b:2-12 c:20-100",
            [("t=a*b", "{name} pays {t} dollars."), ("u=c-t", "{He} gets {u} dollars of change.")],
            "{name} buys {a} {items} for {b} dollars each. {He} gives the seller {c} dollars. How much change does {he} get?",
            "A {item} costs {b} dollars. {name} takes {c} dollars to the {place} and pays for {a} {items}. How much change does {he} get?",
        ),
        template(
            "wrap", "a:2-30 b:1-9 c:2-12",
            [("t=a+b", "With wrap a {item} costs {t} dollars."), ("u=t*c", "{name} pays {u} dollars.")],
            "A {item} costs {a} dollars and gift wrap costs {b} dollars more. {name} buys {c} {items} with gift wrap. How much does {he} pay?",
            "At the {place} one {item} has a price of {a} dollars plus {b} dollars of tax. How much does {name} pay for {c} {items}?",
        ),
        template(
            "coupon", "a:2-12 b:2-12 c:2-40 d:10-100",
            [("t=a*b", "The {items} cost {t} dollars."), ("u=t-c", "With the coupon {name} pays {u} dollars."), ("v=d-u", "{He} has {v} dollars left.")],
            "{name} goes to the {place} with {d} dollars. {He} buys {a} {items} for {b} dollars each and uses a coupon for {c} dollars off. How much money is left?",
            "The price of a {item} is {b} dollars. {name} has {d} dollars and a coupon for {c} dollars off. {He} buys {a} {items}. How much money is left?",
        ),
        template(
            "two_prices", "a:2-9 b:2-12 c:2-9 d:2-12",
            [("t=a*b", "The {items} cost {t} dollars."), ("u=c*d", "The {others} cost {u} dollars."), ("v=t+u", "{name} pays {v} dollars.")],
            "{name} buys {a} {items} for {b} dollars each and {c} {others} for {d} dollars each. How much does {he} pay?",
            "At the {place} a {item} costs {b} dollars and a {other} costs {d} dollars. How much does {name} pay for {a} {items} and {c} {others}?",
        ),
    ],
)  # fmt: skip

TRAVEL = Family(
    "travel",
    [("bus", "buses"), ("train", "trains"), ("boat", "boats"), ("van", "vans"), ("taxi", "taxis")],
    ["lake", "city", "airport", "coast"],
    [
        template(
            "week", "a:2-14",
            [("t=a*7", "In one week it makes {t} trips.")],
            "A {item} makes {a} trips to the {place} each day. How many trips does it make in one week?",
            "Every day the {item} drives to the {place} {a} times. How many trips are that in one week?",
        ),
        template(
            "round_trip", "a:2-25 b:2-20",
            [("t=a*2", "There and back is {t} miles."), ("u=t*b", "{name} travels {u} miles.")],
            "It is {a} miles from home to the {place}. {name} travels there and back {b} times. How many miles does {he} travel?",
            "{name} takes a {item} to the {place} and back {b} times. One way is {a} miles. How many miles does {he} travel?",
        ),
        template(
            "miles_left", "a:2-20 b:2-9 c:20-100",
            [("t=a*b", "The {item} drives {t} miles."), ("u=c-t", "There are {u} miles left.")],
            "The road to the {place} is {c} miles long. A {item} drives {a} miles each hour for {b} hours. How many miles are left?",
            "A {item} travels at {a} miles each hour. The {place} is {c} miles away. How many miles are left after {b} hours?",
        ),
        template(
            "stops", "a:20-99 b:2-40 c:2-60",
            [("t=a-b", "After the first stop {t} riders stay."), ("u=t+c", "Then {u} riders are on the {item}."), ("v=u/2", "At the end {v} riders are left.")],
            "A {item} leaves with {a} riders. At the first stop {b} riders get off and {c} riders get on. At the next stop half of them get off. How many riders are left?",
            "There are {a} riders on a {item} to the {place}. {b} get off and {c} get on. Then half of the riders get off. How many riders are left?",
        ),
        template(
            "two_roads", "a:2-20 b:2-9 c:2-20 d:2-9",
            [("t=a*b", "On the first day it drives {t} miles."), ("u=c*d", "On the second day it drives {u} miles."), ("v=t+u", "In all it drives {v} miles.")],
            "A {item} drives {a} miles each hour for {b} hours. The next day it drives {c} miles each hour for {d} hours. How many miles does it drive in all?",
            "On the way to the {place} a {item} travels {b} hours at {a} miles each hour and then {d} hours at {c} miles each hour. How many miles is that?",
        ),
        template(
            "seats", "a:2-12 b:2-12 c:2-50 d:2-50",
            [("t=a*b", "The {items} have {t} seats."), ("u=c+d", "There are {u} riders."), ("v=t-u", "{v} seats stay empty.")],
            "{a} {items} with {b} seats each go to the {place}. {c} men and {d} women ride along. How many seats stay empty?",
            "{c} men and {d} women travel in {a} {items}. Each {item} has {b} seats. How many seats stay empty?",
        ),
    ],
)  # fmt: skip

COOKING = Family(
    "cooking",
    [("cookie", "cookies"), ("muffin", "muffins"), ("pancake", "pancakes"), ("waffle", "waffles"), ("roll", "rolls")],
    ["kitchen", "bakery", "cafe"],
    [
        template(
            "dozen", "a:2-8",
            [("t=a*12", "That is {t} eggs.")],
            "{name} needs {a} dozen eggs for the {place}. How many eggs are that?",
            "The {place} uses {a} dozen eggs for {items}. How many eggs does it use?",
        ),
        template(
            "cups", "a:2-20 b:2-20 c:2-9",
            [("t=a+b", "One pan needs {t} cups."), ("u=t*c", "{name} needs {u} cups.")],
            "One pan of {items} needs {a} cups of flour and {b} cups of milk. How many cups does {name} need for {c} pans?",
            "{name} cooks {c} pans of {items}. Each pan takes {a} cups of flour and {b} cups of sugar. How many cups is that?",
        ),
        template(
            "bags", "a:2-12 b:2-12 c:2-9",
            [("t=a*b", "{name} bakes {t} {items}."), ("u=t/c", "{He} fills {u} bags.")],
            "{name} bakes {a} trays of {b} {items}. {He} puts {c} {items} in each bag. How many bags does {he} fill?",
            "The {place} bakes {a} trays with {b} {items} on each. {name} packs bags of {c} {items}. How many bags does {he} fill?",
        ),
        template(
            "burned", "a:2-12 b:2-12 c:2-60 d:2-60",
            [("t=a*b", "{name} bakes {t} {items}."), ("u=t-c", "{u} {items} are good."), ("v=u+d", "{He} can serve {v} {items}.")],
            "{name} bakes {a} trays of {b} {items} but {c} of them are burned. The {place} brings {d} more. How many {items} can {he} serve?",
            "There are {a} trays of {b} {items} in the oven. {c} {items} burn. {name} cooks {d} new ones. How many {items} can {he} serve?",
        ),
        template(
            "soup", "a:2-20 b:1-20 c:2-9",
            [("t=a+b", "A pot needs {t} onions."), ("u=a+t", "One pot takes {u} vegetables."), ("v=u*c", "{name} uses {v} vegetables.")],
            "A pot of soup needs {a} carrots and {b} more onions than carrots. How many vegetables does {name} use for {c} pots?",
            "{name} cooks {c} pots of soup in the {place}. Each pot gets {a} carrots and {b} more onions than carrots. How many vegetables does {he} use?",
        ),
    ],
)  # fmt: skip

SAVINGS = Family(
    "savings",
    [("bike", "bikes"), ("game", "games"), ("phone", "phones"), ("guitar", "guitars"), ("watch", "watches")],
    ["bank", "jar", "purse"],
    [
        template(
            "triple", "a:2-33",
            [("t=a*3", "{friend} has {t} coins.")],
            "{name} has {a} coins in the {place}. {friend} has three times as many. How many coins does {friend} have?",
            "{friend} saved three times as many coins as {name}. {name} saved {a} coins. How many coins does {friend} have?",
        ),
        template(
            "weeks", "a:2-60 b:2-12 c:10-100",
            [("t=c-a", "{name} needs {t} dollars more."), ("u=t/b", "It takes {u} weeks.")],
            "A {item} costs {c} dollars. {name} has {a} dollars and saves {b} dollars each week. How many weeks does it take?",
            "{name} has {a} dollars in the {place} and earns {b} dollars each week. {He} saves for a {item} of {c} dollars. How many weeks does it take?",
        ),
        template(
            "twice", "a:2-33",
            [("t=a*2", "In the bank are {t} dollars."), ("u=a+t", "{name} has {u} dollars.")],
            "{name} has {a} dollars in a jar and twice as much in the bank. How many dollars does {he} have?",
            "There are {a} dollars in the jar of {name}. In the bank {he} has twice as much. How many dollars does {he} have?",
        ),
        template(
            "jobs", "a:2-12 b:2-12 c:2-60 d:10-100",
            [("t=a*b", "{name} earns {t} dollars."), ("u=t-c", "{He} keeps {u} dollars."), ("v=d-u", "{He} needs {v} dollars more.")],
            "{name} earns {a} dollars for each of {b} jobs and spends {c} dollars. {He} saves for a {item} of {d} dollars. How much more does {he} need?",
            "A {item} costs {d} dollars. {name} has {b} jobs that pay {a} dollars each, but {he} spends {c} dollars. How much more does {he} need?",
        ),
        template(
            "half_spent", "a:2-70 b:2-70 c:2-60",
            [("t=a+b", "{name} has {t} dollars."), ("u=t/2", "{He} keeps {u} dollars."), ("v=u+c", "At the end {he} has {v} dollars.")],
            "{name} has {a} dollars in the {place} and earns {b} dollars. {He} spends half of the money on a {item}. Then {he} earns {c} dollars. How much does {he} have?",
            "In the {place} of {name} are {a} dollars. {His} aunt adds {b} dollars. A {item} takes half of the money and a job pays {c} dollars. How much does {he} have?",
        ),
    ],
)  # fmt: skip
