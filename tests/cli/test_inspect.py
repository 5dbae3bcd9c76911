"""``mergekit-vision inspect``."""

import json
from pathlib import Path

import pytest
import torch
from clip_models import open_clip_tower
from safetensors.torch import load_file, save_file
from tiny import content_of, write_file

from mergekit_vision.cli.main import main


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_an_expert_beside_its_backbone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expert = root / "experts" / "colors.safetensors"
    status, out, err = shown(capsys, expert, "--suite", root / "suite.yaml")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"file          {expert}, ")
    assert lines[1].startswith("container     safetensors: ")
    assert lines[2] == "holds         weights (open_clip), names visual.*"
    assert lines[3] == "architecture  width 32, patch size 8, image size 16, embedding 32, layers 2"
    assert "cosine 0.9" in lines[4]
    assert [line.split()[0] for line in lines[-2:]] == ["0", "1"]
    assert "█" in out


def test_what_it_prints_can_be_read_by_programs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {key: value for key, value in load_file(root / "base" / "open_clip_model.safetensors").items() if "visual" in key}
    key = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    save_file({**base, key: 1.5 * base[key]}, root / "x.safetensors")
    status, out, _ = shown(capsys, root / "x.safetensors", "-s", root / "suite.yaml", "--json")
    found = json.loads(out)
    assert status == 0
    changed = {name: value for name, value in found["changes"].items() if value}
    assert changed == {"visual.transformer.resblocks.1.mlp.c_fc": pytest.approx(0.5)}
    assert found["dtypes"] == {"float32": len(base)}
    assert found["numbers"] == sum(value.numel() for value in base.values())


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", ["attn.out_proj", "mlp.c_fc"])
def test_weights_that_are_no_numbers_are_shown_and_refused(
    root: Path, capsys: pytest.CaptureFixture[str], layer: str, odd: float
) -> None:
    base = {key: value for key, value in load_file(root / "base" / "open_clip_model.safetensors").items() if "visual" in key}
    base[f"visual.transformer.resblocks.1.{layer}.weight"][0, 0] = odd
    save_file(base, root / "x.safetensors")
    status, out, err = shown(capsys, root / "x.safetensors", "-s", root / "suite.yaml")
    assert (status, out.count("!")) == (1, 1)
    assert f"resblocks.1.{layer}.weight holds NaN or infinity; fine-tune it again" in err


def test_json_has_null_where_there_is_no_number(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {key: value for key, value in load_file(root / "base" / "open_clip_model.safetensors").items() if "visual" in key}
    for name, value in base.items():
        if value.ndim == 2:
            base[name] = torch.full_like(value, float("nan"))
    save_file(base, root / "x.safetensors")
    status, out, err = shown(capsys, root / "x.safetensors", "-s", root / "suite.yaml", "--json")
    found = json.loads(out, parse_constant=pytest.fail)  # NaN and Infinity
    assert (status, set(found["changes"].values()), set(found["whole"].values())) == (1, {None}, {None})
    assert "more tensors; fine-tune it again" in err


@pytest.mark.parametrize(
    "change",
    [
        {"proj": torch.tensor(1.0)},
        {"positional_embedding": torch.zeros(0, 8)},
        {"positional_embedding": torch.tensor(0.0)},
        {"transformer.resblocks.last.ln_1.bias": torch.zeros(8)},
        {"transformer.resblocks." + "9" * 500 + ".ln_1.bias": torch.zeros(8)},
    ],
)
def test_towers_of_odd_shapes_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, torch.Tensor]
) -> None:
    tensors = {"conv1.weight": torch.zeros(8, 3, 2, 2), "class_embedding": torch.zeros(8), **change}
    save_file({f"visual.{name}": value for name, value in tensors.items()}, tmp_path / "x.safetensors")
    status, out, err = shown(capsys, tmp_path / "x.safetensors")
    assert (status, err) == (0, "")
    assert "architecture  width 8, patch size 2" in out


def test_a_model_that_open_clip_knows_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = {"conv1.weight": (768, 3, 32, 32), "positional_embedding": (50, 768), "proj": (768, 512), "class_embedding": (768,)}
    tensors = {f"visual.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    tensors |= {f"visual.transformer.resblocks.{block}.ln_1.bias": torch.zeros(768) for block in range(12)}
    save_file(tensors, tmp_path / "x.safetensors")
    _, out, _ = shown(capsys, tmp_path / "x.safetensors")
    assert "as ViT-B-32, ViT-B-32-quickgelu" in out


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"weight": torch.zeros(2, 2)}, "holds a classification head"),
        ({"visual.conv1.weight": torch.zeros(32, 3, 8, 8)}, "lacks visual.class_embedding"),
    ],
)
def test_why_it_is_refused_comes_after_what_it_is(
    root: Path, capsys: pytest.CaptureFixture[str], content: dict[str, torch.Tensor], reason: str
) -> None:
    save_file(content, root / "x.safetensors")
    status, out, err = shown(capsys, root / "x.safetensors", "--suite", root / "suite.yaml")
    assert status == 1
    assert out.splitlines()[1].startswith("container     safetensors: 1 tensors")
    assert err.startswith("mergekit-vision: error: not an expert: ")
    assert reason in err


@pytest.mark.parametrize(
    ("argument", "hint"), [("none.pt", "cannot be read"), ("hf-hub:x", "must be hf-hub:org/name"), ("--json", "required")]
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], argument: str, hint: str) -> None:
    status, out, err = shown(capsys, argument)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert hint in err


def test_what_the_suite_says_of_an_expert_holds(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = load_file(root / "base" / "open_clip_model.safetensors")
    delta = {key: 0.01 * torch.ones_like(value) for key, value in base.items() if "visual" in key}
    save_file(delta, root / "delta.safetensors")
    content = content_of(root)
    content["tasks"]["colors"]["expert"] = {"path": "delta.safetensors", "kind": "delta"}
    suite = write_file(root, content)
    assert shown(capsys, root / "delta.safetensors", "--suite", suite)[0] == 0
    content["tasks"]["colors"]["expert"] = "experts/colors.safetensors"
    status, _, err = shown(capsys, root / "delta.safetensors", "--suite", write_file(root, content))
    assert status == 1
    assert "say `kind: delta`" in err


def test_a_suite_whose_class_names_come_from_code(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "their_images.py").write_text(
        "import torch.utils.data\n"
        "class Images(torch.utils.data.Dataset):\n"
        "    classes = ['black', 'white']\n"
        "    def __len__(self):\n        return 0\n"
        "    def __getitem__(self, index):\n        raise IndexError\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    content = content_of(root)
    content["tasks"]["grays"]["data"] = {"test": {"torchvision": "their_images.Images", "args": {}}}
    del content["tasks"]["grays"]["classes"]
    arguments = (root / "experts" / "colors.safetensors", "-s", write_file(root, content))
    status, _, err = shown(capsys, *arguments)
    assert (status, "--allow-code" in err) == (1, True)
    status, out, err = shown(capsys, *arguments, "--allow-code")
    assert (status, err) == (0, "")
    assert "cosine 0.9" in out


def test_another_architecture_is_told_by_its_sizes(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower = open_clip_tower()
    save_file({f"visual.{key}": value for key, value in tower.state_dict().items()}, tmp_path / "x.safetensors")
    _, _, err = shown(capsys, tmp_path / "x.safetensors", "--suite", root / "suite.yaml")
    assert err.endswith("x.safetensors is of another architecture: embedding 24, where the backbone has embedding 32\n")


def test_an_expert_that_equals_the_backbone_is_remarked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = shown(capsys, root / "base", "--suite", root / "suite.yaml")
    assert "remark        it equals the backbone" in out
