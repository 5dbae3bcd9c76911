"""Dynamic models as adapters: what ``transformers`` and ``peft`` make of them."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mergekit_vision.cli.main import main
from mergekit_vision.encoders.routed import RoutedLinear
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.export.adapters import adapter
from mergekit_vision.export.directory import load
from mergekit_vision.export.exporting import export_model
from mergekit_vision.export.image_router import router_faults
from mergekit_vision.export.peft import Peft
from mergekit_vision.export.peft_example import example
from mergekit_vision.routers import CosineRouter, ExpertDtype, LinearRouter, LowRankExperts, Router

pytest.importorskip("peft")
pytest.importorskip("transformers")

OPTIONS = {
    "SMILE": ["--merger.rank", "4", "--merger.gate_rank", "2"],
    "ESMPP": ["--merger.rank", "4", "--proxies", "4"],
    "ESMPPBayes": ["--merger.rank", "4", "--proxies", "4"],
}
ONCE = ["--merger.decision", "once", "--merger.rule", "sim", "--merger.statistics", "base", "--merger.gate_rank", "2"]


@pytest.fixture(scope="module")
def adapted(tiny_suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[VisionEncoder, Path]]:
    """The merged encoder of a method, and the directory it was exported to; both made once."""
    root = tmp_path_factory.mktemp("peft")

    def export(method: str) -> tuple[VisionEncoder, Path]:
        merged, output = root / method, root / f"{method}-peft"
        if not output.exists():
            assert main(["merge", "-s", str(tiny_suite), "-m", method, *OPTIONS[method], "-o", str(merged)]) == 0
            assert export_model(merged, "peft", output) < 1e-5
        return load(merged), output

    return export


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_expert(encoder: VisionEncoder, pixels: Tensor, experts: Tensor) -> Tensor:
    """Embeddings by our encoder, each image with its expert in all layers."""
    assert encoder.routing
    encoder.routing.mode, encoder.routing.truth = "oracle", experts
    return encoder(pixels)  # type: ignore[no-any-return]


@torch.no_grad()
def summed_scores(encoder: VisionEncoder, pixels: Tensor) -> Tensor:
    """Sum over the deciding layers of our own routers' scores of the base's tokens, ``[N, T]``."""
    assert encoder.routing
    encoder.routing.mode = "base"
    scores: list[Tensor] = []
    layers = [module for module in encoder.modules() if isinstance(module, RoutedLinear) and module.evidence != "hold"]
    hooks = [layer.register_forward_pre_hook(lambda own, x: scores.append(own.router(x[0]).mean(1))) for layer in layers]
    encoder(pixels)
    for hook in hooks:
        hook.remove()
    return torch.stack(scores).sum(0)


@pytest.mark.parametrize("method", OPTIONS)
def test_each_adapter_is_its_expert(adapted: Callable[[str], tuple[VisionEncoder, Path]], method: str) -> None:
    from peft import PeftModel
    from transformers import CLIPVisionModelWithProjection

    encoder, place = adapted(method)
    pixels = images(3)
    found = []
    for expert, name in enumerate(json.loads((place / "router.json").read_text())["adapters"]):
        base: Any = CLIPVisionModelWithProjection.from_pretrained(place / "base")
        with torch.no_grad():
            before = base.eval()(pixel_values=pixels).image_embeds
            model: Any = PeftModel.from_pretrained(base, str(place / "adapters" / name)).eval()
            found.append(model(pixel_values=pixels).image_embeds)
        torch.testing.assert_close(found[-1], by_expert(encoder, pixels, torch.full((3,), expert)), rtol=1e-5, atol=1e-5)
        assert (found[-1] - before).norm() > 1e-2 * before.norm()
    assert (found[0] - found[1]).norm() > 1e-2 * found[0].norm()


@pytest.mark.parametrize("method", OPTIONS)
def test_an_image_gets_the_expert_with_the_largest_sum_of_scores(
    adapted: Callable[[str], tuple[VisionEncoder, Path]], method: str
) -> None:
    encoder, place = adapted(method)
    scores = summed_scores(encoder, images(40))
    best = scores.topk(2).values
    clear = images(40)[best[:, 0] - best[:, 1] > 1e-4 * scores.abs().max()]  # where rounding does not decide
    chosen = summed_scores(encoder, clear).argmax(-1)
    assert len(clear) > 20
    assert len(chosen.unique()) > 1
    torch.testing.assert_close(Peft().load(place)(clear), by_expert(encoder, clear, chosen), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ESMPP", [*OPTIONS["ESMPP"], *ONCE, "--merger.pooling", "[mean, deviation]"]),
        ("ESMPPFit", ["--merger.rank", "3", "--merger.top_k", "1"]),
    ],
)
def test_a_model_that_decides_once_computes_what_its_adapters_do(
    tiny_suite: Path, tmp_path: Path, method: str, options: list[str]
) -> None:
    assert main(["merge", "-s", str(tiny_suite), "-m", method, *options, "-o", str(tmp_path / "merged")]) == 0
    assert export_model(tmp_path / "merged", "peft", tmp_path / "adapted") < 1e-5
    with torch.no_grad():
        expected = load(tmp_path / "merged")(images(40))
    chosen = summed_scores(load(tmp_path / "merged"), images(40)).argmax(-1)
    assert len(chosen.unique()) > 1
    torch.testing.assert_close(Peft().load(tmp_path / "adapted")(images(40)), expected, rtol=1e-5, atol=1e-5)


def test_the_example_runs_without_this_package(
    adapted: Callable[[str], tuple[VisionEncoder, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, place = adapted("ESMPP")
    paths = [tmp_path / f"{color}.png" for color in ("red", "blue")]
    for path in paths:
        Image.new("RGB", (20, 24), path.stem).save(path)
    program = place / "example.py"
    assert "mergekit_vision" not in program.read_text()
    monkeypatch.setattr(sys, "argv", [str(program), *map(str, paths)])
    capsys.readouterr()
    runpy.run_path(str(program), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == [str(path) for path in paths]
    assert all(line.split()[1] in ("0-colors", "1-grays", "2-stripes") for line in printed)


def experts(d_out: int, d_in: int, rank: int, bias: bool = False) -> LowRankExperts:
    generator = torch.Generator().manual_seed(d_out + rank)
    up, down = torch.randn(2, d_out, rank, generator=generator), torch.randn(2, rank, d_in, generator=generator)
    shift = torch.randn(2, d_out, generator=generator) if bias else None
    return LowRankExperts(up, down, CosineRouter(torch.eye(2, d_in)), shift)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_and_biases_arrive_in_every_layer(dtype: ExpertDtype, tmp_path: Path) -> None:
    """By peft's own computation, layer by layer, where layers and experts differ in rank and some shift no bias."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    block = "visual.transformer.resblocks.0."
    routed = {
        f"{block}attn.in_proj": experts(24, 8, 3, bias=True),
        f"{block}attn.out_proj": experts(8, 8, 2),
        f"{block}mlp.c_fc": experts(16, 8, 3),
        f"{block}mlp.c_proj": experts(8, 16, 5, bias=True),
    }
    routed[f"{block}mlp.c_fc"].up[1, :, 1:] = routed[f"{block}mlp.c_fc"].down[1, 1:] = 0  # of lower rank than the other expert
    routed = {name: layer.rounded(dtype) for name, layer in routed.items()}
    config, tensors = adapter(routed, 1)
    assert {str(tensor.dtype) for name, tensor in tensors.items() if "lora_A.weight" in name} == {f"torch.{dtype}"}
    assert config["lora_alpha"] == config["r"] == 3
    assert sorted(config["rank_pattern"].values()) == [1, 2, 5]
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=8))
    model: Any = get_peft_model(base, LoraConfig(**config))
    loaded = set_peft_model_state_dict(model, tensors)
    assert not loaded.unexpected_keys
    x, y = torch.randn(5, 8), torch.randn(5, 16)
    layer = base.vision_model.encoder.layers[0]
    theirs = {
        "attn.in_proj": [getattr(layer.self_attn, f"{role}_proj") for role in "qkv"],
        "attn.out_proj": [layer.self_attn.out_proj],
        "mlp.c_fc": [layer.mlp.fc1],
        "mlp.c_proj": [layer.mlp.fc2],
    }
    for name, modules in theirs.items():
        own, inputs = routed[block + name], y if name == "mlp.c_proj" else x
        added = torch.cat([module(inputs) - module.base_layer(inputs) for module in modules], dim=-1)
        expected = inputs.double() @ (own.up[1].double() @ own.down[1].double()).T
        expected += 0 if own.bias is None else own.bias[1].double()
        assert (added.double() - expected).norm() < 1e-6 * expected.norm(), name


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [
        ("cosine", []),
        ("linear", ["mean"]),
        ("linear", ["mean", "deviation", "first", "covariance"]),
        ("projection", []),
        ("subspace", ["mean", "deviation"]),
    ],
)
def test_the_example_is_written_well_and_short(tmp_path: Path, kind: str, pooling: list[str]) -> None:
    (tmp_path / "example.py").write_text(example(kind, pooling))
    lines = [line for line in example(kind, pooling).splitlines() if line and not line.startswith(("import ", "from "))]
    assert len(lines) <= 39
    for command in (["format", "--check"], ["check"]):
        checked = subprocess.run([sys.executable, "-m", "ruff", *command, "--isolated", "--line-length", "130", tmp_path])
        assert checked.returncode == 0, command


class Other(Router):
    """A router of somebody else's."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1, :2]


def test_what_cannot_be_adapters_is_refused(tiny_suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = experts(8, 8, 2)
    (fault,) = router_faults({"layer": LowRankExperts(layer.up, layer.down, Other())})
    assert fault.startswith(
        "its router Other cannot be written; only CosineRouter, LinearRouter, ProjectionRouter, SubspaceRouter can"
    )
    linear = LowRankExperts(layer.up, layer.down, LinearRouter(torch.ones(2, 8), torch.zeros(2)))
    (fault,) = router_faults({"layer": layer, "other": linear})
    assert "routers of several kinds" in fault
    assert main(["merge", "-s", str(tiny_suite), "-m", "Average", "-o", str(tmp_path / "static")]) == 0
    assert main(["export", "--merged", str(tmp_path / "static"), "--to", "peft", "-o", str(tmp_path / "out")]) == 1
    assert "a static model has no experts to write as adapters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
