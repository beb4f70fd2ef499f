"""``python -m headgate.testing METHOD [--set key=value] [--model NAME] [--json FILE]``: the table of laws."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in one order: laws are about bits

from headgate.errors import HeadgateError
from headgate.experiments.recipe_file import parse_yaml
from headgate.files import write_json
from headgate.testing.conformance import LawResult, examine

MARKS = {"kept": "ok  ", "broken": "FAIL", "n/a": "-   "}


def main() -> int:
    """Exit code 0 where every law is kept, 1 where one is broken, 2 for a method that does not exist."""
    parser = argparse.ArgumentParser(prog="python -m headgate.testing", description=__doc__)
    parser.add_argument("method")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the method"
    )
    parser.add_argument("--model", default="random:llama")
    parser.add_argument("--law", action="append", help="only this law (repeatable)")
    parser.add_argument("--json", type=Path, help="write the table here")
    arguments = parser.parse_args()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("headgate").setLevel(logging.ERROR)
    options = {}
    for setting in arguments.set:
        key, _, value = setting.partition("=")
        options[key] = parse_yaml(value, f"--set {key}")

    def show(result: LawResult) -> None:
        print(
            f"{MARKS[result.verdict]} {result.law}" + (f": {result.detail}" if result.detail else ""),
            flush=True,
        )

    try:
        results = examine(arguments.method, arguments.model, laws=arguments.law, on_result=show, **options)
    except HeadgateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    broken = sum(result.verdict == "broken" for result in results)
    print(f"{arguments.method}: {len(results)} laws, {broken} broken")
    if arguments.json is not None:
        write_json(
            arguments.json,
            {
                "method": arguments.method,
                "conforms": broken == 0,
                "laws": [result.as_dict() for result in results],
            },
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
