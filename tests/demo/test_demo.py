"""The embedded suite: its pictures, its weights, and the script that made them."""

import dataclasses
import hashlib
import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mergekit_vision import demo
from mergekit_vision.checkpoints import open_weights
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.demo import pretraining, train
from mergekit_vision.demo import tasks as demo_tasks
from mergekit_vision.demo.captions import HARDEST, captioned
from mergekit_vision.demo.concepts import CONCEPTS
from mergekit_vision.demo.drawing import COLORS, Canvas, ring
from mergekit_vision.demo.optimizing import Recipe, optimize
from mergekit_vision.encoders.backbone import describe_backbone, load_clip
from mergekit_vision.encoders.heads import zero_shot_head
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.errors import InputError
from mergekit_vision.sources.opening import open_source
from mergekit_vision.suites.checks import check_suite
from mergekit_vision.suites.suite import Suite

HOME = Path(demo.__file__).parent
NAMES = tuple(CONCEPTS)


def task_of(name: str, split: str, **arguments) -> demo_tasks.DemoTask:
    return getattr(demo_tasks, name.capitalize())(split, **arguments)


def pixels(task: demo_tasks.DemoTask, indices: Iterable[int]) -> np.ndarray:
    return np.stack([np.asarray(task[index][0]) for index in indices])


# ------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_depends_on_nothing_but_split_index_and_seed(name: str) -> None:
    task = task_of(name, "test")
    in_order = pixels(task, range(6))
    torch.manual_seed(1)
    np.random.seed(1)
    assert np.array_equal(pixels(task_of(name, "test"), reversed(range(6)))[::-1], in_order)
    assert not np.array_equal(pixels(task_of(name, "test", seed=1), range(6)), in_order)
    assert task[3][0].mode == "RGB"
    assert task[3][0].size == (32, 32)


def test_drawing_leaves_the_global_random_state_alone() -> None:
    import random

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for name in NAMES:
        task_of(name, "val")[0]
    captioned(0, 0)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_picture(name: str) -> None:
    hashes = {
        split: {hashlib.sha256(picture.tobytes()).digest() for picture in pixels(task_of(name, split), range(120))}
        for split in demo_tasks.SIZES
    }
    assert [len(found) for found in hashes.values()] == [120, 120, 120]
    assert len(set.union(*hashes.values())) == 360


def test_splits_share_no_handwriting() -> None:
    opened = {split: demo_tasks.Digits(split) for split in demo_tasks.SIZES}
    rows = [{task._row(index) for index in range(len(task))} for task in opened.values()]
    assert len(set.union(*rows)) == sum(map(len, rows))
    assert set.union(*rows) <= set(range(1797))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_classes_are_balanced(name: str, split: str) -> None:
    task = task_of(name, split)
    counts = np.bincount(task.targets, minlength=len(task.classes))
    assert len(task) == demo_tasks.SIZES[split]
    if name == "digits":  # as they were written
        assert counts.min() > 0.7 * counts.mean()
    else:
        assert counts.max() - counts.min() <= 1


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(InputError, match="demo task shapes: no split 'tset'; it has train, val, test"):
        demo_tasks.Shapes("tset")


def test_difficulty_adds_noise() -> None:
    def roughness(difficulty: float) -> float:
        empty = [np.asarray(Canvas(Random(seed), difficulty).finish(), dtype=float) for seed in range(10)]
        return float(np.abs(np.diff(empty, axis=1)).mean())

    assert roughness(0.0) == 0
    assert roughness(1.0) > 2 * roughness(0.3) > 0


def test_a_frame_is_turned_clockwise_about_its_center() -> None:
    """The point (0, -1), straight up, turned by 90 degrees lies to the right (y points down)."""
    canvas = Canvas(Random("a"), 0.0)
    canvas._angle = math.pi / 2
    (x, y), (u, v) = canvas._center, canvas._point(0, -1)
    assert (u - x, v - y) == pytest.approx((canvas._scale, 0))
    assert all(math.hypot(*point) == pytest.approx(0.5) for point in ring(7, 0.5))


def test_captions_name_what_they_mean() -> None:
    """The class, or both colors."""
    for _, caption, meaning in (captioned(0, index) for index in range(200)):
        concept, _, name = meaning.partition(": ")
        assert caption == meaning if not name else name in caption and name in CONCEPTS[concept].classes
    colors = [captioned(0, index)[1].startswith("something ") for index in range(400)]
    assert 0.04 < np.mean(colors) < 0.16
    assert HARDEST < 1


def test_ink_is_darker_than_paper() -> None:
    for seed in range(100):
        canvas = Canvas(Random(seed), 1.0)
        assert sum(COLORS[canvas.ink]) < sum(COLORS[canvas.paper])
        assert sum(canvas.other_color()) > sum(canvas.color) - 150


# ------------------------------------------------------------------------------------------------- weights


def test_the_suite_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    suite = Suite.load("demo")
    assert (suite.name, suite.path, tuple(suite.tasks)) == ("demo", HOME / "suite.yaml", NAMES)
    assert all(task.classes == CONCEPTS[name].classes for name, task in suite.tasks.items())
    check_suite(suite, describe_backbone(suite.backbone).shapes, ["train", "val", "test"])
    with pytest.raises(InputError, match=r"suite demoo: neither a file nor a built-in suite .* \(did you mean `demo`\?\)"):
        Suite.load("demoo")


def test_a_file_of_that_name_goes_first(tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").write_text(tiny_suite.read_text().replace("name: tiny", "name: mine"))
    monkeypatch.chdir(tmp_path)
    assert Suite.load("demo").name == "mine"
    (tmp_path / "demo").unlink()
    (tmp_path / "demo").mkdir()
    assert Suite.load("demo").path == HOME / "suite.yaml"


def test_everything_fits_into_12_megabytes() -> None:
    files = [path for path in HOME.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    weights = sorted(path.stem for path in (HOME / "experts").iterdir())
    assert weights == sorted(NAMES)


def test_the_wheel_holds_the_data() -> None:
    """``setup.cfg`` lists every file beside the modules."""
    import configparser

    setup = configparser.ConfigParser()
    setup.read(HOME.parents[1] / "setup.cfg")
    patterns = setup["options.package_data"]["mergekit_vision.demo"].split()
    shipped = {path for pattern in patterns for path in HOME.glob(pattern)}
    assert shipped == {path for path in HOME.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert "mergekit_vision.demo" in setup["options"]["packages"].split()


@pytest.fixture(scope="module")
def suite() -> Suite:
    return Suite.load("demo")


def test_open_clip_alone_loads_the_backbone(suite: Suite) -> None:
    import open_clip

    model, transform = open_clip.create_model_from_pretrained(suite.backbone)
    tokenizer = open_clip.get_tokenizer(suite.backbone)
    image = demo_tasks.Signs("test")[2][0]
    with torch.no_grad():
        seen = model.encode_image(transform(image)[None], normalize=True)
        texts = model.encode_text(tokenizer(["a stop sign", "a picture of a heart"]), normalize=True)
    assert seen.shape == (1, 64)
    assert texts.shape == (2, 64)
    assert float(texts[0] @ texts[1]) < 0.9


def test_experts_are_far_above_zero_shot(suite: Suite) -> None:
    """On the first 60 test images of each task; the whole split's figures stand in the README."""
    clip = load_clip(suite.backbone)
    import open_clip

    encoder, data = VisionEncoder(clip.get_submodule("visual")), VisionTasks("demo", batch_size=60)
    heads = {
        name: zero_shot_head(clip, open_clip.get_tokenizer(suite.backbone), task.classes, task.templates)
        for name, task in suite.tasks.items()
    }
    base = {name: value.clone() for name, value in encoder.weights().items()}

    def accuracy(name: str) -> float:
        images, labels = next(iter(data.loader(name, "test")))
        with torch.no_grad():
            logits = F.normalize(encoder(images), dim=-1) @ heads[name].T
        return float((logits.argmax(1) == labels).float().mean())

    gains = []
    for name, task in suite.tasks.items():
        encoder.assign(base)
        zero_shot = accuracy(name)
        encoder.assign(open_weights(task.expert.path))
        gains.append(accuracy(name) - zero_shot)
        assert zero_shot > 1 / len(task.classes), name
    assert min(gains) > 0.05
    assert sum(gains) / len(gains) > 0.22


# -------------------------------------------------------------------------------------------------- script


TINY = {"embed_dim": 8, "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite made by the script itself, with a smaller model and a few steps."""
    place = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        model = {**pretraining.CONFIG["model_cfg"], **TINY}
        patch.setitem(pretraining.CONFIG, "model_cfg", {**model, "text_cfg": {**model["text_cfg"], "width": 8, "layers": 1}})
        recipe, captions = Recipe(images=32, epochs=2, rate=1e-3, batch=32), pretraining.Captions(images=64, batch=16, weight=0.1)
        train.build(place, 0, recipe, captions, dataclasses.replace(recipe, epochs=1))
    return place


def test_the_script_writes_a_whole_suite(built: Path) -> None:
    suite = Suite.load(built / "suite.yaml")
    assert suite.backbone == f"local-dir:{built / 'model'}"
    check_suite(suite, describe_backbone(suite.backbone).shapes, ["test"])
    base = open_weights(built / "model" / "open_clip_model.safetensors")
    for task in suite.tasks.values():
        assert any(
            not torch.equal(open_weights(task.expert.path)[key], base[key]) for key in describe_backbone(suite.backbone).shapes
        )


def test_unseen_tokens_have_no_embedding(built: Path) -> None:
    import open_clip

    table = load_clip(f"local-dir:{built / 'model'}").get_parameter("token_embedding.weight")
    texts = [captioned(0, index)[1] for index in range(64)]
    seen = torch.unique(open_clip.get_tokenizer(f"local-dir:{built / 'model'}")(texts))
    assert set(table.abs().sum(1).nonzero().flatten().tolist()) <= set(seen.tolist())
    assert len(seen) > 20


def test_optimize_goes_through_every_image_in_every_epoch_and_learns() -> None:
    torch.manual_seed(0)
    model, target, seen = nn.Linear(3, 1), torch.tensor([[1.0, -2.0, 0.5]]), []
    images = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))

    def loss(batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch)
        return F.mse_loss(model(images[batch]), images[batch] @ target.T)

    start = float(F.mse_loss(model(images), images @ target.T).detach())
    optimize(model, loss, 40, Recipe(images=40, epochs=30, rate=0.1, batch=16, decay=0.0), "a test")
    assert [len(batch) for batch in seen[:3]] == [16, 16, 8]
    assert all(sorted(torch.cat(seen[first:end]).tolist()) == list(range(40)) for first, end in pairwise(range(0, 91, 3)))
    assert float(F.mse_loss(model(images), images @ target.T).detach()) < 0.05 * start


def test_a_handwritten_source_opens_like_any_other() -> None:
    source = open_source({"torchvision": "mergekit_vision.demo.tasks.Digits", "args": {"split": "val"}})
    assert source.names == CONCEPTS["digits"].classes
    assert len(source) == len(source.labels()) == demo_tasks.SIZES["val"]
