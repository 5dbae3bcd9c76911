"""``peft``: the base in the layout of ``transformers``, a LoRA adapter for each expert, and a program that chooses among them."""

import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_vision.checkpoints import save_safetensors
from mergekit_vision.encoders.routed import Routing
from mergekit_vision.export.adapters import adapter, adapter_names
from mergekit_vision.export.agreement import largest_difference
from mergekit_vision.export.hf_layout import layout_faults
from mergekit_vision.export.huggingface import HuggingFace, quiet
from mergekit_vision.export.image_router import pack_router, router_faults
from mergekit_vision.export.merged import MergedModel
from mergekit_vision.export.peft_example import example
from mergekit_vision.export.writer import Embed, Writer
from mergekit_vision.support.json_files import write_json


class Peft(Writer):
    """A dynamic model as a static base and adapters, of which each image gets one.

    The adapters are exact: the base with one of them computes what the base with that expert in all layers does. The choice
    differs: routers choose anew in each layer, and here an image chooses once, by the sum of their scores of the base's tokens.
    """

    def faults(self, model: MergedModel) -> list[str]:
        """What ``CLIPModel`` cannot express, and experts that adapters cannot be."""
        if not model.routed:
            return ["a static model has no experts to write as adapters; export it to huggingface"]
        return [*layout_faults(model.backbone), *router_faults(model.routed)]

    def write(self, model: MergedModel, directory: Path) -> None:
        """Write base, adapters, router and example."""
        (directory / "base").mkdir()
        HuggingFace().write(model, directory / "base")
        tasks = list(model.record["experts"])
        names = adapter_names(tasks)
        for expert, name in enumerate(names):
            _write_adapter(model, expert, directory / "adapters" / name)
        tensors, kind = pack_router(model.routed)
        save_safetensors(directory / "router.safetensors", tensors)
        write_json(directory / "router.json", {"tasks": tasks, "adapters": names, **kind})
        (directory / "example.py").write_text(example(**kind), encoding="utf-8")

    def load(self, directory: Path) -> Embed:
        """The example's encoder, each image by the expert chosen for it."""
        encode: Callable[[Tensor], tuple[Tensor, Tensor]] = _run_example(directory)["encode"]
        return lambda images: encode(images)[0]

    def difference(self, model: MergedModel, directory: Path) -> float:
        """The largest difference of the base and of the base with each adapter, from ours with that expert in all layers."""
        program = _run_example(directory)
        with _route(model, None):
            found = [HuggingFace().difference(model, directory / "base")]
        for expert, name in enumerate(program["names"]):
            program["model"].set_adapter(name)
            with _route(model, expert):
                found.append(largest_difference(lambda images: _embeddings(program, images), model))
        return max(found)


def _write_adapter(model: MergedModel, expert: int, directory: Path) -> None:
    from peft import LoraConfig

    config, tensors = adapter(model.routed, expert)
    directory.mkdir(parents=True)
    LoraConfig(**config).save_pretrained(str(directory))
    save_safetensors(directory / "adapter_model.safetensors", tensors)


def _run_example(directory: Path) -> dict[str, Any]:
    """The names that the example defines. It makes ``transformers`` silent, here until it is loaded."""
    from transformers.utils import logging as module

    logging: Any = module
    level = logging.get_verbosity()
    try:
        with quiet():
            return runpy.run_path(str(directory / "example.py"))
    finally:
        logging.set_verbosity(level)


def _embeddings(program: dict[str, Any], images: Tensor) -> Tensor:
    embeddings: Tensor = program["model"](pixel_values=images).image_embeds
    return embeddings


@contextmanager
def _route(model: MergedModel, expert: int | None) -> Iterator[None]:
    """Send all images to one expert in all layers, or with ``None`` to the base alone, while the context is open."""
    routing = model.encoder.routing
    assert isinstance(routing, Routing)
    encoder: Any = model.encoder

    def all_to_one(_: object, inputs: tuple[Tensor]) -> None:
        routing.truth = torch.full((len(inputs[0]),), expert or 0)

    hook = encoder.register_forward_pre_hook(all_to_one)
    mode, routing.mode = routing.mode, "base" if expert is None else "oracle"
    try:
        yield
    finally:
        hook.remove()
        routing.mode, routing.truth = mode, None
