"""``torch``: the image encoder as a program of ``torch.export``, which runs without this package."""

import io
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from mergekit_vision.export.merged import MergedModel
from mergekit_vision.export.preprocessing import write_preprocessing
from mergekit_vision.export.writer import Embed, Writer

PROGRAM = "model.pt2"


class TorchProgram(Writer):
    """``model.pt2``: images ``[N, 3, H, W]`` to embeddings ``[N, embed_dim]``, for any ``N``, on the device it was made for."""

    def write(self, model: MergedModel, directory: Path) -> None:
        """Write the program and the preprocessing."""
        buffer = io.BytesIO()  # on a full disk, torch ends the whole process
        torch.export.save(traced(model), buffer)
        (directory / PROGRAM).write_bytes(buffer.getbuffer())
        write_preprocessing(model, directory)

    def load(self, directory: Path) -> Embed:
        """Load the program."""
        program = torch.export.load(directory / PROGRAM)
        device = next(iter(program.state_dict.values())).device
        module = program.module()

        def embed(images: Tensor) -> Tensor:
            return module(images.to(device)).cpu()  # type: ignore[no-any-return]

        return embed


@torch.no_grad()
def traced(model: MergedModel) -> ExportedProgram:
    """The encoder as a graph with its routing inside, for batches of any size.

    Routed layers leave the paths that look at a choice on the host when ``torch.compiler.is_compiling()``, as it is here.
    """
    example = torch.zeros(2, 3, *model.image_size, device=model.device)  # one image would make the batch a constant
    batch = torch.export.Dim("batch")
    program = torch.export.export(model.encoder, (example,), dynamic_shapes={"images": {0: batch}}, strict=False)
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule)]
    for node in (node for graph in graphs for node in graph.nodes):
        node.meta.pop("stack_trace", None)  # it names files of this machine, and would be saved
    return program
