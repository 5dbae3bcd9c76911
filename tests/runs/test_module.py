"""The LightningModule used from Python."""

import json
from collections.abc import Callable
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
import yaml
from loading import Fetched, all_fetched, changed
from safetensors.torch import load_file, save_file
from tiny import TASKS, content_of, picture, write_file, write_parquet
from tolerances import assert_near, forward

from mergekit_vision import InputError, MergedCLIP, MergeInputs, Merger, Proxies, Trainer, VisionTasks
from mergekit_vision.evaluation.evaluator import Evaluator, Runtime
from mergekit_vision.merger import Merged
from mergekit_vision.merging.recipe import Recipe
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.plugins.average import Average
from mergekit_vision.plugins.emr import EMR
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.smile import SMILE
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.plugins.ties import TIES
from mergekit_vision.plugins.trim import Trim
from mergekit_vision.runs.comparison import Comparison
from mergekit_vision.runs.tuning import Tuning
from mergekit_vision.sources.folder import FlatFolder


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
                inputs.observe(task, {inputs.linears[0].name: lambda x, task=task: self._count(task, len(x))})
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


def test_another_suite_is_refused_for_a_model_that_is_set_up(trainer: Trainer, root: Path) -> None:
    """Heads and experts are of the first; images, and which tasks are evaluated, may differ."""
    model = MergedCLIP(TaskArithmetic())
    trainer.test(model, VisionTasks(str(root / "suite.yaml")))
    content = content_of(root)
    content["tasks"]["grays"]["classes"].reverse()
    content["tasks"]["unseen"] = content["tasks"].pop("colors")
    other = VisionTasks(str(write_file(root, content)))
    for use in (trainer.validate, trainer.test, trainer.merge):
        with pytest.raises(InputError, match=r"differs from the suite .* in task grays, task unseen; make a new"):
            use(model, other)


def test_experts_are_measured_on_the_tasks_images_and_precision_at_hand(trainer: Trainer, root: Path) -> None:
    model, place = MergedCLIP(TaskArithmetic()), root / "data" / "grays" / "test.parquet"
    trainer.test(model, VisionTasks(str(root / "suite.yaml"), tasks=["grays"]))
    before = model.expert_accuracy["test"]
    trainer.test(model, VisionTasks(str(root / "suite.yaml")))
    assert list(model.expert_accuracy["test"]) == list(TASKS)
    assert model.expert_accuracy["test"]["grays"] == before["grays"]
    write_parquet(place, "grays", TASKS["grays"][0], 1, seed=0)
    trainer.test(model, VisionTasks(str(root / "suite.yaml")))
    assert model.expert_accuracy["test"]["grays"] in (0, 1), "of the one image there is now"
    assert before["grays"] not in (0, 1), "the test tests nothing"
    measured = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "expert_accuracy", lambda self, task, split: measured.append(self.runtime.precision_name) or 1.0)
        exact = Trainer(default_root_dir=trainer.default_root_dir, accelerator="cpu", precision="bf16-mixed")
        exact.test(model, VisionTasks(str(root / "suite.yaml")))
    assert measured == ["bf16-mixed"] * len(TASKS)


def test_proxies_run_in_batches_and_only_as_many_as_asked_for(trainer: Trainer, tiny_suite: Path) -> None:
    merger = Counting(observe=True)
    trainer.test(MergedCLIP(merger), VisionTasks(str(tiny_suite), batch_size=4, proxies=Proxies(n=10)))
    assert set(merger._rows.values()) == {10}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MergedCLIP(), "give one of"),
        (lambda: MergedCLIP(merged="nowhere"), "nowhere"),
        (lambda: MergedCLIP(EMR()), "is no merge"),
        (lambda: MergedCLIP(Average(), experts=["gray"]), "name some of the suite's tasks"),
        (lambda: MergedCLIP(Average(), route="oracle"), "a static model has no routed experts"),
        (lambda: Comparison(Recipe(experts=("gray",)), {"Average": Average()}), "name some of the suite's tasks"),
        (lambda: Comparison(Recipe(route="oracle"), {"Average": Average()}), "a static model has no routed experts"),
        (lambda: Tuning(Recipe(experts=("gray",)), TIES(), {"density": [0.1]}), "name some of the suite's tasks"),
    ],
)
def test_what_is_wrong_without_any_data_is_told_before_a_download(
    trainer: Trainer,
    tiny_suite: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], lightning.LightningModule],
    message: str,
) -> None:
    monkeypatch.setattr(VisionTasks, "fetch", lambda *_: pytest.fail("something was downloaded"))
    with pytest.raises(InputError, match=message):
        lightning.Trainer.predict(trainer, make(), datamodule=VisionTasks(str(tiny_suite)))


def test_only_images_that_will_be_seen_are_downloaded(trainer: Trainer, root: Path) -> None:
    path = all_fetched(root)
    for model in (MergedCLIP(Average()), MergedCLIP(SMILE(rank=2, gate_rank=1), experts=["grays"])):
        trainer.merge(model, VisionTasks(path, allow_code=True))
        assert Fetched.made == []
    trainer.merge(MergedCLIP(ESM(), experts=["grays", "colors"]), VisionTasks(path, allow_code=True))
    assert Fetched.made == [("colors", "val"), ("grays", "val")]


def test_only_images_that_will_be_seen_must_be_there(trainer: Trainer, root: Path, merges: list[str]) -> None:
    path = str(root / "suite.yaml")
    (root / "data" / "stripes" / "val.parquet").unlink()
    trainer.merge(MergedCLIP(Average()), VisionTasks(path))
    trainer.merge(MergedCLIP(ESM(), experts=["grays", "colors"]), VisionTasks(path))
    assert merges == ["Average", "ESM"]
    for needing in (MergedCLIP(ESM()), MergedCLIP(Average(), scale="agreement"), MergedCLIP(Trim(base=ESM()))):
        with pytest.raises(InputError, match=r"1 fault\n  tasks\.stripes\.data\.val: .*[Nn]o such file"):
            trainer.merge(needing, VisionTasks(path))
    changed(root, lambda tasks: tasks["stripes"]["data"].pop("val"))
    with pytest.raises(InputError, match=r"1 fault\n  tasks\.stripes\.data\.val: missing"):
        trainer.merge(MergedCLIP(ESM()), VisionTasks(path))
    assert merges == ["Average", "ESM"]


def test_works_with_lightnings_own_trainer(tmp_path: Path, tiny_suite: Path) -> None:
    trainer = lightning.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.test(MergedCLIP(TaskArithmetic()), VisionTasks(str(tiny_suite)), verbose=False)
    assert json.loads((tmp_path / "results.json").read_text())["merger"]["name"] == "TaskArithmetic"
    assert json.loads((tmp_path / "results.json").read_text())["kind"] == "evaluation"


def test_the_backbone_is_what_coefficient_zero_gives(trainer: Trainer, tiny_suite: Path) -> None:
    import open_clip

    model = MergedCLIP(TaskArithmetic(), scale=0.0)
    data = VisionTasks(str(tiny_suite))
    trainer.merge(model, data)
    backbone = open_clip.create_model(data.suite.backbone).eval()
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_near(model.encoder(images), backbone.encode_image(images), forward(2 * 8 + 2, 128))


def test_a_proxy_batch_size_changes_nothing(tmp_path: Path, tiny_suite: Path) -> None:
    encoders = []
    for batch_size in (3, 64):
        model, data = MergedCLIP(ESM()), VisionTasks(str(tiny_suite), batch_size=batch_size)
        Trainer(default_root_dir=str(tmp_path), accelerator="cpu").merge(model, data)
        encoders.append(model.encoder.weights())
    base = Workbench.open(data, Runtime(torch.device("cpu"))).base
    for key, value in encoders[0].items():
        update = value - base[key]
        assert (encoders[1][key] - value).norm() <= forward(2 * 8 + 2, 128) * update.norm(), "as forward passes round"


def test_arguments_that_contradict_each_other(trainer: Trainer, tiny_suite: Path) -> None:
    with pytest.raises(InputError, match="one of"):
        trainer.test(MergedCLIP(), VisionTasks(str(tiny_suite)))
    with pytest.raises(InputError, match="one of"):
        MergedCLIP(ESM(), merged="somewhere")
    with pytest.raises(InputError, match="in its weights"):
        MergedCLIP(merged="somewhere", scale=0.5)
    with pytest.raises(InputError, match="`merged` is empty"):
        MergedCLIP(merged="")


def test_needs_its_own_data_module(trainer: Trainer) -> None:
    with pytest.raises(InputError, match="VisionTasks"):
        trainer.test(MergedCLIP(TaskArithmetic()), lightning.LightningDataModule())


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
    for verify, message in ((True, "open_clip_config.json has .* bytes, but was written with"), (False, "another backbone")):
        model = MergedCLIP(merged=str(directory), verify=verify)
        with pytest.raises(InputError, match=message):
            Trainer(default_root_dir=str(tmp_path / "t")).test(model, VisionTasks(str(tiny_suite)))


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


def test_an_unmerged_task_cannot_be_routed_to_its_expert(
    trainer: Trainer, tiny_suite: Path, tmp_path: Path, merges: list[str]
) -> None:
    some, method = ["colors", "grays"], ESMPP(rank=2)
    message = (
        r"^`model\.route` oracle: the experts of stripes are not merged.*\(`data\.tasks` \[colors, grays\]\).*`model\.experts`"
    )
    with pytest.raises(InputError, match=message) as caught:
        trainer.test(MergedCLIP(method, experts=some, route="oracle"), VisionTasks(str(tiny_suite)))
    assert caught.value.of == "command"
    assert merges == []
    trainer.merge(MergedCLIP(method, experts=some, route="oracle"), VisionTasks(str(tiny_suite)))
    evaluating = Trainer(default_root_dir=str(tmp_path / "t"), accelerator="cpu")
    stored = MergedCLIP(merged=trainer.default_root_dir, route="oracle")
    for tasks in (None, ["stripes"]):
        with pytest.raises(InputError, match=message):
            evaluating.test(stored, VisionTasks(str(tiny_suite), tasks=tasks))
    for model in (stored, MergedCLIP(method, experts=some, route="oracle")):
        evaluating.test(model, VisionTasks(str(tiny_suite), tasks=["grays"]))
    assert merges == ["ESMPP", "ESMPP"]


def test_a_static_model_has_no_other_route(trainer: Trainer, tiny_suite: Path) -> None:
    with pytest.raises(InputError, match="no routed experts"):
        trainer.test(MergedCLIP(TaskArithmetic(), route="oracle"), VisionTasks(str(tiny_suite)))


def test_results_say_what_they_are(trainer: Trainer, tiny_suite: Path) -> None:
    trainer.test(MergedCLIP(TaskArithmetic(), scale=0.5), VisionTasks(str(tiny_suite), tasks=["grays", "colors"]))
    found = json.loads((Path(trainer.default_root_dir) / "results.json").read_text())
    assert (found["kind"], found["schema"]) == ("evaluation", 1)
    assert (found["suite"], found["split"], found["scale"], found["route"]) == ("tiny", "test", 0.5, None)
    assert found["merger"]["name"] == "TaskArithmetic"
    assert {task: row["n"] for task, row in found["tasks"].items()} == {"colors": 41, "grays": 41}
    assert "routing" not in found


def test_evaluation_finds_what_the_evaluator_finds(trainer: Trainer, tiny_suite: Path) -> None:
    """Lightning's loop and our own count alike."""
    model, data = MergedCLIP(ESMPP(rank=2), scale=1.0), VisionTasks(str(tiny_suite), batch_size=7)
    trainer.test(model, data)
    found = json.loads((Path(trainer.default_root_dir) / "results.json").read_text())
    evaluator = Workbench.open(data, Runtime(torch.device("cpu"))).evaluator
    merged = Recipe(1.0).merge(Workbench.open(data, Runtime(torch.device("cpu"))), ESMPP(rank=2))
    with evaluator.with_model(merged.weights, merged.routed, list(TASKS)) as running:
        assert {task: row["accuracy"] for task, row in found["tasks"].items()} == {
            task: running.accuracy(task, "test") for task in TASKS
        }
    for task, row in found["tasks"].items():
        assert row["normalized"] == row["accuracy"] / evaluator.expert_accuracy(task, "test")


def test_a_model_that_is_not_merged_yet_says_so(tiny_suite: Path, tmp_path: Path) -> None:
    model = MergedCLIP(TaskArithmetic())
    for use in (lambda: model(torch.zeros(1, 3, 16, 16), "grays"), lambda: model.save(tmp_path)):
        with pytest.raises(InputError, match="nothing is merged yet"):
            use()


def test_logits_of_a_merged_model(trainer: Trainer, tiny_suite: Path) -> None:
    model, data = MergedCLIP(TaskArithmetic()), VisionTasks(str(tiny_suite))
    trainer.merge(model, data)
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 16, 16), "grays").shape == (2, 5)


def test_prediction_needs_a_task(tiny_suite: Path, tmp_path: Path) -> None:
    picture("grays", 0, np.random.RandomState(0)).save(tmp_path / "one.png")
    data = VisionTasks(str(tiny_suite))
    data.predict_on(FlatFolder(tmp_path))
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    with pytest.raises(InputError, match="no task to predict"):
        trainer.predict(MergedCLIP(TaskArithmetic()), datamodule=data)
