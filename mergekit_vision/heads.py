"""Zero-shot classification heads from class names and prompts."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_vision.files import cache_dir, replacing

Tokenizer = Callable[[list[str]], Tensor]


@torch.no_grad()
def zero_shot_head(clip: nn.Module, tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Zero-shot classification head of one task (Radford et al. 2021, §3.1).

    A class is the mean of its normalised prompt embeddings, normalised again, times ``exp(logit_scale)``.

    Args:
        clip: an open_clip model with its text tower.
        tokenizer: its tokenizer.
        classes: class names, in the order of the labels.
        templates: prompts with ``{}`` where the class name goes.

    Returns:
        ``[classes, embed_dim]``, float32: the logits of a normalised image embedding ``z`` are ``head @ z``.
    """
    scale = clip.get_parameter("logit_scale").detach().exp()
    rows = []
    for name in classes:
        tokens = tokenizer([template.format(name) for template in templates]).to(scale.device)
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
        """Logits ``[N, classes]`` of image embeddings ``[N, embed_dim]``."""
        return F.normalize(features.float(), dim=-1) @ self.weight(task).T


def build_heads(
    clip: nn.Module, tokenizer: Tokenizer, prompts: Mapping[str, tuple[Sequence[str], Sequence[str]]]
) -> ZeroShotHeads:
    """Heads of all tasks, each computed once and kept on disk under a hash of the text tower and the prompts.

    Args:
        clip: an open_clip model with its text tower.
        tokenizer: its tokenizer.
        prompts: task -> class names and templates.
    """
    tower = _text_digest(clip)
    heads = {}
    for task, (classes, templates) in prompts.items():
        key = hashlib.blake2b(f"{tower}\n{list(classes)}\n{list(templates)}".encode(), digest_size=20).hexdigest()
        path = cache_dir() / "heads" / f"{key}.safetensors"
        if not path.is_file():
            with replacing(path) as temporary:
                save_file({"head": zero_shot_head(clip, tokenizer, classes, templates).contiguous().cpu()}, temporary)
        heads[task] = load_file(path)["head"]
    return ZeroShotHeads(heads)


def _text_digest(clip: nn.Module) -> str:
    """Hash of everything the text embeddings depend on; the tokenizer goes with the vocabulary size."""
    digest = hashlib.blake2b(digest_size=20)
    for key, value in sorted(clip.state_dict().items()):
        if not key.startswith("visual."):
            digest.update(f"{key}{tuple(value.shape)}".encode())
            digest.update(memoryview(value.detach().cpu().float().contiguous().reshape(-1).numpy()))
    return digest.hexdigest()
