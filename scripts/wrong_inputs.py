"""What Headgate says to wrong inputs: every one of tests/cli/wrong_inputs.py through the command line, as docs/wrong_inputs.md.

python scripts/wrong_inputs.py            writes the page; exit code 1 where an input is taken, or said in a traceback
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.cli.wrong_inputs import WRONG, last_line, prepare, said  # noqa: E402

PAGE = ROOT / "docs" / "wrong_inputs.md"
HEAD = """# What is said to wrong inputs

Each line is a command as a new user may type it, in a folder with a small recipe `r.yaml`, a comparison `c.yaml` and some faulty files
(`tests/cli/wrong_inputs.py`), and the last line that Headgate says to it; all end with an exit code other than 0, none in a traceback
and none after work has begun (`tests/cli/test_wrong_inputs.py`; written by `python scripts/wrong_inputs.py`). Beside them, every leaf of
every setting is given what it cannot be: {count:,} values (`tests/experiments/test_fuzz.py`).

| `headgate ...` | said |
|---|---|
"""


def main() -> int:
    from tests.experiments.test_fuzz import COUNT

    rows, bad = [], []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        os.chdir(folder)
        for wrong in WRONG:
            code, text = said(wrong)
            line = last_line(text).replace(str(Path(folder).resolve()), ".").replace(folder, ".")
            rows.append(
                f"| `{wrong.shown.replace('|', chr(92) + '|')}` | {line.replace('|', chr(92) + '|')} |"
            )
            if code == 0 or "Traceback" in text or not line:
                bad.append(f"{wrong.shown}: exit {code}: {text[-300:]}")
        os.chdir(ROOT)
    PAGE.write_text(HEAD.format(count=COUNT) + "\n".join(rows) + f"\n\n{len(WRONG)} inputs.\n")
    print("\n".join(bad) or f"{len(WRONG)} inputs, each told in a line: {PAGE.relative_to(ROOT)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
