"""`transformers serve` on an exported folder, spoken to by the real `openai` client over loopback."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import exported, routed

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_and_ask.py"
NEEDED = ("openai", "fastapi", "uvicorn")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.mark.slow
@pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install 'headgate[serve]'"
)
def test_a_server_says_what_generate_says(tmp_path: Path) -> None:
    """Plain, streamed, three requests at once. The example exits with 1 where one answer differs from `generate`."""
    model, tokenizer, _ = routed()
    tokenizer.chat_template = CHAT
    folder = exported(model, tokenizer, tmp_path / "out")
    asked = ("Tom has three apples.", "Six friends share a cake.", "A farmer")
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(folder), *asked, "--tokens", "8"],
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "plain, streamed, together and generate are the same" in done.stdout
    answers = [line for line in done.stdout.splitlines() if " -> " in line]
    assert len(answers) == 3 and len({line.split(" -> ")[1] for line in answers}) > 1, "something is said"
