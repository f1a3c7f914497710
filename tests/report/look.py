"""A look at a run's report with a real browser:

    python -m tests.report.look RUN OUT.png [--browser FILE]

Writes the report beside the picture. Fails if the page asks for anything but itself, says an error, or draws no chart.
Needs playwright, which nothing else does: pip install playwright && playwright install chromium
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from asa_dist.report import write_report

WIDTH, HEIGHT = 1400, 900  # pixels; the picture is as long as the page


def look(page_path: Path, picture: Path, browser: str | None) -> list[str]:
    """What is wrong with the page.

    Args:
        browser: a Chromium to use; None: playwright's own.
    """
    from playwright.sync_api import sync_playwright

    requests: list[str] = []
    problems: list[str] = []
    address = page_path.resolve().as_uri()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser)
        page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.goto(address)
        page.wait_for_selector("body[data-drawn]")
        if page.locator("body").get_attribute("data-drawn") == "0":
            problems.append("no chart was drawn")
        page.screenshot(path=picture, full_page=True)
        chromium.close()
    return problems + ([f"requests: {requests}"] if requests != [address] else [])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.report.look", description="Look at a report with a browser.")
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("picture", type=Path, metavar="OUT.png", help="the report is written beside it")
    parser.add_argument("--browser", metavar="FILE", help="a Chromium (default: playwright's own)")
    options = parser.parse_args(arguments)
    page_path = write_report(options.run_dir, options.picture.with_suffix(".html"))
    try:
        problems = look(page_path, options.picture, options.browser)
    except ImportError as error:
        problems = [f"playwright cannot be used: {error}; pip install playwright && playwright install chromium"]
    print("\n".join(problems) or options.picture, file=sys.stderr if problems else sys.stdout)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
