"""Zero-shot heads: what they are, when they are computed, and from what."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
from routed_encoder import normal
from spoiled import spoil
from tolerances import assert_near, forward, summed
from torch import nn
from torch.nn import functional as F

from mergekit_vision.encoders.backbone import load_clip
from mergekit_vision.encoders.heads import LazyHeads, Tokenizer, ZeroShotHeads, build_heads, zero_shot_head
from mergekit_vision.suites.suite import Suite

Clip = tuple[nn.Module, Tokenizer]
Prompts = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]


@pytest.fixture
def clip(tiny_suite: Path) -> Clip:
    name = Suite.load(tiny_suite).backbone
    return load_clip(name), open_clip.get_tokenizer(name)


def head(clip: Clip, prompts: Prompts, config: dict[str, Any] | None = None) -> torch.Tensor:
    model, tokenizer = clip
    return build_heads(model, tokenizer, prompts, config or {}, torch.device("cpu")).weight("pets")


def test_head_is_the_published_mean_of_normalized_prompts(clip: Clip) -> None:
    model, tokenizer = clip
    classes, templates = ["cat", "dog", "bird"], ["a photo of a {}.", "a drawing of a {}."]
    head = zero_shot_head(model, tokenizer, classes, templates)
    for row, name in zip(head, classes, strict=True):
        prompts = [model.encode_text(tokenizer([text.format(name)]))[0] for text in templates]
        mean = sum(prompt / prompt.norm() for prompt in prompts) / len(prompts)
        assert_near(row, mean / mean.norm() * model.logit_scale.exp(), forward(8 + 2, 128))


PETS = {"pets": (("cat", "dog"), ("a {}.",))}


def test_heads_come_back_from_the_cache_without_the_text_tower(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    first = head(clip, PETS)
    monkeypatch.setattr(type(clip[0]), "encode_text", lambda *_, **__: pytest.fail("computed again"))
    assert torch.equal(head(clip, PETS), first)
    with pytest.raises(pytest.fail.Exception):
        head(clip, {"pets": (("cat", "cow"), ("a {}.",))})
    with pytest.raises(pytest.fail.Exception):  # the same weights with another activation are another text tower
        head(clip, PETS, {"quick_gelu": True})


def test_a_spoiled_cache_file_is_computed_again(clip: Clip, cache: Path) -> None:
    first = head(clip, PETS)
    (file,) = (cache / "heads").iterdir()
    file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(head(clip, PETS), first)


@pytest.mark.parametrize("change", [torch.zeros_like, lambda head: head[:1], lambda head: head.half(), lambda head: 2 * head])
def test_a_cached_head_that_cannot_be_one_is_computed_again(
    clip: Clip, cache: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    first = head(clip, PETS)
    spoil(cache / "heads", safetensors.torch.save({"value": change(first)}))
    assert torch.equal(head(clip, PETS), first)


def test_another_text_tower_is_another_head(clip: Clip) -> None:
    first = head(clip, PETS)
    clip[0].text_projection.data.mul_(torch.linspace(-1, 1, clip[0].text_projection.shape[1]))
    assert not torch.allclose(head(clip, PETS), first)


def test_braces_in_a_template_are_only_text(clip: Clip) -> None:
    model, tokenizer = clip
    assert zero_shot_head(model, tokenizer, ["cat"], ["a {} in {x}"]).isfinite().all()


def test_logits_are_scaled_cosines() -> None:
    head, features = normal(3, 5), normal(4, 5, seed=1)
    heads = ZeroShotHeads({"a.task": head})
    assert_near(heads(features, "a.task"), F.normalize(features, dim=-1) @ head.T, summed(2 * 5))
    assert heads.to(torch.float64).weight("a.task").dtype == torch.float64


def test_logits_are_float32_under_autocast() -> None:
    heads, features = ZeroShotHeads({"task": 100 * normal(3, 5)}), normal(4, 5, seed=1)
    expected = F.normalize(features, dim=-1) @ heads.weight("task").T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(heads(features, "task"), expected)


def test_heads_are_built_when_they_are_first_asked_for_and_once() -> None:
    built: list[ZeroShotHeads] = []

    def build() -> ZeroShotHeads:
        built.append(ZeroShotHeads({"task": torch.eye(3)}))
        return built[-1]

    heads = LazyHeads(build)
    assert built == []
    assert heads() is heads()
    assert len(built) == 1


def test_what_builds_the_heads_is_let_go_with_the_text_tower_it_holds() -> None:
    class Tower:
        pass

    tower = Tower()
    gone = weakref.ref(tower)
    heads = LazyHeads(lambda tower=tower: ZeroShotHeads({"task": torch.full((1, 1), float(tower is not None))}))
    del tower
    assert gone() is not None
    heads()
    assert gone() is None
    assert heads().weight("task").item() == 1.0


def test_heads_that_cannot_be_built_can_be_asked_for_again() -> None:
    attempts: list[int] = []

    def build() -> ZeroShotHeads:
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("the tokenizer is not there yet")
        return ZeroShotHeads({"task": torch.eye(3)})

    heads = LazyHeads(build)
    with pytest.raises(OSError, match="not there yet"):
        heads()
    assert torch.equal(heads().weight("task"), torch.eye(3))
