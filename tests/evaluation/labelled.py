r"""Outputs of models, labelled by hand: which give the gold answer, and which do not.

``TABLE`` maps (scorer, gold, options) to what is right and what is wrong. ``python -m tests.evaluation.labelled`` writes
``disagreements.md``: where lm-evaluation-harness's and math-verify's own verdicts differ from the labels.
"""

from __future__ import annotations

import re
from pathlib import Path

Key = tuple[str, str, tuple[str, ...]]
PALMS = ("dry palms", "wet palms", "palms covered with oil", "palms covered with lotion")
TABLE: dict[Key, tuple[list[str], list[str]]] = {
    ("strict", "18", ()): (
        [
            "#### 18", "9 * 2 = 18\n#### 18", "####18", "#### **18**", "#### \\$18", "#### $18", "####  18.",
            "#### 18.00", "#### 18\n\nQuestion: next", "#### 18 dollars", "#### +18", "####\t18", "so\n#### 18<|im_end|>",
            "#### 18, which is all", "#### ** 18**", "#### $18.00 per day",
        ],
        [
            "18", "The answer is 18.", "#### 81", "#### 180", "#### 18,000", "#### -18", "#### 1.8", "### 18", "\\boxed{18}",
            "#### 17\n#### 18", "#### eighteen", "####", "", "#### 18.5", "# 18", "#### 1 8", "#### 018.1",
        ],
    ),
    ("strict", "1234", ()): (
        ["#### 1,234", "#### 1234", "#### $1,234", "#### 1,234.00", "#### **1,234**"],
        ["#### 1.234", "#### 12,34", "#### 1234,5 6", "#### 234", "#### 1,2345"],
    ),
    ("strict", "-3", ()): (["#### -3", "#### \u22123", "#### -3.0", "#### -$3"], ["#### 3", "#### - 3", "#### --3"]),
    ("flexible", "42", ()): (
        [
            "42", "The answer is 42.", "It is 40 + 2 = 42", "**42**", "$42$", "(42)", "42%", "42 apples", "x = 42.0",
            "so 6*7=42\n", "First 7, then 42", "Answer: $42", "\\boxed{42}", "42!", "The total is 42, as asked.",
        ],
        [
            "24", "42 of 100", "forty-two", "4 2", "The answer is 42. Next, 43.", "-42", "0.42", "4.2", "", "142", "A42", "420",
        ],
    ),
    ("flexible", "0.5", ()): (["0.5", ".5", "0.50", "half, i.e. 0.5"], ["5", "1/2", "0.05", "50", "-.5"]),
    ("number", "42", ()): (
        [
            "42", "\\boxed{42}", "The answer is 42. That took 3 steps.", "#### 42\nQuestion 2", "Answer: 42 (of 100)",
            "The final answer is: 42", "the answer is $42$", "so \\boxed{42} as 6*7", "The correct answer is 42 and not 41",
            "**Answer:** 42", "answer = 42", "\\boxed{42\\text{ cm}}", "Final answer:\n42", "\\boxed{42.0}", "41, no: 42",
        ],
        [
            "\\boxed{41} or 42", "The answer is 41. 42 is wrong", "#### 41 not 42", "", "forty-two", "\\boxed{-42}", "answer: 4.2",
        ],
    ),
    ("number", "1500", ()): (
        ["1,500", "$1,500.00", "\\boxed{1{,}500}", "\\boxed{1,500}", "The answer is 1500 euros", "1.5e3"],
        ["1.500", "15,00", "150", "1,5000"],
    ),
    ("math", "6 - 5i", ()): (
        ["\\boxed{6-5i}", "\\boxed{6 - 5i}", "$6-5i$", "The answer is $6 - 5i$.", "\\boxed{-5i+6}", "6-5i", "\\[6-5i\\]"],
        ["\\boxed{6+5i}", "\\boxed{6}", "6", "\\boxed{5i - 6}", "-5i", "\\boxed{6-5}"],
    ),
    ("math", "2k+2", ()): (
        ["\\boxed{2k+2}", "\\boxed{2(k+1)}", "$2+2k$", "\\boxed{ 2k + 2 }", "the answer is $2k+2$"],
        ["\\boxed{2}", "\\boxed{2k}", "2", "\\boxed{k+2}", "\\boxed{2k-2}", "\\boxed{4k}"],
    ),
    ("math", "\\frac{3}{4}", ()): (
        [
            "\\boxed{\\frac{3}{4}}", "\\boxed{\\dfrac{3}{4}}", "\\boxed{\\frac34}", "\\boxed{0.75}", "\\boxed{3/4}", "$\\frac{6}{8}$",
            "\\boxed{.75}", "Thus the answer is $\\tfrac{3}{4}$.", "\\boxed{\\frac{3}{4}}.", "\\boxed{ \\frac {3}{4} }",
        ],
        ["\\boxed{\\frac{4}{3}}", "\\boxed{3}", "\\boxed{0.34}", "\\boxed{34}", "\\boxed{-\\frac{3}{4}}", "\\boxed{7.5}", "\\boxed{}"],
    ),
    ("math", "2\\sqrt{2}", ()): (
        ["\\boxed{2\\sqrt{2}}", "\\boxed{2\\sqrt2}", "\\boxed{\\sqrt{8}}", "$2\\sqrt{2}$", "\\boxed{2 \\sqrt{2}}"],
        ["\\boxed{\\sqrt{2}}", "\\boxed{2}", "\\boxed{4}", "\\boxed{2\\sqrt{3}}", "\\boxed{-2\\sqrt{2}}"],
    ),
    ("math", "(3,-2)", ()): (
        ["\\boxed{(3,-2)}", "\\boxed{(3, -2)}", "\\boxed{\\left(3,-2\\right)}", "$(3,-2)$", "\\boxed{(3,\\,-2)}"],
        ["\\boxed{(-2,3)}", "\\boxed{(3,2)}", "\\boxed{3}", "\\boxed{-2}", "\\boxed{(3,-2,0)}"],
    ),
    ("math", "90^\\circ", ()): (
        ["\\boxed{90^\\circ}", "\\boxed{90}", "\\boxed{90^{\\circ}}", "$90^\\circ$", "\\boxed{90\\degree}"],
        ["\\boxed{9}", "\\boxed{45^\\circ}", "\\boxed{180}", "\\boxed{0^\\circ}"],
    ),
    ("math", "\\text{Evelyn}", ()): (
        ["\\boxed{\\text{Evelyn}}", "\\boxed{Evelyn}", "\\boxed{\\mathrm{Evelyn}}", "The answer is Evelyn.", "\\boxed{\\text{evelyn}}"],
        ["\\boxed{\\text{Evan}}", "\\boxed{\\text{Eve}}", "", "\\boxed{E}"],
    ),
    ("math", "10,080", ()): (
        ["\\boxed{10,080}", "\\boxed{10080}", "\\boxed{10{,}080}", "\\boxed{10\\,080}", "$10{,}080$", "\\boxed{10,\\!080}"],
        ["\\boxed{10}", "\\boxed{80}", "\\boxed{10.080}", "\\boxed{1080}", "\\boxed{100,80}"],
    ),
    ("math", "x^2 + 2x + 1", ()): (
        ["\\boxed{x^2+2x+1}", "\\boxed{(x+1)^2}", "\\boxed{1+2x+x^2}", "\\boxed{x^{2} + 2x + 1}"],
        ["\\boxed{x^2+2x}", "\\boxed{(x-1)^2}", "\\boxed{x^2+1}", "\\boxed{2x+1}"],
    ),
    ("math", "[0,1)", ()): (
        ["\\boxed{[0,1)}", "\\boxed{[0, 1)}", "\\boxed{\\left[0,1\\right)}"],
        ["\\boxed{(0,1)}", "\\boxed{[0,1]}", "\\boxed{[0,2)}", "\\boxed{0}"],
    ),
    ("math", "15\\text{ cm}^2", ()): (
        ["\\boxed{15}", "\\boxed{15\\text{ cm}^2}", "\\boxed{15 \\text{ cm}^2}", "\\boxed{15\\mbox{ cm}^2}"],
        ["\\boxed{16}", "\\boxed{1.5}", "\\boxed{225}"],
    ),
    ("math", "5", ()): (
        ["\\boxed{5}", "\\boxed{x=5}", "\\boxed{5.0}", "$x = 5$", "5", "\\boxed{\\$5}", "\\boxed{5\\%}", "First \\boxed{4}, no, \\boxed{5}"],
        ["\\boxed{-5}", "\\boxed{5x}", "\\boxed{\\frac{1}{5}}", "\\boxed{5, 6}", "\\boxed{4} then 5", "\\boxed{50}", "\\boxed{5!}"],
    ),
    ("boxed", "7", ()): (["\\boxed{7}", "a \\boxed{6} b \\boxed{7}", "\\boxed{7.0}", "\\boxed{ 7 }"], ["7", "\\boxed{8}", "\\boxed{7", "$7$"]),
    ("choice", "B", PALMS): (
        [
            "B", "(B)", "B.", "b", "B) wet palms", "The answer is B.", "The correct answer is (B).", "Answer: B", "\\boxed{B}",
            "**B**", "B. wet palms", "wet palms", "The answer is wet palms", "Option B", "\\boxed{\\text{B}}", "Answer: (B) wet palms",
            "Rubbing dry skin makes heat.\nAnswer: B", "The correct option is B", " B\n", "[B]", "I think\n\nB", "B: wet palms",
            "The answer is **B**.", "\\boxed{(B)}", "The best answer is B because water ...", "Wet palms.", "A is wrong. The answer is B.",
        ],
        [
            "A", "C", "", "A wet palm", "Both A and C", "The answer is A. B is wrong.", "Bananas", "dry palms", "(A) or (B)", "E", "palms",
            "\\boxed{C} B", "Answer: D", "None", "Be careful", "A. dry palms", "I do not know", "the answer is not clear",
        ],
    ),
    ("choice", "A", ("yes", "no")): (
        ["A", "yes", "Yes.", "A. yes", "The answer is yes", "(A)", "**Yes**", "answer: A"],
        ["B", "no", "No.", "maybe", "A cat says no", "", "yes and no", "The answer is no"],
    ),
    ("text", "Yes", ()): (
        ["Yes", "yes", "Yes.", " yes\n", "**Yes**", "The answer is yes.", "Answer: Yes", "YES!", "\\boxed{\\text{Yes}}", "Yes\nbecause it is so"],
        ["No", "", "Yes and no", "Yesterday", "Not yes", "The answer is no", "eye", "y"],
    ),
    ("text", "the Eiffel Tower", ()): (
        ["The Eiffel Tower", "Eiffel Tower", "eiffel tower.", "The answer is the Eiffel Tower.", "An Eiffel Tower"],
        ["Eiffel", "The Tower", "Tower Eiffel", "the eiffel towers", "It stands beside the Eiffel Tower in Paris"],
    ),
    ("text", "answer4", ()): (
        ["answer4", "the correct answer is answer4", "Answer4.", "The correct answer is: answer4"],
        ["answer3", "answer", "4", "the correct answer is answer44", "answer 4"],
    ),
    ("text", "Paris, France", ()): (
        ["Paris, France", "Paris France", "paris, france.", "Answer: Paris, France"], ["Paris", "France", "Paris, Texas", "France, Paris"]
    ),
    ("text", "-5", ()): (["-5", "\u22125", "-5.", "-5.0"], ["5", "5-", "-50"]),
    ("text", "not True", ()): (["not True", "Not true"], ["True", "not not True", "false"]),
}  # fmt: skip


def rows() -> list[tuple[str, str, tuple[str, ...], str, bool]]:
    """(scorer, gold, options, output, label), one an output."""
    return [
        (scorer, gold, options, output, label)
        for (scorer, gold, options), (right, wrong) in TABLE.items()
        for outputs, label in ((right, True), (wrong, False))
        for output in outputs
    ]


def harness_verdict(scorer: str, gold: str, output: str) -> bool | None:
    """What lm-evaluation-harness says: GSM8K's filters, Hendrycks' equivalence, exact match; None where it has none."""
    from lm_eval.tasks.hendrycks_math import utils

    def first(pattern: str, which: int = 0) -> str:
        found = re.findall(pattern, output)
        picked = found[which] if found else "[invalid]"
        return next((part for part in picked if part), "") if isinstance(picked, tuple) else picked

    def clean(text: str) -> str:
        for pattern in (",", r"\$", "(?s).*#### ", r"\.$"):
            text = re.sub(pattern, "", text)
        return text.lower()

    if scorer == "strict":
        return clean(first(r"#### (\-?[0-9\.\,]+)")) == clean(gold)
    if scorer in ("flexible", "number"):
        return clean(first(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)) == clean(gold)
    if scorer in ("math", "boxed"):
        content = utils.last_boxed_only_string(output)
        try:
            return bool(utils.is_equiv(utils.remove_boxed(content), gold)) if content else False
        except AssertionError:
            return False
    if scorer == "choice":
        return first(r"answer is \(?([ABCDEFGHIJ])\)?") == gold
    bare = [re.sub(r"[^\w\s]", "", text.lower()).strip() for text in (gold, output)]
    return bare[0] == bare[1]


def library_verdict(scorer: str, gold: str, output: str) -> bool | None:
    """What math-verify says by itself of a mathematical answer."""
    if scorer not in ("math", "boxed"):
        return None
    from headgate.evaluation.math_verifier import math_verify_equal

    return math_verify_equal(gold, output)


def disagreements() -> str:
    """Every output on which one of the two differs from the label, as a table."""
    lines = [
        "| scorer | gold | output | label | lm-evaluation-harness | math-verify |",
        "|---|---|---|---|---|---|",
    ]
    counts = {"lm-evaluation-harness": [0, 0], "math-verify": [0, 0]}
    for scorer, gold, _, output, label in rows():
        harness, library = harness_verdict(scorer, gold, output), library_verdict(scorer, gold, output)
        for name, verdict in (("lm-evaluation-harness", harness), ("math-verify", library)):
            if verdict is not None:
                counts[name][0] += 1
                counts[name][1] += verdict != label
        if label in (harness, None) and library in (label, None):
            continue
        cells = [repr(part)[1:-1].replace("|", "\\|").replace("`", "'") for part in (gold, output)]
        marks = [
            "-" if verdict is None else "right" if verdict else "wrong"
            for verdict in (label, harness, library)
        ]
        lines.append(f"| {scorer} | `{cells[0]}` | `{cells[1]}` | {' | '.join(marks)} |")
    head = [
        f"{len(rows())} labelled outputs (`tests/evaluation/labelled.py`). Headgate's scorers agree with every label.",
        *(
            f"{name} judges {total} of them and differs on {other}."
            for name, (total, other) in counts.items()
        ),
    ]
    return "\n".join(["# Where other scorers differ from the labels", "", " ".join(head), "", *lines, ""])


FILE = Path(__file__).with_name("disagreements.md")
if __name__ == "__main__":
    FILE.write_text(disagreements())
