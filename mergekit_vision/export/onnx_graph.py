"""``onnx``: the image encoder as an ONNX graph."""

from pathlib import Path

import torch
from torch import Tensor

from mergekit_vision.export.merged import MergedModel
from mergekit_vision.export.preprocessing import write_preprocessing
from mergekit_vision.export.torch_program import traced
from mergekit_vision.export.writer import Embed, Writer

GRAPH, OPSET = "model.onnx", 18
PIXELS, EMBEDDINGS, BATCH = "pixels", "embeddings", "batch"


class Onnx(Writer):
    """``model.onnx``: ``pixels [batch, 3, H, W]`` to ``embeddings [batch, embed_dim]``, both float32."""

    def faults(self, model: MergedModel) -> list[str]:
        """Older PyTorch translates other graphs."""
        return [] if torch.__version__ >= "2.6" else [f"onnx needs PyTorch 2.6 or newer, not {torch.__version__}"]

    def write(self, model: MergedModel, directory: Path) -> None:
        """Write the graph and the preprocessing; weights of more than 1.5 GB go into ``model.onnx.data``."""
        program = torch.onnx.export(
            traced(model),
            dynamo=True,
            opset_version=OPSET,
            input_names=[PIXELS],
            output_names=[EMBEDDINGS],
            dynamic_shapes={"images": {0: BATCH}},  # its name in the graph
            verbose=False,
        )
        assert program is not None
        program.save(directory / GRAPH)
        write_preprocessing(model, directory)

    def load(self, directory: Path) -> Embed:
        """Load the graph into onnxruntime, on the CPU."""
        import onnxruntime

        session = onnxruntime.InferenceSession(directory / GRAPH, providers=["CPUExecutionProvider"])

        def embed(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run([EMBEDDINGS], {PIXELS: images.numpy()})[0])

        return embed
