"""The LightningModule used from Python."""

import json
from pathlib import Path

import lightning
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mergekit_vision import InputError, MergedCLIP, MergeInputs, Merger, Trainer, VisionTasks, load
from mergekit_vision.merger import Merged
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.esmpp import ESMPP, ESMPPBayes
from mergekit_vision.plugins.smile import SMILE
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic


class Counting(Merger):
    """Task arithmetic that says how often it merged, and observes what it is told to."""

    def __init__(self, observe: bool = False) -> None:
        self.observe = observe
        self._merges = 0
        self._rows: dict[str, int] = {}

    def merge(self, inputs: MergeInputs) -> Merged:
        self._merges += 1
        if self.observe:
            for task in inputs.tasks:
                inputs.observe(task, {inputs.linears[0]: lambda x, task=task: self._count(task, len(x))})
        return Merged({key: inputs.deltas(key).sum(0) for key in inputs.base}, scale=0.3)

    def _count(self, task: str, images: int) -> None:
        self._rows[task] = self._rows.get(task, 0) + images


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(default_root_dir=str(tmp_path / "out"), accelerator="cpu")


def test_merges_once_for_search_validation_and_test(trainer: Trainer, tiny_suite: Path) -> None:
    merger = Counting()
    model, data = MergedCLIP(merger, scale="search"), VisionTasks(str(tiny_suite))
    trainer.validate(model, data)
    trainer.test(model, data)
    assert merger._merges == 1
    assert set(model.expert_accuracy) == {"val", "test"}


def test_proxies_run_in_batches_and_only_as_many_as_asked_for(trainer: Trainer, tiny_suite: Path) -> None:
    from mergekit_vision import Proxies

    merger = Counting(observe=True)
    trainer.test(MergedCLIP(merger), VisionTasks(str(tiny_suite), batch_size=4, proxies=Proxies(n=10)))
    assert set(merger._rows.values()) == {10}


def test_works_with_lightnings_own_trainer(tmp_path: Path, tiny_suite: Path) -> None:
    trainer = lightning.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.test(MergedCLIP(TaskArithmetic()), VisionTasks(str(tiny_suite)), verbose=False)
    assert json.loads((tmp_path / "results.json").read_text())["merger"]["name"] == "TaskArithmetic"


def test_saved_model_reproduces_the_logits_bit_for_bit(trainer: Trainer, tiny_suite: Path) -> None:
    model = MergedCLIP(ESM(), scale=0.7)
    trainer.merge(model, VisionTasks(str(tiny_suite)))
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(load(trainer.default_root_dir)(images), model.encoder(images))


def test_the_backbone_is_what_coefficient_zero_gives(trainer: Trainer, tiny_suite: Path) -> None:
    import open_clip

    model = MergedCLIP(TaskArithmetic(), scale=0.0)
    data = VisionTasks(str(tiny_suite))
    trainer.merge(model, data)
    backbone = open_clip.create_model(data.suite.backbone).eval()
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(images), backbone.encode_image(images), rtol=1e-5, atol=1e-6)


def test_a_proxy_batch_size_changes_nothing(tmp_path: Path, tiny_suite: Path) -> None:
    encoders = []
    for batch_size in (3, 64):
        model = MergedCLIP(ESM())
        Trainer(default_root_dir=str(tmp_path), accelerator="cpu").merge(
            model, VisionTasks(str(tiny_suite), batch_size=batch_size)
        )
        encoders.append(model.encoder.weights())
    for key, value in encoders[0].items():
        torch.testing.assert_close(encoders[1][key], value, rtol=1e-4, atol=1e-6)


def test_arguments_that_contradict_each_other(trainer: Trainer, tiny_suite: Path) -> None:
    with pytest.raises(InputError, match="one of"):
        trainer.test(MergedCLIP(), VisionTasks(str(tiny_suite)))
    with pytest.raises(InputError, match="one of"):
        MergedCLIP(ESM(), merged="somewhere")
    with pytest.raises(InputError, match="in its weights"):
        MergedCLIP(merged="somewhere", scale=0.5)


def test_needs_its_own_data_module(trainer: Trainer) -> None:
    with pytest.raises(InputError, match="VisionTasks"):
        trainer.test(MergedCLIP(TaskArithmetic()), lightning.LightningDataModule())


class Broken(Merger):
    """Returns what a careless plugin might."""

    def __init__(self, how: str) -> None:
        self.how = how

    def merge(self, inputs: MergeInputs) -> Merged:
        key = "visual.proj"
        update = inputs.deltas(key).sum(0)
        return Merged(
            {
                "unknown key": {"visual.nothing": update},
                "wrong shape": {key: update[:1]},
                "not a number": {key: update * float("nan")},
            }[self.how]
        )


@pytest.mark.parametrize(
    ("how", "message"),
    [("unknown key", "visual.nothing, which"), ("wrong shape", r"\(1, 32\), not \(32, 32\)"), ("not a number", "NaN")],
)
def test_what_a_plugin_must_not_return(trainer: Trainer, tiny_suite: Path, how: str, message: str) -> None:
    with pytest.raises(InputError, match=f"Broken returned .*{message}"):
        trainer.test(MergedCLIP(Broken(how)), VisionTasks(str(tiny_suite)))


def test_an_expert_with_nan_is_named(trainer: Trainer, tiny_suite: Path) -> None:
    content = yaml.safe_load(tiny_suite.read_text())
    task = content["tasks"]["stripes"]
    weights = load_file(tiny_suite.parent / task["expert"])
    weights["proj"][3, 4] = float("nan")
    save_file(weights, tiny_suite.parent / "experts" / "spoiled.safetensors")
    task["expert"] = "experts/spoiled.safetensors"
    spoiled = tiny_suite.with_name("spoiled.yaml")
    spoiled.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=r"task stripes holds NaN or infinity in visual\.proj"):
        trainer.test(MergedCLIP(TaskArithmetic()), VisionTasks(str(spoiled)))


def test_a_model_merged_from_another_backbone_is_refused(trainer: Trainer, tiny_suite: Path, tmp_path: Path) -> None:
    trainer.merge(MergedCLIP(TaskArithmetic()), VisionTasks(str(tiny_suite)))
    directory = Path(trainer.default_root_dir)
    config = json.loads((directory / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.0, 0.0, 0.0]
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="another backbone"):
        Trainer(default_root_dir=str(tmp_path / "t")).test(MergedCLIP(merged=str(directory)), VisionTasks(str(tiny_suite)))


def test_a_static_merge_over_a_dynamic_one_leaves_no_experts_behind(trainer: Trainer, tiny_suite: Path) -> None:
    directory = Path(trainer.default_root_dir)
    trainer.merge(MergedCLIP(ESMPP(rank=2)), VisionTasks(str(tiny_suite)))
    assert (directory / "experts.safetensors").is_file()
    Trainer(default_root_dir=str(directory)).merge(MergedCLIP(TaskArithmetic()), VisionTasks(str(tiny_suite)))
    assert not list(directory.glob("experts*"))
    assert load(directory).routing is None


@pytest.mark.parametrize(
    "merger", [ESMPP(rank=4), ESMPPBayes(rank=4), SMILE(rank=4, gate_rank=2)], ids=lambda m: type(m).__name__
)
def test_a_dynamic_model_is_loaded_bit_for_bit(trainer: Trainer, tiny_suite: Path, merger: Merger) -> None:
    model = MergedCLIP(merger, scale=0.7)
    trainer.merge(model, VisionTasks(str(tiny_suite)))
    images = torch.randn(6, 3, 16, 16)
    loaded = load(trainer.default_root_dir)
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(images), model.encoder.encode_image(images))
        # alone, in another batch, in another order: the same image, the same result
        for rows in ([3], [5, 3, 0], [3, 3, 1, 2, 4]):
            expected = loaded.encode_image(images)[rows]
            torch.testing.assert_close(loaded.encode_image(images[rows]), expected, rtol=1e-4, atol=1e-4)


def test_routes_of_a_dynamic_model(tmp_path: Path, tiny_suite: Path) -> None:
    found = {}
    for route in ("router", "oracle", "base"):
        place = tmp_path / route
        model = MergedCLIP(ESMPP(rank=32, layers=("in_proj", "out_proj", "c_fc", "c_proj")), scale=1.0, route=route)
        Trainer(default_root_dir=str(place), accelerator="cpu").test(model, VisionTasks(str(tiny_suite)))
        found[route] = json.loads((place / "results.json").read_text())
        assert (place / "routing.png").exists() == (route == "router")
        assert found[route]["route"] == route
    shares = found["router"]["routing"]
    assert len(shares) == 8
    assert all(0 <= share <= 1 for layer in shares.values() for share in layer.values())
    static = MergedCLIP(ESM(), scale=1.0)
    Trainer(default_root_dir=str(tmp_path / "static"), accelerator="cpu").test(static, VisionTasks(str(tiny_suite)))
    assert found["base"]["tasks"] == json.loads((tmp_path / "static" / "results.json").read_text())["tasks"]


def test_a_static_model_has_no_other_route(trainer: Trainer, tiny_suite: Path) -> None:
    with pytest.raises(InputError, match="no routed experts"):
        trainer.test(MergedCLIP(TaskArithmetic(), route="oracle"), VisionTasks(str(tiny_suite)))


def test_an_interrupted_save_leaves_the_old_model_whole(
    trainer: Trainer, tiny_suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer.merge(MergedCLIP(TaskArithmetic()), VisionTasks(str(tiny_suite)))
    directory = Path(trainer.default_root_dir)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("mergekit_vision.export.model_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Trainer(default_root_dir=str(directory)).merge(MergedCLIP(ESMPP(rank=2)), VisionTasks(str(tiny_suite)))
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
