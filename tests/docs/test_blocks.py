"""Every code block of README and docs is run, or says why it is not (``<!-- not run: reason -->`` on the line before it).

Python is executed, a page's blocks after one another; YAML must be accepted as (a part of) a recipe; each ``headgate`` command is
taken apart by the real command's own parser, names recipes that exist, and in the tutorial is executed.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml

from headgate.cli.main import VERBS, command_line
from headgate.experiments.recipe_file import recipe_from
from headgate.experiments.shipped import shipped

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = sorted((ROOT / "docs" / "tutorial").glob("*.md"))
OTHERS = ("make", "pip", "python", "torchrun", "accelerate", "transformers", "vllm", "pre-commit", ".")
"""What else a shell block may begin with; ``make`` targets and ``python -m headgate`` are checked too."""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    excuse: str | None

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, with the excuse that stands on the line before."""
    lines = page.read_text().splitlines()
    begun: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if begun is None:
            begun = number
            continue
        excuse = re.fullmatch(r"<!-- not run: (.+) -->", lines[begun - 1]) if begun else None
        yield Block(
            page,
            begun + 1,
            lines[begun].removeprefix("```").strip(),
            "\n".join(lines[begun + 1 : number]),
            excuse and excuse[1],
        )
        begun = None
    assert begun is None, f"{page}: a block that does not end"


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages and block.excuse is None]


def named(blocks: list[Block]) -> list[object]:
    return [pytest.param(block, id=block.name) for block in blocks]


def test_every_block_has_a_kind_that_is_run() -> None:
    assert {block.language for block in BLOCKS} <= {"python", "yaml", "bash", "", "text"}
    assert len(of("python")) >= 7 and len(of("yaml")) >= 6 and len(of("bash")) >= 12
    excused = [block for block in BLOCKS if block.excuse is not None]
    assert all(len(block.excuse or "") > 8 for block in excused)
    assert len(excused) <= len(BLOCKS) / 4, "most of the documentation must be run"


@pytest.mark.parametrize("block", named(of("yaml")))
def test_yaml_is_a_recipe_or_a_part_of_one(block: Block) -> None:
    content = yaml.safe_load(block.text)
    if not set(content) & {"data", "sweep", "compare", "training", "methods", "name"}:
        content = {"data": content}
    recipe_from({"name": "documented", **content}, block.name)


@pytest.mark.parametrize("page", sorted({block.page for block in of("python")}), ids=lambda p: str(p.name))
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in of("python"):
        if block.page == page:
            exec(compile(block.text, block.name, "exec"), namespace)


def commands(text: str) -> Iterator[str]:
    """The command lines of a block, comments cut off; ``headgate a | b`` in an overview are two commands."""
    for line in text.splitlines():
        line = re.sub(r"\s+# .*$", "", line.removeprefix("$ ")).strip()
        first, *others = re.split(r" \| (?=[a-z])", line)
        yield first
        if first.startswith("headgate "):
            yield from (f"headgate {other.removeprefix('headgate ')}" for other in others)


def headgate_commands() -> list[object]:
    found = []
    for block in BLOCKS:
        if block.language in ("bash", ""):
            for line in commands(block.text):
                line = line.replace("python -m headgate.cli.main", "headgate")
                if line.startswith("headgate "):
                    found.append(pytest.param(line, id=f"{block.name} {line[:40]}"))
    return found


@pytest.mark.parametrize("line", headgate_commands())
def test_the_command_takes_these_words(line: str) -> None:
    """``[...]`` is optional in a synopsis, capitals stand for what one fills in."""
    words = shlex.split(re.sub(r"\[,TASK\.\.\.\]|[\[\]](?![\d.,]*\])(?!\d)", " ", line))[1:]
    if words[0].startswith("--"):
        assert words[0] in ("--version", "--help", "--install-completion")
        return
    assert words[0] in VERBS, f"there is no verb {words[0]}"
    words = ["1" if word in ("N", "S") else word for word in words]
    command = typer.main.get_command(command_line(words[0])).commands[words[0]]  # type: ignore[attr-defined]
    command.make_context(words[0], words[1:])
    for word in words:
        if word.startswith("recipes/"):
            assert shipped(word) is not None, f"{word} does not exist"


@pytest.mark.parametrize("block", named(of("bash")))
def test_other_commands_are_known(block: Block) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in filter(None, commands(block.text)):
        for part in line.split(" && "):
            word = part.split()[0]
            assert word in ("headgate", *OTHERS), f"{block.name}: {part}"
            if word == "make":
                assert part.split()[1] in targets, part


@pytest.mark.slow
def test_the_tutorial_runs_from_its_first_page_to_its_last(tmp_path: Path) -> None:
    """In an empty folder, in order, as a reader would; pages need what earlier ones made."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    prelude = f'headgate() {{ "{sys.executable}" -m headgate.cli.main "$@"; }}\nset -e\n'
    for page in TUTORIAL:
        for block in blocks_of(page):
            if block.excuse is not None or block.language not in ("bash", "python"):
                continue
            program = (
                ["bash", "-c", prelude + block.text]
                if block.language == "bash"
                else [sys.executable, "-c", block.text]
            )
            done = subprocess.run(
                program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800
            )
            assert done.returncode == 0, f"{block.name}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert list(tmp_path.glob("runs/*/comparison-*/report/index.html"))
