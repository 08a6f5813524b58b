"""Pictures of a board's page for a README: `python -m tests.screens BOARD.html OUT_DIR`. A tool, not a test.

Its top, its charts and heat maps in the dark, and its top on a phone, in few colours so that the files stay small.
"""

import argparse
import shutil
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

COLORS = 256
SHOTS = [("board", (1280, 1000), "light"), ("board-dark", (1280, 1250), "dark"), ("board-phone", (390, 844), "light")]
FOLDED = """() => document.querySelectorAll('#rivals details, #needles details').forEach((part) => {
  part.open = part === document.querySelectorAll('#needles details')[1];
})"""


def shoot(board: Path, out: Path, chromium: str) -> list[Path]:
    """Write `board.png`, `board-dark.png` and `board-phone.png` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, size, scheme in SHOTS:
            viewport = dict(zip(("width", "height"), size, strict=True))
            page = browser.new_page(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
            page.goto(board.resolve().as_uri())
            if scheme == "dark":
                _to_the_charts(page)
            path = out / f"{name}.png"
            picture = Image.open(BytesIO(page.screenshot())).convert("RGB")
            picture.quantize(COLORS, kmeans=COLORS).save(path, optimize=True)
            written.append(path)
        browser.close()
    return written


def _to_the_charts(page: Any) -> None:
    """Charts with a point read, and the needle maps of the smallest budget; the rivals are folded."""
    page.evaluate(FOLDED)
    page.evaluate("document.querySelector('#charts').scrollIntoView()")
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    box = page.locator(".charts svg.chart .point").nth(3).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def main() -> int:
    """Exit code 0, or 2 without a page or a Chromium."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("board", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None or not given.board.is_file():
        missing = f"no chromium, or no page {given.board}"
        print(f"{missing}; apt install chromium, harness board NAME --html", file=sys.stderr)
        return 2
    for path in shoot(given.board, given.out, chromium):
        print(f"wrote {path}, {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
