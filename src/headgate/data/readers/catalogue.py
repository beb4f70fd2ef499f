"""Every source by name: its reader, where the hub has it, and one row as it is published."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points

from headgate.errors import DataError

from ..config import SourceConfig
from . import choices, conversations, mathematics, programs, texts
from .base import Reader, Row


@dataclass(frozen=True)
class Source:
    """A data set or format that can be named. ``hub``: (repository, configuration) it is read from without a path."""

    reader: Reader
    summary: str
    example: Mapping[str, object] = field(default_factory=dict)
    hub: tuple[str, str | None] | None = None


def auto(raw: Mapping[str, object], where: str, config: SourceConfig) -> Iterator[Row]:
    """The reader that the row's columns call for."""
    has = {name for name, value in raw.items() if value is not None}
    for needed, reader in _BY_COLUMNS:
        if needed <= has and (reader is not mathematics.gsm8k or "####" in str(raw["answer"])):
            return reader(raw, where, config)
    raise DataError(
        f"{where}: columns {sorted(map(str, has))} fit no reader: map them with columns: {{prompt: ..., completion: "
        "...}, rename them to prompt/completion, messages or text, or name the source (headgate sources)"
    )


_BY_COLUMNS: list[tuple[set[str], Reader]] = [
    ({"messages"}, conversations.messages),
    ({"conversations"}, conversations.sharegpt),
    ({"conversation"}, conversations.sharegpt),
    ({"prompt", "completion"}, conversations.prompt_completion),
    ({"prompt", "canonical_solution"}, programs.humaneval),
    ({"code", "test_list"}, programs.mbpp),
    ({"choices", "answerKey"}, choices.arc),
    ({"question", "choices", "answer"}, choices.mmlu),
    ({"question", "choice0", "answer"}, choices.mmlu),
    ({"passage", "question", "answer"}, choices.boolq),
    ({"problem", "solution"}, mathematics.math),
    ({"context", "input", "answers"}, texts.longbench),
    ({"document", "question", "answers"}, texts.narrativeqa),
    ({"Body", "Question", "Answer"}, mathematics.arithmetic),
    ({"body", "question", "answer"}, mathematics.arithmetic),
    ({"question", "result"}, mathematics.arithmetic),
    ({"question", "answer"}, mathematics.gsm8k),
    ({"question", "solutions", "input_output"}, programs.apps),
    ({"description", "solutions"}, programs.code_contests),
    ({"instruction"}, conversations.alpaca),
    ({"input", "target"}, choices.bbh),
    ({"text"}, texts.text),
]

_QA = {"question": "Ann has 2 hens and buys 3. How many hens?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
_ARC = {
    "question": "Which is a liquid?",
    "choices": {"text": ["ice", "milk"], "label": ["A", "B"]},
    "answerKey": "B",
}
_CONTEXT = {"context": "Ann lives in Rome.", "input": "Where does Ann live?", "answers": ["Rome", "in Rome"]}
_ALPACA = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
_TEXT = {"text": "Once upon a time ..."}
_CALL = {"type": "function", "function": {"name": "time", "arguments": {"city": "Rome"}}}
_MESSAGES = {
    "messages": [
        {"role": "user", "content": "What time is it in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "content": "12:05"},
        {"role": "assistant", "content": "Five past twelve."},
    ],
    "tools": [{"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}],
}
_PROGRAM = {"task_id": 11, "text": "Add one.", "code": "def f(x):\n    return x + 1", "test_list": ["assert f(1) == 2"]}  # fmt: skip

SOURCES: dict[str, Source] = {
    "wordmath": Source(mathematics.gsm8k, "generated word problems; no path, no network", _QA),
    "auto": Source(auto, "whatever the columns say", {"prompt": "2 + 2 = ", "completion": "4"}),
    "prompt_completion": Source(
        conversations.prompt_completion,
        "prompt and completion, as text or as turns",
        {"prompt": "2 + 2 = ", "completion": "4"},
    ),
    "messages": Source(conversations.messages, "conversations with tools", _MESSAGES),
    "sharegpt": Source(
        conversations.sharegpt,
        "conversations of from and value",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    ),
    "alpaca": Source(conversations.alpaca, "instruction, input, output", _ALPACA, ("tatsu-lab/alpaca", None)),
    "codealpaca": Source(conversations.alpaca, "Alpaca for code", _ALPACA, ("sahil2801/CodeAlpaca-20k", None)),
    "text": Source(texts.text, "documents, whole; a text file is one", _TEXT),
    "tinystories": Source(texts.text, "stories apart by <|endoftext|>", _TEXT, ("roneneldan/TinyStories", None)),
    "shakespeare": Source(texts.text, "one text", _TEXT),
    "wikitext": Source(
        texts.wikitext, "articles by their headings", {"text": " = Rome = \n\n Rome is ...\n"},
        ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    ),
    "gsm8k": Source(mathematics.gsm8k, "worked grade-school problems, #### n", _QA, ("openai/gsm8k", "main")),
    "math": Source(
        mathematics.math, "competition problems in LaTeX, \\boxed{}",
        {"problem": "What is $1+1$?", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{2}$."},
        ("EleutherAI/hendrycks_math", "algebra"),
    ),
    "math500": Source(
        mathematics.math, "500 test problems of MATH",
        {"problem": "What is $1+1$?", "solution": "$\\boxed{2}$", "answer": "2", "subject": "Algebra"},
        ("HuggingFaceH4/MATH-500", None),
    ),
    "svamp": Source(
        mathematics.arithmetic, "arithmetic stories with traps",
        {"Body": "Ann has 5 hats.", "Question": "She gives away 2. How many are left?", "Equation": "( 5 - 2 )", "Answer": 3.0},
        ("ChilleD/SVAMP", None),
    ),
    "asdiv": Source(
        mathematics.arithmetic, "diverse arithmetic stories",
        {"body": "Ann has 7 pens and buys 2.", "question": "How many has she?", "answer": "9 (pens)", "formula": "7+2=9"},
        ("EleutherAI/asdiv", None),
    ),
    "mawps": Source(
        mathematics.arithmetic, "arithmetic stories with equations",
        {"question": "Ann had 7 pens and lost 2. How many are left?", "expression": "7 - 2", "result": "5"},
        ("MU-NLPC/Calc-mawps", None),
    ),
    "mbpp": Source(programs.mbpp, "small Python programs with tests", _PROGRAM, ("google-research-datasets/mbpp", "full")),
    "humaneval": Source(
        programs.humaneval, "functions to complete",
        {"task_id": "HumanEval/0", "prompt": "def f(x):\n", "canonical_solution": "    return x\n",
         "test": "def check(f):\n    assert f(1) == 1", "entry_point": "f"},
        ("openai/openai_humaneval", None),
    ),
    "apps": Source(
        programs.apps, "contest problems with tests",
        {"question": "Read n, print n.", "solutions": "[\"print(input())\"]", "input_output": "{}", "difficulty": "interview"},
        ("codeparrot/apps", "all"),
    ),
    "code_contests": Source(
        programs.code_contests, "DeepMind's contest problems",
        {"description": "Read n, print n.", "solutions": {"language": [3], "solution": ["print(input())"]}, "difficulty": 7},
        ("deepmind/code_contests", None),
    ),
    "arc_challenge": Source(choices.arc, "science questions, hard", _ARC, ("allenai/ai2_arc", "ARC-Challenge")),
    "arc_easy": Source(choices.arc, "science questions, easy", _ARC, ("allenai/ai2_arc", "ARC-Easy")),
    "openbookqa": Source(
        choices.arc, "elementary science",
        {"question_stem": "Which is a liquid?", "choices": {"text": ["ice", "milk"], "label": ["A", "B"]}, "answerKey": "B"},
        ("allenai/openbookqa", "main"),
    ),
    "mmlu": Source(
        choices.mmlu, "57 subjects, four options",
        {"question": "2 + 2?", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "mathematics"},
        ("cais/mmlu", "all"),
    ),
    "boolq": Source(
        choices.boolq, "yes or no about a passage",
        {"passage": "Rome is in Italy.", "question": "is rome in italy", "answer": True}, ("google/boolq", None),
    ),
    "bbh": Source(
        choices.bbh, "BIG-Bench Hard", {"input": "not ( True ) is", "target": "False"},
        ("lukaemon/bbh", "boolean_expressions"),
    ),
    "narrativeqa": Source(
        texts.narrativeqa, "questions about whole books",
        {"document": {"text": "A long book ...", "summary": {"text": "A book."}}, "question": {"text": "Who?"},
         "answers": [{"text": "Ann"}, {"text": "Ann Lee"}]},
        ("deepmind/narrativeqa", None),
    ),
    "longbench": Source(texts.longbench, "questions about long contexts", _CONTEXT, ("THUDM/LongBench", "hotpotqa")),
}  # fmt: skip
FORMATS = ("json", "jsonl", "parquet", "csv", "tsv", "arrow")
"""Names of formats, taken for ``auto``: the path says the format."""


def register_source(name: str, source: Source) -> None:
    """Add a source; the entry point group ``headgate.sources`` does the same for an installed package."""
    if name in SOURCES and SOURCES[name] is not source:
        raise DataError(f"there is already a source '{name}': choose another name")
    SOURCES[name] = source


def source_named(name: str) -> Source | None:
    """The source of that name, or None. Formats are ``auto``."""
    if name in FORMATS:
        return SOURCES["auto"]
    if name not in SOURCES:
        for entry in entry_points(group="headgate.sources"):
            if entry.name == name:
                register_source(name, entry.load())
    return SOURCES.get(name)


def unknown_source(name: str) -> DataError:
    """What to say of a name that is no source."""
    close = difflib.get_close_matches(name, [*SOURCES, *FORMATS], n=1)
    hint = (
        f"did you mean '{close[0]}'?"
        if close
        else f"the sources are {', '.join(SOURCES)}, or owner/name on the hub"
    )
    return DataError(f"unknown source '{name}': {hint}")
