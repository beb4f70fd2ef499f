"""Every hostile program in every mode: held, or named as not held. A few by default, all of them with ``-m slow``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from headgate.errors import ConfigError
from headgate.evaluation import sandbox, sandbox_modes
from tests.evaluation.hostile import Hostile
from tests.evaluation.hostile_place import Place, run
from tests.evaluation.hostile_programs import PROGRAMS, table

ROOT = Path(__file__).parents[2]
SYSTEM_PYTHON = "/usr/bin/python3"
SOMEBODY = 54321


@pytest.fixture(scope="module", params=sandbox_modes.MODES)
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each mode in turn; skipped with what the machine lacks, which no installation of this repository brings."""
    with pytest.MonkeyPatch.context() as patch:
        if os.geteuid() == 0 and not sandbox_modes._open_to_others(os.path.realpath(sys.executable)):
            patch.setattr(
                sandbox_modes, "interpreter", lambda: SYSTEM_PYTHON
            )  # for `limits`, which gives up root
        forget()
        try:
            sandbox.establish(request.param)
        except ConfigError as error:
            pytest.skip(str(error))
        yield request.param
    forget()


def forget() -> None:
    sandbox.establish.cache_clear()
    sandbox_modes.readable.cache_clear()


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="headgate-place-") as folder, Place(Path(folder)) as place:
        yield place


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(
            program, id=f"{program.kind}: {program.name}", marks=[] if program.quick else [pytest.mark.slow]
        )
        for program in PROGRAMS
    ],
)
def test_it_is_held(program: Hostile, mode: str, place: Place) -> None:
    _, wrong = run(program, mode, place)
    if mode in program.not_held:
        assert wrong, f"the documentation says that this is not held ({program.not_held[mode]}), and it was"
    else:
        assert not wrong, "; ".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("mode_name", sandbox_modes.MODES)
def test_an_ordinary_user_is_held_as_well(mode_name: str) -> None:
    """The table again by another road: user namespaces instead of root's, bwrap without privilege."""
    if os.geteuid() != 0:
        pytest.skip("these tests run as an ordinary user already")
    with tempfile.TemporaryDirectory(prefix="headgate-other-") as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(ROOT / "src/headgate/evaluation", f"{folder}/headgate/evaluation")
        for name in ("__init__.py", "errors.py"):
            shutil.copy(ROOT / "src/headgate" / name, f"{folder}/headgate/{name}")
        os.makedirs(f"{folder}/tests/evaluation")
        for file in (ROOT / "tests/evaluation").glob("hostile*.py"):
            shutil.copy(file, f"{folder}/tests/evaluation")
        done = subprocess.run(
            [SYSTEM_PYTHON, "-B", "-m", "tests.evaluation.hostile_place", mode_name],
            user=SOMEBODY,
            group=SOMEBODY,
            extra_groups=[],
            env={"PYTHONPATH": folder, "PATH": os.defpath},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=600,
        )
    if "does not hold here" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    open_ones = {program.name for program in PROGRAMS if mode_name in program.not_held}
    assert json.loads(done.stdout or "null").keys() == open_ones, done.stdout + done.stderr


def test_the_table_has_at_least_sixty_programs_of_every_kind() -> None:
    assert len(PROGRAMS) >= 60 and len({(p.kind, p.name) for p in PROGRAMS}) == len(PROGRAMS)


def test_the_documentation_has_the_table() -> None:
    assert table() in (ROOT / "docs/evaluation.md").read_text(), f"docs/evaluation.md wants:\n{table()}"
