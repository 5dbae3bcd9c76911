"""Zero-shot classification heads from class names and prompts."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_vision.files import cache_dir, replacing
from mergekit_vision.progress import track

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
    """Heads of all tasks, each computed once and kept on disk under a hash of the text tower, its configuration and the prompts.

    Args:
        clip: an open_clip model with its text tower; moved to ``device`` when a head has to be computed.
        tokenizer: its tokenizer.
        prompts: task -> class names and templates.
        config: open_clip's ``model_cfg``: activation, pooling and tokenizer are not in the weights.
        device: where prompts are embedded.
    """
    tower = _text_digest(clip) + json.dumps(dict(config), sort_keys=True, default=str)
    paths = {task: _head_path(tower, classes, templates) for task, (classes, templates) in prompts.items()}
    heads = {task: head for task, path in paths.items() if (head := _read_head(path)) is not None}
    missing = [task for task in prompts if task not in heads]
    for task in track(missing, "zero-shot heads") if missing else ():
        heads[task] = zero_shot_head(clip.to(device), tokenizer, *prompts[task]).cpu().contiguous()
        with replacing(paths[task]) as draft:
            save_file({"head": heads[task]}, draft)
    return ZeroShotHeads({task: heads[task] for task in prompts})


def _head_path(tower: str, classes: Sequence[str], templates: Sequence[str]) -> Path:
    key = hashlib.blake2b(f"{tower}\n{list(classes)}\n{list(templates)}".encode(), digest_size=20).hexdigest()
    return cache_dir() / "heads" / f"{key}.safetensors"


def _read_head(path: Path) -> Tensor | None:
    """A cached head; ``None`` where there is none, or something has spoilt it."""
    try:
        return load_file(path)["head"] if path.is_file() else None
    except (SafetensorError, KeyError, OSError):
        return None


def _text_digest(clip: nn.Module) -> str:
    """Hash of the weights that text embeddings depend on."""
    digest = hashlib.blake2b(digest_size=20)
    for key, value in sorted(clip.state_dict().items()):
        if not key.startswith("visual."):
            digest.update(f"{key}{tuple(value.shape)}".encode())
            digest.update(memoryview(value.detach().cpu().float().contiguous().reshape(-1).numpy()))
    return digest.hexdigest()
