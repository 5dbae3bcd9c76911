"""A merged model as a directory: what is written is what is loaded, whole or not at all."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tolerances import assert_near, forward

from mergekit_vision import InputError, MergedCLIP, Merger, Trainer, VisionTasks, load
from mergekit_vision.export.directory import check_output, load_experts
from mergekit_vision.export.manifest import read_record
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.esmpp import ESMPP, ESMPPBayes
from mergekit_vision.plugins.esmppfit import ESMPPFit
from mergekit_vision.plugins.smile import SMILE
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(default_root_dir=str(tmp_path / "out"), accelerator="cpu")


def test_saved_model_reproduces_the_logits_bit_for_bit(trainer: Trainer, tiny_suite: Path) -> None:
    model = MergedCLIP(ESM(), scale=0.7)
    trainer.merge(model, VisionTasks(str(tiny_suite)))
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(load(trainer.default_root_dir)(images), model.encoder(images))


@pytest.mark.parametrize(
    "merger",
    [
        ESMPP(rank=4),
        ESMPPBayes(rank=4),
        ESMPPFit(rank=4),
        SMILE(rank=4, gate_rank=2),
        SMILE(rank=4, gate_rank=2, rule="mass", decision="once", held_layer=5),
    ],
    ids=["ESMPP", "ESMPPBayes", "ESMPPFit", "SMILE", "once"],
)
def test_a_dynamic_model_is_loaded_bit_for_bit(trainer: Trainer, tiny_suite: Path, merger: Merger) -> None:
    model = MergedCLIP(merger, scale=0.7)
    trainer.merge(model, VisionTasks(str(tiny_suite)))
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    loaded = load(trainer.default_root_dir)
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(images), model.encoder.encode_image(images))
        # alone, in another batch, in another order: the same image, the same result
        for rows in ([3], [5, 3, 0], [3, 3, 1, 2, 4]):
            expected = loaded.encode_image(images)[rows]
            assert_near(loaded.encode_image(images[rows]), expected, forward(2 * 8 + 2, 128))


def test_loaded_experts_lie_on_the_boundaries_that_products_are_fast_and_alike_on(trainer: Trainer, tiny_suite: Path) -> None:
    trainer.merge(MergedCLIP(SMILE(rank=3, gate_rank=1)), VisionTasks(str(tiny_suite)))
    for experts in load_experts(Path(trainer.default_root_dir)).values():
        tensors = (experts.up, experts.down, experts.bias, *experts.router.buffers())
        assert not any(tensor.data_ptr() % 64 for tensor in tensors if tensor is not None)


def test_a_static_merge_over_a_dynamic_one_leaves_no_experts_behind(trainer: Trainer, tiny_suite: Path) -> None:
    directory = Path(trainer.default_root_dir)
    trainer.merge(MergedCLIP(ESMPP(rank=2)), VisionTasks(str(tiny_suite)))
    assert (directory / "experts.safetensors").is_file()
    Trainer(default_root_dir=str(directory)).merge(MergedCLIP(TaskArithmetic()), VisionTasks(str(tiny_suite)))
    assert not list(directory.glob("experts*"))
    assert load(directory).routing is None


def test_an_interrupted_save_leaves_the_old_model_whole(
    trainer: Trainer, tiny_suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.merge(MergedCLIP(TaskArithmetic()), VisionTasks(str(tiny_suite)))
    directory = Path(trainer.default_root_dir)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("mergekit_vision.export.directory.model_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Trainer(default_root_dir=str(directory)).merge(MergedCLIP(ESMPP(rank=2)), VisionTasks(str(tiny_suite)))
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_a_directory_is_complete_and_says_how_it_was_made(trainer: Trainer, tiny_suite: Path) -> None:
    directory = Path(trainer.default_root_dir)
    trainer.merge(MergedCLIP(TaskArithmetic(), scale=0.5), VisionTasks(str(tiny_suite)))
    static = {"README.md", "merge.json", "open_clip_config.json", "open_clip_model.safetensors"}
    assert {path.name for path in directory.iterdir()} == static
    record = read_record(directory)
    assert (record["scale"], record["merger"]["name"], record["suite"]) == (0.5, "TaskArithmetic", "tiny")
    assert load_experts(directory) == {}
    assert "TaskArithmetic" in (directory / "README.md").read_text()
    Trainer(default_root_dir=str(directory)).merge(MergedCLIP(SMILE(rank=2)), VisionTasks(str(tiny_suite)))
    assert {path.name for path in directory.iterdir()} == static | {"experts.safetensors", "experts.json"}
    assert len(load_experts(directory)) == 8


def test_a_model_that_was_not_merged_here_is_not_written_over(tmp_path: Path) -> None:
    check_output(tmp_path / "new")
    check_output(tmp_path)
    (tmp_path / "open_clip_model.safetensors").touch()
    with pytest.raises(InputError, match=r"holds open_clip_model.safetensors that was not written here") as caught:
        check_output(tmp_path)
    assert caught.value.of == "trainer"
    (tmp_path / "merge.json").touch()
    check_output(tmp_path)
    with pytest.raises(InputError, match="is a file; name a directory"):
        check_output(tmp_path / "merge.json")
    (tmp_path / "experts.json").mkdir()
    with pytest.raises(InputError, match=r"experts\.json is a directory, and a file must go there"):
        check_output(tmp_path)
    (tmp_path / "experts.json").rmdir()
    (tmp_path / ".mergekit-vision").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"\.mergekit-vision must be a directory, for temporary files"):
        check_output(tmp_path)


def configure(root: Path, section: str, **values: object) -> VisionTasks:
    """Change the configuration of a suite's backbone; the suite."""
    file = root / "base" / "open_clip_config.json"
    content = json.loads(file.read_text())
    (content | content["model_cfg"])[section].update(values)
    file.write_text(json.dumps(content))
    return VisionTasks(str(root / "suite.yaml"), tasks=["colors"])


def test_the_color_of_borders_is_kept(trainer: Trainer, root: Path) -> None:
    data = configure(root, "preprocess_cfg", resize_mode="longest", fill_color=128)
    trainer.merge(MergedCLIP(TaskArithmetic()), data)
    Trainer(default_root_dir=trainer.default_root_dir).test(MergedCLIP(merged=trainer.default_root_dir), data)


def test_a_tokenizer_that_cannot_be_had_is_missed_before_merging(
    trainer: Trainer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(TaskArithmetic, "merge", lambda *_: pytest.fail("too late"))
    with pytest.raises(InputError, match=r"its tokenizer needs a library that is missing .*pip install 'mergekit-vision\[hf\]'"):
        trainer.merge(MergedCLIP(TaskArithmetic()), configure(root, "text_cfg", hf_tokenizer_name="bert"))


def test_a_tokenizer_replaces_no_file_of_the_users(trainer: Trainer, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But that of the merge before."""
    tokenizer = SimpleNamespace(save_pretrained=lambda place: (place / "tokenizer.json").write_text("{}"))
    monkeypatch.setattr("mergekit_vision.export.directory.load_tokenizer", lambda _: tokenizer)
    data, model = configure(root, "text_cfg", hf_tokenizer_name="bert"), MergedCLIP(TaskArithmetic())
    for _ in range(2):
        trainer.merge(model, data)
    mine = root / "mine" / "tokenizer.json"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(InputError, match=r"mine: holds tokenizer\.json, a name that the model's tokenizer has too"):
        model.save(mine.parent)
    monkeypatch.setattr(TaskArithmetic, "merge", lambda *_: pytest.fail("too late"))
    with pytest.raises(InputError, match=r"mine: holds tokenizer\.json, .*; move it, or name another directory"):
        Trainer(default_root_dir=str(mine.parent)).merge(MergedCLIP(TaskArithmetic()), data)
    assert [(path.name, path.read_text()) for path in mine.parent.iterdir()] == [("tokenizer.json", "mine")]


def test_a_directory_that_is_no_merged_model_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a merged model \(merge\.json is missing\)"):
        load(tmp_path)
    (tmp_path / "merge.json").write_text("{")
    with pytest.raises(InputError, match=r"merge\.json: not valid JSON .*; merge again"):
        read_record(tmp_path)


def test_experts_that_are_not_whole_are_one_clear_error(trainer: Trainer, tiny_suite: Path) -> None:
    directory = Path(trainer.default_root_dir)
    trainer.merge(MergedCLIP(SMILE(rank=2)), VisionTasks(str(tiny_suite)))
    content = (directory / "experts.safetensors").read_bytes()
    (directory / "experts.safetensors").write_bytes(content[:-10])
    with pytest.raises(InputError, match=r"damaged .*; merge again"):
        load_experts(directory)
    (directory / "experts.safetensors").unlink()
    with pytest.raises(InputError, match=r"experts\.safetensors: missing, but the other file of the experts is there"):
        load_experts(directory)
    (directory / "experts.safetensors").write_bytes(content)
    routers = json.loads((directory / "experts.json").read_text())
    (directory / "experts.json").write_text(json.dumps({"nowhere": next(iter(routers.values()))}))
    with pytest.raises(InputError, match="do not belong together"):
        load_experts(directory)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "README.md", "open_clip_model.safetensors", "pytorch_model.bin"]
)
def test_files_of_others_are_never_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=rf"holds {re.escape(name)} that was not written here \(merge\.json is missing\)"):
        check_output(tmp_path)
    (tmp_path / name).rename(tmp_path / "notes.txt")
    check_output(tmp_path)
