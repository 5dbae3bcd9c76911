"""The model card."""

import pytest
import yaml

from mergekit_vision.export.card import model_card

RECORD = {
    "suite": "digits",
    "backbone": "local-dir:/home/someone/base",
    "experts": {"mnist": "../experts/a.safetensors", "svhn": "b.pt"},
    "merger": {"name": "TIES", "class_path": "mergekit_vision.plugins.ties.TIES", "init_args": {"density": 0.2}},
    "scale": 0.5,
    "citation": ["Yadav et al., TIES-Merging", "Ilharco et al., Task Arithmetic"],
}


def front_matter(card: str) -> dict[str, object]:
    """The block that the hub reads."""
    found: dict[str, object] = yaml.safe_load(card.split("---")[1])
    return found


def test_a_card_says_what_was_merged_and_how() -> None:
    card = model_card(RECORD)
    assert front_matter(card) == {
        "library_name": "open_clip",
        "license": "other",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "merge", "model-merging", "mergekit-vision"],
    }
    assert "# digits merged with TIES" in card
    assert "2 experts fine-tuned from `base`" in card
    assert "at scaling coefficient 0.5." in card
    assert "| mnist | a.safetensors |\n| svhn | b.pt |" in card
    assert "`mergekit_vision.plugins.ties.TIES`" in card
    assert "- `density`: 0.2" in card
    assert "/home/someone" not in card


def test_papers_are_cited_where_there_are_any() -> None:
    card = model_card(RECORD)
    assert "## Citation\n\n- Yadav et al., TIES-Merging\n- Ilharco et al., Task Arithmetic\n" in card
    assert "Citation" not in model_card({**RECORD, "citation": []})
    older = {key: value for key, value in RECORD.items() if key != "citation"}
    assert "Citation" not in model_card(older)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_card_says_how_the_model_is_loaded(dynamic: bool) -> None:
    card = model_card(RECORD, dynamic)
    assert ("mergekit_vision.load(" in card) == dynamic
    assert ("open_clip.create_model_and_transforms(" in card) != dynamic


def test_a_backbone_of_the_hub_is_the_base_model() -> None:
    assert front_matter(model_card({**RECORD, "backbone": "hf-hub:org/clip"}))["base_model"] == ["org/clip"]
