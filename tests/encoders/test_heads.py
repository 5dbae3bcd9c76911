from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn import functional as F

from mergekit_vision.encoders.backbone import load_clip
from mergekit_vision.encoders.heads import ZeroShotHeads, build_heads, zero_shot_head
from mergekit_vision.suites.suite import Suite


@pytest.fixture
def clip(tiny_suite: Path):
    name = Suite.load(tiny_suite).backbone
    return load_clip(name), open_clip.get_tokenizer(name)


def head(clip, prompts: dict, config: dict | None = None) -> torch.Tensor:
    model, tokenizer = clip
    return build_heads(model, tokenizer, prompts, config or {}, torch.device("cpu")).weight("pets")


def test_head_is_the_published_mean_of_normalized_prompts(clip) -> None:
    model, tokenizer = clip
    classes, templates = ["cat", "dog", "bird"], ["a photo of a {}.", "a drawing of a {}."]
    head = zero_shot_head(model, tokenizer, classes, templates)
    for row, name in zip(head, classes, strict=True):
        prompts = [model.encode_text(tokenizer([text.format(name)]))[0] for text in templates]
        mean = sum(prompt / prompt.norm() for prompt in prompts) / len(prompts)
        torch.testing.assert_close(row, mean / mean.norm() * model.logit_scale.exp(), rtol=1e-5, atol=1e-5)


PETS = {"pets": (("cat", "dog"), ("a {}.",))}


def test_heads_come_back_from_the_cache_without_the_text_tower(clip, monkeypatch: pytest.MonkeyPatch) -> None:
    first = head(clip, PETS)
    monkeypatch.setattr(type(clip[0]), "encode_text", lambda *_, **__: pytest.fail("computed again"))
    assert torch.equal(head(clip, PETS), first)
    with pytest.raises(pytest.fail.Exception):
        head(clip, {"pets": (("cat", "cow"), ("a {}.",))})
    with pytest.raises(pytest.fail.Exception):  # the same weights with another activation are another text tower
        head(clip, PETS, {"quick_gelu": True})


def test_a_spoiled_cache_file_is_computed_again(clip, cache: Path) -> None:
    first = head(clip, PETS)
    (file,) = (cache / "heads").iterdir()
    file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(head(clip, PETS), first)


def test_another_text_tower_is_another_head(clip) -> None:
    first = head(clip, PETS)
    clip[0].text_projection.data.mul_(torch.linspace(-1, 1, clip[0].text_projection.shape[1]))
    assert not torch.allclose(head(clip, PETS), first)


def test_braces_in_a_template_are_only_text(clip) -> None:
    model, tokenizer = clip
    assert zero_shot_head(model, tokenizer, ["cat"], ["a {} in {x}"]).isfinite().all()


def test_logits_are_scaled_cosines() -> None:
    head, features = torch.randn(3, 5), torch.randn(4, 5)
    heads = ZeroShotHeads({"a.task": head})
    torch.testing.assert_close(heads(features, "a.task"), F.normalize(features, dim=-1) @ head.T)
    assert heads.to(torch.float64).weight("a.task").dtype == torch.float64


def test_logits_are_float32_under_autocast() -> None:
    heads, features = ZeroShotHeads({"task": 100 * torch.randn(3, 5)}), torch.randn(4, 5)
    expected = F.normalize(features, dim=-1) @ heads.weight("task").T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(heads(features, "task"), expected)
