"""What papers report: the numbers against the notes they are from, and the suites that they hold for."""

from pathlib import Path

import pytest

from mergekit_vision.suites.catalog import published
from mergekit_vision.suites.papers import published_numbers, standard
from mergekit_vision.suites.suite import Suite

NOTES = Path(__file__).parents[3] / "shared" / "algorithms.md"
ROWS = {
    "pretrained": "backbone",
    "experts": "experts",
    "Model Soup": "Average",
    "Task Arithmetic": "TaskArithmetic",
    "TIES": "TIES",
    "Consensus TA": "ConsensusTA",
    "TSV-M": "TSVM",
    "Iso-C": "IsoC",
    "Iso-CTS": "IsoCTS",
    "DC-Merge": "DCMerge",
    "ESM": "ESM",
    "SMILE": "SMILE",
    "ESM++ r=8 †": "ESMPP 8",
    "ESM++ r=32 †": "ESMPP 32",
}


def test_numbers_are_those_of_the_notes() -> None:
    if not NOTES.is_file():
        pytest.skip("the notes that the numbers are from are not at hand")
    text = NOTES.read_text(encoding="utf-8").split("## 5. Published numbers")[1]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    for column, suite in enumerate((f"ViT-{b}-{n}" for b in ("B-32", "B-16", "L-14") for n in (8, 14, 20)), start=1):
        ours = {}
        for number in published_numbers(Suite.load(f"tall/{suite}")):
            ranks = "" if isinstance(number.of, str) else number.of.get("init_args", {}).get("rank", "")
            name = number.of if isinstance(number.of, str) else f"{number.of['class_path']} {ranks}".strip()
            kept = "" if number.normalized is None else f" ({100 * number.normalized:.1f})"
            ours[name] = f"{100 * number.accuracy:.1f}{kept}"
        assert ours == {ROWS[row[0]]: row[column] for row in table if row[0] in ROWS}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: tall/ViT-B-32-8", "tall/ViT-B-32-8"),
        ("extends: tall/ViT-B-32-8\nname: mine\ndata_root: .\ntasks: {mnist: {data: {test: {folder: x}}}}", "tall/ViT-B-32-8"),
        ("extends: tall/ViT-B-32-8\ntasks: {mnist: {expert: mine.pt}}", None),
        ("extends: tall/ViT-B-32-8\ntasks: {mnist: {classes: [a, b]}}", None),
        ("extends: tall/ViT-B-32-8\ntasks: {mnist: null}", None),
        ("extends: tall/ViT-B-32-8\ntasks: {pets: {data: {test: {folder: x}}}}", None),
        ("extends: tall/ViT-B-32-8\nbackbone: ViT-B-32", None),
        ("backbone: ViT-B-32", None),
    ],
)
def test_numbers_hold_for_the_same_tasks_experts_and_texts(text: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(text)
    assert standard(tmp_path / "suite.yaml") == expected


def test_a_published_suite_is_itself() -> None:
    assert all(standard(path) == name for name, path in published().items())
