"""Refresh what is written from the code itself: ``python docs/update.py``.

That is the table of methods in README.md and docs/methods.md, the JSON Schema of suite files, and the page of benchmark results.
"""

import re
import sys
from pathlib import Path

from mergekit_vision.cli.methods import markdown_table
from mergekit_vision.registry import mergers, methods
from mergekit_vision.suites.layout import suite_schema
from mergekit_vision.support.json_files import indented

ROOT = Path(__file__).parents[1]
PAGES = {ROOT / "README.md": False, ROOT / "docs" / "methods.md": True}
"""Pages with a table of the methods, and whether it names their papers."""
SCHEMA = ROOT / "docs" / "suite.schema.json"


def updated(text: str, papers: bool) -> str:
    """A page with the table between its two comments as it should be; methods of other packages are left out."""
    own = [method for method in methods() if mergers()[method.name].__module__.startswith("mergekit_vision.")]
    table = f"<!-- methods:begin -->\n{markdown_table(own, papers)}\n<!-- methods:end -->"
    return re.sub(r"<!-- methods:begin -->.*?<!-- methods:end -->", lambda _: table, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page, papers in PAGES.items():
        page.write_text(updated(page.read_text(encoding="utf-8"), papers), encoding="utf-8")
    SCHEMA.write_text(indented(suite_schema()), encoding="utf-8")
    sys.path.insert(0, str(ROOT))
    from benchmarks import page

    page.write()
