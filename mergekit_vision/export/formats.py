"""The formats that a merged model is exported to."""

from importlib.util import find_spec
from typing import NamedTuple


class Format(NamedTuple):
    """One format.

    Attributes:
        writer: dotted path of its :class:`~mergekit_vision.export.writer.Writer`, imported when it is used.
        text: what is written, in a few words.
        routed: whether it holds the routed experts of a dynamic model.
        packages: that it needs besides those always installed.
        extra: of this package, which installs them.
    """

    writer: str
    text: str
    routed: bool = False
    packages: tuple[str, ...] = ()
    extra: str = ""

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [package for package in self.packages if find_spec(package) is None]


FORMATS = {
    "huggingface": Format(
        "mergekit_vision.export.huggingface.HuggingFace",
        "CLIPModel, processor and tokenizer",
        packages=("transformers",),
        extra="hf",
    ),
    "open_clip": Format("mergekit_vision.export.open_clip_directory.OpenClip", "open_clip model directory"),
    "peft": Format(
        "mergekit_vision.export.peft.Peft",
        "base for transformers and a LoRA adapter for each expert, of which an image gets one",
        routed=True,
        packages=("transformers", "peft"),
        extra="hf",
    ),
    "onnx": Format(
        "mergekit_vision.export.onnx_graph.Onnx",
        "image encoder as an ONNX graph",
        routed=True,
        packages=("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
    ),
    "torch": Format("mergekit_vision.export.torch_program.TorchProgram", "image encoder as a torch.export program", routed=True),
}
"""Name on the command line -> format."""
