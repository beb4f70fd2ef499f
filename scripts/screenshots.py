"""``python scripts/screenshots.py COMPARISON``: the top of its report in a real browser, into docs/images.

At 390, 1,280 and 1,920 pixels, in dark, and in print; small palette PNGs. Needs Chromium and the ``dev`` extra.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from headgate.experiments.report import write_report

SHOTS: dict[str, dict[str, Any]] = {
    "page_390": {"viewport": {"width": 390, "height": 844}},
    "page_1280": {"viewport": {"width": 1280, "height": 860}},
    "page_1920": {"viewport": {"width": 1920, "height": 1080}},
    "page_dark": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "dark"},
    "page_print": {"viewport": {"width": 794, "height": 1123}},
}
COLOURS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "images")
    asked = parser.parse_args()
    page_file = write_report(asked.comparison).page
    chromium = next(
        path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, options in SHOTS.items():
            page = browser.new_page(**options)
            page.goto(page_file.resolve().as_uri())
            if name == "page_print":
                page.emulate_media(media="print")
            path = asked.out / f"{name}.png"
            page.screenshot(path=str(path))
            page.close()
            with Image.open(path) as image:
                image.convert("RGB").quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE).save(
                    path, optimize=True
                )
            print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")
        browser.close()


if __name__ == "__main__":
    main()
