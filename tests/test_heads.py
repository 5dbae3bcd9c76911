from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn import functional as F

from mergekit_vision.encoder import load_clip
from mergekit_vision.heads import ZeroShotHeads, build_heads, zero_shot_head
from mergekit_vision.suite import Suite


@pytest.fixture
def clip(tiny_suite: Path):
    name = Suite.load(tiny_suite).backbone
    return load_clip(name), open_clip.get_tokenizer(name)


def test_head_is_the_published_mean_of_normalised_prompts(clip) -> None:
    model, tokenizer = clip
    classes, templates = ["cat", "dog", "bird"], ["a photo of a {}.", "a drawing of a {}."]
    head = zero_shot_head(model, tokenizer, classes, templates)
    for row, name in zip(head, classes, strict=True):
        prompts = [model.encode_text(tokenizer([text.format(name)]))[0] for text in templates]
        mean = sum(prompt / prompt.norm() for prompt in prompts) / len(prompts)
        torch.testing.assert_close(row, mean / mean.norm() * model.logit_scale.exp(), rtol=1e-5, atol=1e-5)


def test_heads_come_back_from_the_cache_without_the_text_tower(clip, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = clip
    prompts = {"pets": (("cat", "dog"), ("a {}.",))}
    first = build_heads(model, tokenizer, prompts).weight("pets")
    monkeypatch.setattr(type(model), "encode_text", lambda *_, **__: pytest.fail("computed again"))
    assert torch.equal(build_heads(model, tokenizer, prompts).weight("pets"), first)
    with pytest.raises(pytest.fail.Exception):
        build_heads(model, tokenizer, {"pets": (("cat", "cow"), ("a {}.",))})


def test_another_text_tower_is_another_head(clip) -> None:
    model, tokenizer = clip
    prompts = {"pets": (("cat", "dog"), ("a {}.",))}
    first = build_heads(model, tokenizer, prompts).weight("pets")
    model.text_projection.data.mul_(torch.linspace(-1, 1, model.text_projection.shape[1]))
    assert not torch.allclose(build_heads(model, tokenizer, prompts).weight("pets"), first)


def test_logits_are_scaled_cosines() -> None:
    head, features = torch.randn(3, 5), torch.randn(4, 5)
    heads = ZeroShotHeads({"a.task": head})
    torch.testing.assert_close(heads(features, "a.task"), F.normalize(features, dim=-1) @ head.T)
    assert heads.to(torch.float64).weight("a.task").dtype == torch.float64
