"""The processor and the tokenizer, read by transformers, against open_clip's own."""

import json
import random
from pathlib import Path

import ftfy
import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tiny import CONFIG, TASKS, picture

from mergekit_vision.export.hf_processor import write_image_processor, write_tokenizer

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

START, END = 49406, 49407


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("processor")
    (place / "config.json").write_text(json.dumps({"model_type": "clip"}))
    write_tokenizer(place, context_length=77)
    write_image_processor(place, {**CONFIG["preprocess_cfg"]}, side=16)
    return place


def prompts() -> list[str]:
    """Real prompts, and lines of characters of many scripts; none that open_clip repairs first, as transformers does not."""
    found = [template.format(name) for classes, templates in TASKS.values() for name in classes for template in templates]
    draw = random.Random(0)
    scripts = ["abc XYZ019'.,!?-()/&#@", "àéîöñç ÅØß", "αβγδω", "жщыэю", "日本語中文", "שלום", "한국어", "🙂🎉🚗"]
    words = ["it's", "we'll", "DON'T", "I'm", "they've", "3rd", "x2", "(a", "--", "...", "  two  spaces", "tab\tand\nline"]
    for _ in range(400):
        parts = [draw.choice([*words, "".join(draw.choices(draw.choice(scripts), k=draw.randint(1, 7)))]) for _ in range(8)]
        found.append(draw.choice(["", " "]).join(parts))
    return [text for text in (*found, "", " ", "!", "more than fits in " * 40) if ftfy.fix_text(text) == text]


def test_token_ids_are_those_of_open_clip(directory: Path) -> None:
    ours, theirs = SimpleTokenizer(), transformers.AutoTokenizer.from_pretrained(directory)
    texts = prompts()
    assert len(texts) > 400
    rows = theirs(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    expected = ours(texts)
    behind = torch.cumsum(expected == END, 1) - (expected == END).int() > 0  # padding: 0 there, the end here
    assert torch.equal(rows, expected.masked_fill(behind, END))
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.model_max_length) == (START, END, 77)


def test_the_processor_does_both(directory: Path) -> None:
    processor = transformers.AutoProcessor.from_pretrained(directory)
    inputs = processor(text=["a cat", "two dogs"], images=[Image.new("RGB", (30, 20))] * 2, return_tensors="pt", padding=True)
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)
    assert inputs["input_ids"].shape == (2, 4)


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_those_of_open_clip(resize_mode: str, interpolation: str, tmp_path: Path) -> None:
    preprocess = {**CONFIG["preprocess_cfg"], "resize_mode": resize_mode, "interpolation": interpolation}
    write_image_processor(tmp_path, preprocess, side=16)
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path)
    transform = image_transform_v2(PreprocessCfg(size=16, **preprocess), is_train=False)
    # 30 x 20: where the margin to crop is odd, transformers takes one pixel more on the other side
    images = [picture(task, 1, np.random.RandomState(1)).resize((30, 20)) for task in TASKS]
    for image in images:
        found = processor(image, return_tensors="pt")["pixel_values"][0]
        levels = (found - transform(image)).abs() * torch.tensor(preprocess["std"]).view(-1, 1, 1) * 255
        assert levels.max() < 1.5, "resizing rounds to the next of 255 levels, either way"
