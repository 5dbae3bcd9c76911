"""The program beside an exported base with adapters, which uses both without this package."""

from collections.abc import Sequence

_PROGRAM = '''"""Encode images, each by the adapter that the router chooses for it: python example.py IMAGE..."""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection, logging

logging.set_verbosity_error()  # it would warn that the text tower is not read
HERE = Path(__file__).parent
names = json.loads((HERE / "router.json").read_text())["adapters"]
router = {}  # layer -> what its scores are computed with
for key, tensor in load_file(HERE / "router.safetensors").items():
    layer, _, part = key.rpartition(".")
    router.setdefault(layer, {})[part] = tensor

base = CLIPVisionModelWithProjection.from_pretrained(HERE / "base")
model = PeftModel.from_pretrained(base, str(HERE / "adapters" / names[0]), adapter_name=names[0]).eval()
for name in names[1:]:
    model.load_adapter(str(HERE / "adapters" / name), adapter_name=name)

inputs = {}  # what the layers of the router were given last
for layer in router:
    base.get_submodule(layer).register_forward_pre_hook(lambda _, x, layer=layer: inputs.update({layer: x[0]}))


SCORES


@torch.no_grad()
def encode(pixels):
    """Embeddings [N, projection_dim] of preprocessed images [N, 3, H, W], not normalized, and the index of each one's expert."""
    with model.disable_adapter():
        embeddings = model(pixel_values=pixels).image_embeds
    chosen = sum(scores(inputs[layer], **parts) for layer, parts in router.items()).argmax(-1)
    for expert in chosen.unique():
        model.set_adapter(names[expert])
        embeddings[chosen == expert] = model(pixel_values=pixels[chosen == expert]).image_embeds
    return embeddings, chosen


if __name__ == "__main__":
    images = [Image.open(path).convert("RGB") for path in sys.argv[1:]]
    pixels = CLIPImageProcessor.from_pretrained(HERE / "base")(images, return_tensors="pt")["pixel_values"]
    for path, embedding, expert in zip(sys.argv[1:], *encode(pixels)):
        print(path, names[expert], embedding[:4].tolist())
'''

_COSINE = '''
def scores(x, center, prototypes):
    """Cosines between the mean token and the experts' prototypes."""
    return torch.nn.functional.normalize(x.mean(1) - center, dim=-1) @ prototypes.T
'''

_PROJECTION = '''
def scores(x, basis):
    """Mean norm of the tokens' projections onto the experts' subspaces."""
    return torch.einsum("nlw,tgw->nltg", x, basis).norm(dim=-1).mean(1)
'''

_LINEAR = '''
def scores(x, ARGUMENTS):
    """Log-posteriors of the experts, up to a constant, by a linear discriminant of pooled tokens."""
MOMENT    features = [FEATURES]
    return torch.cat(features, dim=-1) @ weight.T + bias
'''

_SUBSPACE = '''
def scores(x, basis, center):
    """Distances of pooled tokens from the experts' subspaces, standardized over the experts and negated."""
    features = [FEATURES]
    rest = torch.cat(features, dim=-1)[:, None] - center
    rest -= torch.einsum("etf,tkf,tkg->etg", rest, basis, basis)
    distances = rest.norm(dim=-1)
    distances -= distances.amin(-1, keepdim=True)
    spread = distances.std(-1, correction=0, keepdim=True).clamp_min(1e-30)
    return (distances.mean(-1, keepdim=True) - distances) / spread
'''

_MOMENT = """    z = x @ basis - offset
    row, column = torch.triu_indices(z.shape[2], z.shape[2])
    moment = (z.transpose(1, 2) @ z / z.shape[1])[:, row, column]
"""

_FEATURES = {
    "mean": "x.mean(1)",
    "deviation": "x.std(1, correction=0)",
    "first": "x[:, 0]",
    "covariance": "moment / (moment.abs() + 0.01).sqrt()",
}


def example(kind: str, pooling: Sequence[str] = ()) -> str:
    """The program for routers of a kind; of ``linear`` and ``subspace`` ones, with the features that they score."""
    scores = {"cosine": _COSINE, "linear": _linear(pooling), "projection": _PROJECTION, "subspace": _SUBSPACE}[kind]
    scores = scores.replace("FEATURES", ", ".join(_FEATURES[name] for name in pooling))
    return _PROGRAM.replace("SCORES", scores.strip())


def _linear(pooling: Sequence[str]) -> str:
    moment = "covariance" in pooling
    scores = _LINEAR.replace("ARGUMENTS", "weight, bias, basis, offset" if moment else "weight, bias")
    return scores.replace("MOMENT", _MOMENT if moment else "")
