"""Target families about places and people: farm, school, sports, building. See ``targets``."""

from __future__ import annotations

from .spec import Family, template

FARM = Family(
    "farm",
    [("cow", "cows"), ("goat", "goats"), ("sheep", "sheep"), ("pig", "pigs"), ("horse", "horses")],
    ["barn", "field", "meadow"],
    [
        template(
            "legs", "a:2-25",
            [("t=a*4", "The {items} have {t} legs.")],
            "{name} sees {a} {items} in the {place}. How many legs do the {items} have?",
            "There are {a} {items} on the farm. How many legs do the {items} have?",
        ),
        template(
            "milk", "a:1-20 b:1-20 c:2-12",
            [("t=a+b", "Each {item} eats {t} pounds a day."), ("u=t*c", "The {items} eat {u} pounds.")],
            "Each {item} eats {a} pounds of hay in the morning and {b} pounds in the evening. How many pounds do {c} {items} eat each day?",
            "A farmer has {c} {items}. In the morning each {item} eats {a} pounds of hay and in the evening {b} pounds. How many pounds do they eat?",
        ),
        template(
            "half_eggs", "a:2-12 b:2-12",
            [("t=a*b", "The hens lay {t} eggs."), ("u=t/2", "The farmer keeps {u} eggs.")],
            "{a} hens lay {b} eggs each. The farmer sells half of the eggs. How many eggs are kept?",
            "A farmer has {a} hens in the {place}. Each hen lays {b} eggs. Half of the eggs are sold. How many eggs are kept?",
        ),
        template(
            "mixed_legs", "a:2-20 b:2-40",
            [("t=a*4", "The {items} have {t} legs."), ("u=b*2", "The hens have {u} legs."), ("v=t+u", "There are {v} legs.")],
            "There are {a} {items} and {b} hens in the {place}. How many legs are there?",
            "A farmer keeps {b} hens and {a} {items}. How many legs do all the animals have?",
        ),
        template(
            "herd", "a:3-90 b:1-80 c:1-60",
            [("t=a-b", "There are {t} {others}."), ("u=t+c", "There are {u} hens."), ("v=t+u", "There are {v} {others} and hens.")],
            "A farmer has {a} {items}, {b} fewer {others} than {items} and {c} more hens than {others}. How many {others} and hens are there?",
            "In the {place} are {a} {items}. There are {b} fewer {others} than {items} and {c} more hens than {others}. How many {others} and hens are there?",
        ),
        template(
            "fence", "a:2-12 b:2-12 c:2-60 d:2-100",
            [("t=a*b", "The farmer picks {t} pounds of corn."), ("u=t-c", "After the sale {u} pounds are left."), ("v=d-u", "The {items} need {v} pounds more.")],
            "A farmer picks {b} pounds of corn from each of {a} rows and sells {c} pounds. The {items} need {d} pounds. How many pounds more do they need?",
            "The {items} need {d} pounds of corn. The farmer picks {a} rows with {b} pounds each but sells {c} pounds. How many pounds more do they need?",
        ),
    ],
)  # fmt: skip

SCHOOL = Family(
    "school",
    [("pupil", "pupils"), ("student", "students"), ("singer", "singers"), ("reader", "readers")],
    ["room", "hall", "gym"],
    [
        template(
            "school_week", "a:2-20",
            [("t=a*5", "In a school week that is {t} pages.")],
            "{name} reads {a} pages on each school day. How many pages does {he} read in one school week?",
            "On each school day a {item} writes {a} pages. How many pages are that in one school week?",
        ),
        template(
            "groups", "a:10-100 b:2-50 c:2-9",
            [("t=a-b", "There are {t} {items} at school."), ("u=t/c", "They make {u} groups.")],
            "There are {a} {items} in the {place} but {b} of them are sick. The others make groups of {c}. How many groups do they make?",
            "{b} of the {a} {items} go home. The teacher puts the others in groups of {c}. How many groups do they make?",
        ),
        template(
            "tests", "a:4-33 b:2-60",
            [("t=a*3", "The tests have {t} questions."), ("u=t-b", "{name} gets {u} questions right.")],
            "{name} takes three tests with {a} questions each and gets {b} questions wrong. How many questions does {he} get right?",
            "A teacher gives three tests of {a} questions. {name} has {b} wrong. How many questions does {he} get right?",
        ),
        template(
            "desks", "a:2-12 b:2-12 c:2-50 d:2-60",
            [("t=a*b", "There are {t} desks."), ("u=t-c", "{u} desks are good."), ("v=u-d", "{v} desks are empty.")],
            "The {place} has {a} rows of {b} desks but {c} desks are broken. {d} {items} sit down. How many desks are empty?",
            "{d} {items} sit in a {place} with {a} rows of {b} desks. {c} of the desks are broken. How many desks are empty?",
        ),
        template(
            "walk", "a:2-45 b:2-90",
            [("t=a+b", "The second class has {t} {items}."), ("u=a+t", "Both classes have {u} {items}."), ("v=u/2", "{v} {items} walk to school.")],
            "One class has {a} {items} and the second class has {b} more. Half of all the {items} walk to school. How many {items} walk?",
            "There are {a} {items} in the first class and {b} more than that in the second class. Half of all the {items} walk to school. How many walk?",
        ),
    ],
)  # fmt: skip

SPORTS = Family(
    "sports",
    [("player", "players"), ("runner", "runners"), ("swimmer", "swimmers"), ("skater", "skaters")],
    ["club", "team", "stadium"],
    [
        template(
            "pairs", "a:3-50",
            [("t=a*2", "They wear {t} shoes.")],
            "Each of {a} {items} in the {place} wears a pair of shoes. How many shoes do they wear?",
            "The coach buys a pair of shoes for each of the {a} {items}. How many shoes do they wear?",
        ),
        template(
            "wins", "a:3-40 b:1-30 c:2-9",
            [("t=a-b", "The {place} wins {t} games."), ("u=t*c", "It gets {u} points.")],
            "The {place} plays {a} games and loses {b} of them. It gets {c} points for each win. How many points does it get?",
            "Each win gives {c} points. The {place} of {name} plays {a} games and loses {b}. How many points does it get?",
        ),
        template(
            "laps", "a:2-25",
            [("t=a*3", "On the second day the {item} makes {t} laps."), ("u=a+t", "In all that is {u} laps.")],
            "A {item} makes {a} laps on the first day and three times as many on the second day. How many laps does the {item} make?",
            "On the first day the coach asks a {item} for {a} laps and on the second day for three times as many. How many laps are that?",
        ),
        template(
            "shots", "a:2-40 b:2-30",
            [("t=a*2", "The short shots give {t} points."), ("u=b*3", "The long shots give {u} points."), ("v=t+u", "{name} scores {v} points.")],
            "A short shot gives two points and a long shot gives three points. {name} makes {a} short shots and {b} long shots. How many points does {he} score?",
            "{name} makes {a} short shots for two points each and {b} long shots for three points each. How many points does {he} score?",
        ),
        template(
            "halves", "a:5-60 b:1-50 c:2-90",
            [("t=a-b", "In the second half it scores {t} points."), ("u=a+t", "It scores {u} points in all."), ("v=u-c", "It wins by {v} points.")],
            "The {place} scores {a} points in the first half and {b} fewer in the second half. The other side scores {c} points. By how many points does it win?",
            "In the first half {name} and the {place} score {a} points, in the second half {b} fewer. They let in {c} points. By how many points do they win?",
        ),
        template(
            "tickets", "a:2-12 b:2-12 c:2-60 d:10-100",
            [("t=a*b", "The {items} sell {t} tickets."), ("u=t+c", "In all {u} tickets are sold."), ("v=d-u", "{v} seats are free.")],
            "Each of {a} {items} sells {b} tickets and the coach sells {c} tickets. There are {d} seats. How many seats are free?",
            "There are {d} seats for the game. The coach sells {c} tickets and {a} {items} sell {b} tickets each. How many seats are free?",
        ),
    ],
)  # fmt: skip

BUILDING = Family(
    "building",
    [("brick", "bricks"), ("board", "boards"), ("tile", "tiles"), ("pipe", "pipes"), ("beam", "beams")],
    ["house", "tower", "garage"],
    [
        template(
            "thirds", "a:6-99",
            [("t=a/3", "Each part is {t} feet long.")],
            "A {item} is {a} feet long. A worker cuts it into thirds. How long is each part?",
            "For the {place} {name} cuts a {item} of {a} feet into thirds. How many feet long is each part?",
        ),
        template(
            "fence", "a:2-48 b:2-40",
            [("t=a+b", "One long and one short side are {t} feet."), ("u=t*2", "The fence is {u} feet long.")],
            "The yard of the {place} is {a} feet long and {b} feet wide. How long is a fence around it?",
            "{name} builds a fence around a yard of {a} feet by {b} feet. How long is the fence?",
        ),
        template(
            "windows", "a:2-9 b:2-9 c:2-9",
            [("t=a*b", "The {place} has {t} rooms."), ("u=t*c", "It has {u} windows.")],
            "A {place} has {a} floors with {b} rooms on each floor. Each room has {c} windows. How many windows does it have?",
            "Workers build a {place} with {a} floors. A floor has {b} rooms and a room has {c} windows. How many windows does it have?",
        ),
        template(
            "wall", "a:2-12 b:2-12 c:2-60 d:2-60",
            [("t=a*b", "There are {t} {items}."), ("u=c+d", "The work takes {u} {items}."), ("v=t-u", "{v} {items} are left.")],
            "Workers bring {a} loads of {b} {items}. The wall takes {c} {items} and the roof takes {d}. How many {items} are left?",
            "The wall of a {place} takes {c} {items} and the roof takes {d}. {name} has {a} loads of {b} {items}. How many {items} are left?",
        ),
        template(
            "paint", "a:3-45 b:1-40 c:2-60",
            [("t=a+b", "The second wall needs {t} cans."), ("u=a+t", "Both walls need {u} cans."), ("v=u-c", "{name} buys {v} cans.")],
            "The first wall needs {a} cans of paint and the second wall needs {b} cans more. {name} has {c} cans. How many cans does {he} buy?",
            "{name} has {c} cans of paint for the {place}. One wall needs {a} cans and the next wall needs {b} more than that. How many cans does {he} buy?",
        ),
    ],
)  # fmt: skip
