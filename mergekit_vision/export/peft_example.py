"""The program beside an exported base with adapters, which uses both without this package."""

from collections.abc import Iterable

_SCORES = {
    "cosine": '''
def cosine(x, center, prototypes):
    """Cosines between the mean token and the experts' prototypes."""
    return torch.nn.functional.normalize(x.mean(1) - center, dim=-1) @ prototypes.T
''',
    "linear": '''
def linear(x, features, weight, bias, basis=None, offset=None):
    """Log-posteriors of the experts, up to a constant, by a linear discriminant of pooled tokens."""
    mean = x.mean(1)
    pooled = {"mean": mean, "first": x[:, 0], "deviation": (x - mean.unsqueeze(1)).square().mean(1).sqrt()}
    if basis is not None:
        z = x @ basis - offset
        row, column = torch.triu_indices(z.shape[2], z.shape[2])
        moment = (z.transpose(1, 2) @ z / z.shape[1])[:, row, column]
        pooled["covariance"] = moment / (moment.abs() + 0.01).sqrt()
    return torch.cat([pooled[name] for name in features], dim=-1) @ weight.T + bias
''',
    "projection": '''
def projection(x, basis):
    """Mean norm of the tokens' projections onto the experts' subspaces."""
    return torch.einsum("nlw,tgw->nltg", x, basis).norm(dim=-1).mean(1)
''',
}

_PROGRAM = '''"""Encode images: a router chooses an expert for each, and that expert's adapter encodes it.

Usage: python example.py IMAGE...
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection, logging

logging.set_verbosity_error()  # it would warn that the text tower is not read

HERE = Path(__file__).parent
router, tensors = json.loads((HERE / "router.json").read_text()), load_file(HERE / "router.safetensors")
names = router["adapters"]
base = CLIPVisionModelWithProjection.from_pretrained(HERE / "base")
model = PeftModel.from_pretrained(base, str(HERE / "adapters" / names[0]), adapter_name=names[0])
for name in names[1:]:
    model.load_adapter(str(HERE / "adapters" / name), adapter_name=name)
model.eval()


SCORES


def add_scores(scores, kind, arguments, module, inputs):
    """Score the input of a module, by the function of that name, when the module is called."""
    scores.append(globals()[kind](inputs[0], **arguments))


@torch.no_grad()
def choose(pixels):
    """Index of the expert of each image: that with the largest sum of scores over the layers, which see the base's tokens."""
    scores, hooks = [], []
    for number, layer in enumerate(router["layers"]):
        own = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{number}.")}
        add = partial(add_scores, scores, layer["kind"], {**layer["arguments"], **own})
        hooks.append(base.get_submodule(layer["module"]).register_forward_pre_hook(add))
    with model.disable_adapter():
        model(pixel_values=pixels)
    for hook in hooks:
        hook.remove()
    return sum(scores).argmax(-1)


@torch.no_grad()
def encode(pixels):
    """Embeddings of preprocessed images [N, 3, H, W]: [N, projection_dim], not normalized."""
    chosen, embeddings = choose(pixels), torch.empty(len(pixels), base.config.projection_dim)
    for expert in chosen.unique():
        model.set_adapter(names[expert])
        embeddings[chosen == expert] = model(pixel_values=pixels[chosen == expert]).image_embeds
    return embeddings


if __name__ == "__main__":
    images = [Image.open(path).convert("RGB") for path in sys.argv[1:]]
    pixels = CLIPImageProcessor.from_pretrained(HERE / "base")(images, return_tensors="pt")["pixel_values"]
    for path, expert, embedding in zip(sys.argv[1:], choose(pixels), encode(pixels)):
        print(path, router["tasks"][expert], embedding[:4].tolist())
'''


def example(kinds: Iterable[str]) -> str:
    """The program, with the functions for these kinds of scores."""
    return _PROGRAM.replace("SCORES", "\n\n\n".join(_SCORES[kind].strip() for kind in sorted(set(kinds))))
