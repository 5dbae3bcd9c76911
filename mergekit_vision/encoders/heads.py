"""Zero-shot classification heads from class names and prompts."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_vision.support.cache import Cache, tensor_form
from mergekit_vision.support.console import track
from mergekit_vision.support.fingerprints import of_tensors
from mergekit_vision.support.json_files import to_json
from mergekit_vision.support.source_code import code_fingerprint, versions

Tokenizer = Callable[[list[str]], Tensor]


@torch.no_grad()
def zero_shot_head(clip: nn.Module, tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Zero-shot classification head of one task (Radford et al. 2021, §3.1).

    A class is the mean of its normalized prompt embeddings, normalized again, times ``exp(logit_scale)``.

    Args:
        clip: an open_clip model with its text tower.
        tokenizer: its tokenizer.
        classes: class names, in the order of the labels.
        templates: prompts with ``{}`` where the class name goes.

    Returns:
        ``[classes, embed_dim]``, float32: the logits of a normalized image embedding ``z`` are ``head @ z``.
    """
    scale = clip.get_parameter("logit_scale").detach().exp()
    rows = []
    for name in classes:
        tokens = tokenizer([template.replace("{}", name) for template in templates]).to(scale.device)
        prompts = clip.encode_text(tokens, normalize=True)  # type: ignore[operator]
        rows.append(F.normalize(prompts.float().mean(0), dim=-1))
    return torch.stack(rows) * scale


class ZeroShotHeads(nn.Module):
    """The heads of all tasks, moved with the module they are part of."""

    def __init__(self, heads: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {task: f"head_{index}" for index, task in enumerate(heads)}
        for task, head in heads.items():
            self.register_buffer(self._names[task], head, persistent=False)

    def weight(self, task: str) -> Tensor:
        """One task's head, ``[classes, embed_dim]``."""
        return self.get_buffer(self._names[task])

    def forward(self, features: Tensor, task: str) -> Tensor:
        """Logits ``[N, classes]`` of image embeddings ``[N, embed_dim]``, in float32 also under autocast."""
        with torch.autocast(features.device.type, enabled=False):  # logits near 25 lie 0.125 apart in bfloat16
            return F.normalize(features.float(), dim=-1) @ self.weight(task).float().T


def build_heads(
    clip: nn.Module,
    tokenizer: Tokenizer,
    prompts: Mapping[str, tuple[Sequence[str], Sequence[str]]],
    config: Mapping[str, Any],
    device: torch.device,
) -> ZeroShotHeads:
    """Heads of all tasks, each computed once and remembered by the text tower, its configuration, the prompts and the code.

    Args:
        clip: an open_clip model with its text tower, on the CPU; it is on ``device`` while heads are computed.
        tokenizer: its tokenizer.
        prompts: task -> class names and templates.
        config: open_clip's ``model_cfg``: activation, pooling and tokenizer are not in the weights.
        device: where prompts are embedded, and of the heads.
    """
    tower = [of_tensors(text_weights(clip)), to_json([dict(config), versions()]), code_fingerprint([ZeroShotHeads]) or ""]

    def head(task: str) -> Tensor:
        classes, templates = prompts[task]
        cache = Cache("heads", tensor_form(partial(_checked, clip, len(classes))))
        compute = partial(zero_shot_head, clip, tokenizer, classes, templates)
        return cache.recall([*tower, repr(list(classes)), repr(list(templates))], lambda: _on(clip, device, compute))

    return ZeroShotHeads({task: head(task) for task in track(list(prompts), "zero-shot heads")}).to(device)


def _checked(clip: nn.Module, classes: int, head: Tensor) -> Tensor:
    """A head, if it can be one of a model and of so many classes: rows as long as the logit scale.

    Raises:
        ValueError: when it cannot.
    """
    length = clip.get_parameter("logit_scale").detach().exp().float().cpu()
    if head.dtype != torch.float32 or head.shape[:-1] != (classes,):
        raise ValueError("a head of other classes")
    if not torch.allclose(head.norm(dim=-1), length.expand(classes), rtol=1e-4):
        raise ValueError("no head of this model")
    return head


class LazyHeads:
    """The heads of all tasks, built when they are first asked for.

    Merging alone needs none, and they cost thousands of passes through the text tower where prompts are many.

    Args:
        build: builds them; forgotten afterwards, with the text tower it holds.
    """

    def __init__(self, build: Callable[[], ZeroShotHeads]) -> None:
        self._build: Callable[[], ZeroShotHeads] | None = build
        self._heads: ZeroShotHeads | None = None

    def __call__(self) -> ZeroShotHeads:
        """The heads."""
        if self._build is not None:
            self._heads, self._build = self._build(), None
        return cast(ZeroShotHeads, self._heads)


def text_weights(clip: nn.Module) -> dict[str, Tensor]:
    """What an open_clip model holds besides its vision tower."""
    return {key: value for key, value in clip.state_dict().items() if not key.startswith("visual.")}


def _on(clip: nn.Module, device: torch.device, compute: Callable[[], Tensor]) -> Tensor:
    """What ``compute`` finds with a model on a device, where it does not stay."""
    clip.to(device)
    try:
        return compute().cpu()
    finally:
        clip.to("cpu")
