"""Predictions on a folder of images."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TASKS, picture
from tolerances import forward

from mergekit_vision import InputError, MergedCLIP, Trainer, VisionTasks
from mergekit_vision.data.preprocess import eval_transform
from mergekit_vision.encoders.backbone import describe_backbone
from mergekit_vision.encoders.routed import Route
from mergekit_vision.merger import Merger
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.runs.predictions import Predictions
from mergekit_vision.support.team import Team

PATHS = tuple(Path(f"{number}.png") for number in range(25))
CLASSES = ("dark", "medium", "bright")


def read(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def test_the_most_probable_classes_come_first_and_images_in_order(tmp_path: Path) -> None:
    predictions = Predictions("grays", CLASSES, PATHS, top=2)
    predictions.add(torch.tensor([2, 0]), torch.tensor([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]]))
    predictions.add(torch.tensor([1]), torch.tensor([[0.0, 0.25, 0.75]], dtype=torch.bfloat16))
    predictions.write(tmp_path / "deep" / "predictions.csv")
    assert read(tmp_path / "deep" / "predictions.csv") == [
        ["image", "class_1", "probability_1", "class_2", "probability_2"],
        ["0.png", "dark", "0.700000", "bright", "0.200000"],
        ["1.png", "bright", "0.750000", "medium", "0.250000"],
        ["2.png", "medium", "0.500000", "bright", "0.300000"],
    ]


def test_no_more_classes_than_there_are(tmp_path: Path) -> None:
    predictions = Predictions("grays", CLASSES, PATHS, top=9)
    predictions.add(torch.tensor([0]), torch.tensor([[0.2, 0.5, 0.3]]))
    assert [name for name, _ in predictions.rows[0]] == ["medium", "bright", "dark"]


def test_the_beginning_is_shown_and_the_rest_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    predictions = Predictions("grays", ("[dark]", *CLASSES[1:]), PATHS)
    predictions.add(torch.arange(25), torch.tensor([[0.7, 0.2, 0.1]]).expand(25, 3))
    with caplog.at_level("INFO", logger="mergekit_vision"):
        predictions.write(tmp_path / "predictions.csv")
    (shown,) = [record.getMessage() for record in caplog.records]
    assert shown.count("[dark]") == 20
    assert "5 more in the file" in shown
    assert len(read(tmp_path / "predictions.csv")) == 26


def test_rows_of_all_processes_are_gathered() -> None:
    parts = [Predictions("grays", CLASSES, PATHS[:3], top=1) for _ in range(2)]
    parts[0].add(torch.tensor([0, 2]), torch.eye(3)[[0, 2]])
    parts[1].add(torch.tensor([1]), torch.eye(3)[[1]])
    rows = [dict(part.rows) for part in parts]
    for rank, part in enumerate(parts):
        part.gather(Team(rank, 2, lambda _, source: rows[source]))
        assert {index: row[0][0] for index, row in part.rows.items()} == {0: "dark", 1: "medium", 2: "bright"}
    parts[0].paths = PATHS[:4]
    with pytest.raises(RuntimeError, match="predicted 3 images of 4"):
        parts[0].gather(Team())


def test_processes_that_list_other_images_are_refused() -> None:
    seen: list[Any] = []
    lists = (PATHS[:3], tuple(Path("elsewhere", path) for path in PATHS[:3]), PATHS[1:4])
    for paths in lists:
        Predictions("grays", CLASSES, paths).check_alike(Team(broadcast=lambda value, _: seen.append(value) or value))
    Predictions("grays", CLASSES, PATHS[:3]).check_alike(Team(0, 2, lambda _, source: seen[source]))
    with pytest.raises(InputError, match=r"process 2 of 3 sees other images than process 0 \(3 and 3\)"):
        Predictions("grays", CLASSES, PATHS[:3]).check_alike(Team(0, 3, lambda _, source: seen[source]))


@pytest.mark.parametrize(("merger", "route"), [(TaskArithmetic(), "router"), (ESMPP(rank=4), "oracle")])
def test_a_folder_is_classified_as_the_model_says(tiny_suite: Path, tmp_path: Path, merger: Merger, route: Route) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    images = [picture("grays", number % 5, np.random.RandomState(number)).convert("RGB") for number in range(5)]
    for number, image in enumerate(images):
        image.save(photos / f"{number}.png")
    model, data = MergedCLIP(merger, route=route), VisionTasks(str(tiny_suite), batch_size=2)
    Trainer(default_root_dir=str(tmp_path / "out"), accelerator="cpu").predict(model, data, "grays", str(photos), top=1)
    rows = read(tmp_path / "out" / "predictions.csv")
    preprocess = eval_transform(describe_backbone(data.suite.backbone).preprocess)
    with torch.no_grad():
        batch = preprocess.finish(torch.stack([preprocess.geometry(image) for image in images]))
        if route == "oracle":
            model.encoder.routing.truth = torch.full((5,), list(data.suite.tasks).index("grays"))
        best = model(batch, "grays").softmax(-1).max(-1)
    assert [row[:2] for row in rows[1:]] == [
        [str(photos / f"{number}.png"), TASKS["grays"][0][label]] for number, label in enumerate(best.indices.tolist())
    ]
    written = torch.tensor([float(row[2]) for row in rows[1:]])
    last_digit = 5e-7  # six are written
    # logits are at most exp(logit_scale) = 14, and a probability changes by at most a quarter of their change
    assert (written - best.values).abs().max() < last_digit + 14 / 4 * forward(2 * 8 + 2, 128)


@pytest.mark.parametrize(
    ("task", "top", "message"),
    [("greys", 1, "`task` greys: not in the suite.*it has colors, grays, stripes"), ("grays", 0, "`top` 0: at least one")],
)
def test_what_cannot_be_predicted(tiny_suite: Path, tmp_path: Path, task: str, top: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Trainer(default_root_dir=str(tmp_path)).predict(
            MergedCLIP(TaskArithmetic()), VisionTasks(str(tiny_suite)), task, str(tmp_path), top
        )
    assert caught.value.of == "command"


def test_rows_are_gathered_within_the_run_where_lost_processes_are_noticed(
    tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture("grays", 0, np.random.RandomState(0)).save(tmp_path / "photo.png")
    trainer, running = Trainer(default_root_dir=str(tmp_path / "out"), accelerator="cpu"), []
    monkeypatch.setattr(Predictions, "gather", lambda *_: running.append(not trainer.state.stopped))
    trainer.predict(MergedCLIP(TaskArithmetic()), VisionTasks(str(tiny_suite)), "grays", str(tmp_path / "photo.png"))
    assert running == [True]
