"""Experts that join or leave a merged directory, on a suite whose other experts are gone."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SIZES, TASKS, content_of, write_file, write_parquet
from tolerances import summed
from torch import Tensor

from mergekit_vision import InputError, MergedCLIP, Merger, Proxies, Trainer, VisionTasks, load
from mergekit_vision.cli.main import main
from mergekit_vision.export.hub_push import packed
from mergekit_vision.export.manifest import read_record, write_record
from mergekit_vision.plugins.average import Average
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.regmean import RegMean
from mergekit_vision.plugins.smile import SMILE
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.plugins.ties import TIES
from mergekit_vision.plugins.tsvm import TSVM
from mergekit_vision.runs import revision

STATE = "state.safetensors"


@dataclass(frozen=True)
class Models:
    """Makes models by their names, in a working directory, of a copy of the tiny suite."""

    root: Path

    def trainer(self, name: str) -> Trainer:
        return Trainer(default_root_dir=name, accelerator="cpu")

    def data(self) -> VisionTasks:
        return VisionTasks(str(self.root / "suite.yaml"))

    def merge(self, name: str, merger: Merger, experts: list[str] | None = None, **options: Any) -> None:
        self.trainer(name).merge(MergedCLIP(merger, experts=experts, **options), self.data())

    def add(self, name: str, to: str, expert: str, scale: float | None = None, verify: bool = True) -> None:
        self.trainer(name).add(MergedCLIP(merged=to, verify=verify), self.data(), [expert], scale)

    def drop(self, name: str, of: str, *experts: str) -> None:
        self.trainer(name).drop(MergedCLIP(merged=of), self.data(), list(experts))

    def forget(self, *tasks: str) -> None:
        """Remove the experts of some tasks, and these from the suite."""
        content = content_of(self.root)
        for task in tasks:
            (self.root / content["tasks"].pop(task)["expert"]).unlink()
        write_file(self.root, content)


@pytest.fixture
def models(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Models:
    monkeypatch.chdir(tmp_path)
    return Models(root)


def weights(directory: str) -> dict[str, Tensor]:
    return load_file(Path(directory) / "open_clip_model.safetensors")


def assert_same_weights(found: str, expected: str, bound: float) -> None:
    """Up to so much of each parameter's largest weight."""
    theirs = weights(expected)
    for key, value in weights(found).items():
        assert (value - theirs[key]).abs().max() <= bound * theirs[key].abs().max(), key


def record(directory: str) -> dict[str, Any]:
    return read_record(Path(directory))


def card(directory: str) -> str:
    return (Path(directory) / "README.md").read_text()


@pytest.mark.parametrize("merger", [ESM(), TSVM(), RegMean(), TaskArithmetic(), Average()], ids=lambda merger: merger.title)
def test_joining_is_merging_all_again(models: Models, merger: Merger) -> None:
    """Of ESM, the matrices of so small a model are made orthogonal where float32 hardly tells their directions apart."""
    models.merge("two", merger, ["colors", "grays"], keep_state=0)
    models.merge("three", merger)
    models.forget("colors", "grays")
    models.add("added", "two", "stripes")
    assert_same_weights("added", "three", 2e-5 if isinstance(merger, ESM) else summed(64))
    found, expected = record("added"), record("three")
    for name in ("merger", "scale", "citation", "experts", "sources"):
        assert found[name] == expected[name], name
    (step,) = found["history"]
    assert (step["joined"], step["rule"], step["scale"]) == (["stripes"], "exact", expected["scale"])
    assert (Path("added") / STATE).exists() == (not isinstance(merger, TaskArithmetic | Average))
    assert "Then stripes joined, as if all others had been merged anew." in card("added")


def test_leaving_in_place_needs_no_expert_and_joining_again_gives_the_same_model(models: Models) -> None:
    models.merge("model", TSVM(), keep_state=1)
    models.merge("two", TSVM(), ["colors", "stripes"])
    shutil.copytree("model", "three")
    moved = (models.root / "experts").rename(models.root / "elsewhere")
    models.drop("model", "model", "grays")
    assert_same_weights("model", "two", summed(64))
    assert list(record("model")["experts"]) == list(record("model")["sources"]) == ["colors", "stripes"]
    moved.rename(models.root / "experts")
    models.add("model", "model", "grays")
    assert_same_weights("model", "three", summed(64))
    assert load("model").encode_image(torch.zeros(1, 3, 16, 16)).isfinite().all()
    assert "Then grays left, as if all others had been merged anew. Then grays joined," in card("model")


def test_a_sum_needs_the_very_expert_that_leaves_it(models: Models) -> None:
    models.merge("model", TaskArithmetic())
    models.merge("two", TaskArithmetic(), ["colors", "stripes"])
    models.forget("colors", "stripes")
    models.drop("dropped", "model", "grays")
    assert_same_weights("dropped", "two", summed(64))
    with pytest.raises(InputError, match=r"suite\.yaml: lacks the task colors, whose expert is needed to take it out"):
        models.drop("other", "model", "colors")
    expert = models.root / "experts" / "grays.pt"
    torch.save({name: value + 0.001 for name, value in torch.load(expert).items()}, expert)
    with pytest.raises(InputError, match=r"task grays \(.*\) is another file than was merged"):
        models.drop("other", "model", "grays")
    assert not Path("other").exists()


def test_a_sum_needs_the_expert_that_leaves_it_read_as_it_was(models: Models) -> None:
    content, base = content_of(models.root), load_file(models.root / "base" / "open_clip_model.safetensors")
    changed = {name: 0.1 * value for name, value in base.items() if name.startswith("visual.ln_")}
    torch.save(changed, models.root / "experts" / "grays.pt")
    for scale in (0.5, 0.25):
        content["tasks"]["grays"]["expert"] = {"path": "experts/grays.pt", "kind": "delta", "scale": scale}
        write_file(models.root, content)
        if scale == 0.5:
            models.merge("model", TaskArithmetic())
    with pytest.raises(InputError, match=r"is read with the scale 0\.25, but was merged with 0\.5; give the same `scale` in"):
        models.drop("other", "model", "grays")


def test_a_model_written_over_meanwhile_is_neither_revised_nor_replaced(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its weights are read, and while the new one is computed."""
    for name, expert in (("two", "grays"), ("other", "stripes")):
        models.merge(name, Average(), ["colors", expert])

    def overwritten(result: Any) -> Any:
        shutil.copytree("other", "model", dirs_exist_ok=True)
        return result

    for place, output in (("load_file", "out"), ("merged_weights", "model")):
        shutil.copytree("two", "model", dirs_exist_ok=True)
        with monkeypatch.context() as patch:
            original = getattr(revision, place)
            patch.setattr(revision, place, lambda *a, original=original, **k: original(*overwritten(a), **k))
            with pytest.raises(InputError, match="model: another model was written here while this one was read; run this again"):
                models.add(output, "model", "stripes")
        assert record("model") == record("other")
        assert not Path("out").exists()


def test_the_coefficient_is_the_models_unless_another_is_given(models: Models) -> None:
    models.merge("two", TaskArithmetic(), ["colors", "grays"], scale=0.8)
    for scale in (None, 0.6):
        models.merge("three", TaskArithmetic(), scale=scale or 0.8)
        models.add("added", "two", "stripes", scale)
        assert_same_weights("added", "three", summed(64))
        assert record("added")["scale"] == (scale or 0.8)


def test_other_methods_take_an_expert_in_by_opcms_rule(models: Models, caplog: pytest.LogCaptureFixture) -> None:
    """And once it was so, what is exact of the method no longer is."""
    models.merge("esm", ESM(), ["colors"])
    models.merge("ties", TIES(), ["colors"])
    for name, why in (("esm", "nothing was kept of its experts"), ("ties", "TIES merges all experts at once")):
        models.add(f"{name}-added", name, "grays")
        assert f"{name}: {why}" in caplog.text
        found = record(f"{name}-added")
        assert found["history"][0]["rule"] == "OPCM"
        assert any("Merging Models on the Fly" in paper for paper in found["citation"])
        assert "Then grays joined, by OPCM's rule." in card(f"{name}-added")
    models.add("esm-added", "esm-added", "stripes")
    assert [step["rule"] for step in record("esm-added")["history"]] == ["OPCM", "OPCM"]
    with pytest.raises(InputError, match="no expert can leave"):
        models.drop("x", "esm-added", "grays")
    with pytest.raises(InputError, match="`scale` 1: what joins by OPCM's rule leaves the model's coefficient as it is"):
        models.add("x", "ties", "grays", 1.0)


def test_other_proxy_images_are_mentioned(models: Models, caplog: pytest.LogCaptureFixture) -> None:
    models.merge("two", ESM(), ["colors", "grays"], keep_state=0)
    models.add("same", "two", "stripes")
    assert "proxy images" not in caplog.text
    data = VisionTasks(str(models.root / "suite.yaml"), proxies=Proxies(n=3))
    models.trainer("other").add(MergedCLIP(merged="two"), data, ["stripes"])
    assert "the experts before were merged with other proxy images" in caplog.text


def test_results_of_the_model_before_are_not_taken_for_those_of_the_new_one(models: Models) -> None:
    models.merge("model", Average(), ["colors", "grays"])
    models.add("model", "model", "stripes")
    models.trainer("model").test(MergedCLIP(merged="model"), VisionTasks(str(models.root / "suite.yaml"), tasks=["colors"]))
    results = json.loads(Path("model/results.json").read_text())
    with packed(Path("model"), "a/b") as parcel:
        assert "merge.json" in parcel.files
    Path("model/results.json").write_text(json.dumps({**results, "history": []}))
    with pytest.raises(InputError, match="measured on another model, by its history"), packed(Path("model"), "a/b"):
        pass


@pytest.fixture(scope="module")
def kept(tiny_suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two experts of which a state was kept."""
    place = tmp_path_factory.mktemp("models") / "esm"
    trainer = Trainer(default_root_dir=str(place), accelerator="cpu")
    trainer.merge(MergedCLIP(ESM(), experts=["colors", "grays"], keep_state=0), VisionTasks(str(tiny_suite)))
    return place


def test_what_was_kept_is_not_pushed(kept: Path) -> None:
    with packed(kept, "a/b") as parcel:
        assert STATE not in parcel.files
        assert STATE in parcel.left


@pytest.mark.parametrize(
    ("command", "experts", "message"),
    [
        ("add", ["stripe"], "`experts` stripe: not in the suite (did you mean `stripes`?)"),
        ("add", ["grays"], "`experts` grays: is in the model already"),
        ("add", [], "`experts`: name at least one task"),
        ("drop", ["stripes"], "`experts` stripes: not in the model; it has colors, grays"),
        ("drop", ["colors", "grays"], "`experts`: at least one expert must stay"),
        ("drop", ["grays"], "enough for models of 2 and more, and 1 would be left"),
    ],
)
def test_mistakes(models: Models, kept: Path, command: str, experts: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        getattr(models.trainer("out"), command)(MergedCLIP(merged=str(kept)), models.data(), experts)
    assert message in str(error.value)
    assert not Path("out").exists()


class Hidden(TSVM):
    """Keeps a parameter where no record finds it, so that it could not be made again."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        object.__setattr__(self, "_gain", gain)


@pytest.mark.parametrize(
    ("merger", "keep", "message"),
    [
        (TIES(), 0, "`keep_state`: TIES merges all experts at once"),
        (ESM(), 3, "`keep_state` 3: of 3 experts, 2 can leave at most"),
        (ESM(), -1, "`keep_state` is -1"),
        (Hidden(0.5), 1, "`keep_state`: Hidden does not keep what it was given as gain"),
    ],
)
def test_what_cannot_be_kept_is_refused(models: Models, merger: Merger, keep: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        models.merge("out", merger, keep_state=keep)


def test_a_dynamic_model_and_one_of_another_backbone_are_refused(models: Models, kept: Path) -> None:
    models.merge("dynamic", SMILE(rank=2, gate_rank=1), ["colors"])
    with pytest.raises(InputError, match="dynamic: is a dynamic model"):
        models.add("out", "dynamic", "grays")
    base = models.root / "base" / "open_clip_model.safetensors"
    trained = load_file(base)
    save_file({name: value * (1.01 if name.startswith("visual.") else 1) for name, value in trained.items()}, base)
    with pytest.raises(InputError, match=r"merged from another backbone than that of .* by its vision tower"):
        models.add("out", str(kept), "stripes")
    save_file({name: value * 1.01 for name, value in trained.items()}, base)
    with pytest.raises(InputError, match=r"merged from another backbone than that of .* by its text tower"):
        models.add("out", str(kept), "stripes")
    with pytest.raises(InputError, match="add needs `merged`"):
        models.trainer("out").add(MergedCLIP(Average()), models.data(), ["stripes"])


@pytest.mark.parametrize("scale", [0, float("nan"), "merger", True])
def test_what_is_no_coefficient_is_refused(models: Models, kept: Path, scale: Any) -> None:
    with pytest.raises(InputError, match="must be a finite number other than 0"):
        models.add("out", str(kept), "stripes", scale)


def test_a_sum_that_rounding_hides_is_refused(models: Models) -> None:
    models.merge("small", TaskArithmetic(), ["colors", "grays"], scale=1e-6)
    with pytest.raises(InputError, match="at coefficient 1e-06, the rounding of its weights hides the experts"):
        models.add("out", "small", "stripes")


def test_tasks_are_a_list_of_different_names(models: Models, kept: Path) -> None:
    with pytest.raises(InputError, match="grays is named twice"):
        models.drop("out", str(kept), "grays", "grays")
    with pytest.raises(InputError, match="must be a list of tasks"):
        models.trainer("out").drop(MergedCLIP(merged=str(kept)), models.data(), "grays")
    with pytest.raises(InputError, match="`keep_state` goes with `merger`"):
        MergedCLIP(merged=str(kept), keep_state=1)


def test_regmean_takes_an_expert_out_by_the_proxy_images_that_it_put_in(models: Models) -> None:
    models.merge("three", RegMean(), keep_state=1)
    data = VisionTasks(str(models.root / "suite.yaml"), proxies=Proxies(n=3))
    with pytest.raises(InputError, match="give the same `proxies`"):
        models.trainer("out").drop(MergedCLIP(merged="three"), data, ["grays"])
    with pytest.raises(InputError, match="a model of RegMean has no coefficient"):
        models.trainer("out").drop(MergedCLIP(merged="three"), models.data(), ["grays"], 0.5)
    images = models.root / "data" / "grays" / "val.parquet"
    shutil.copy(images, images.with_suffix(".copy"))
    write_parquet(images, "grays", TASKS["grays"][0], SIZES["val"], seed=99)
    with pytest.raises(InputError, match="of the same images"):
        models.drop("out", "three", "grays")
    images.with_suffix(".copy").replace(images)
    models.drop("out", "three", "grays")


def test_each_expert_leaves_regmean_by_the_proxy_images_that_it_joined_with(models: Models) -> None:
    models.merge("two", RegMean(), ["colors", "grays"], keep_state=1)
    others = VisionTasks(str(models.root / "suite.yaml"), proxies=Proxies(n=3))
    models.trainer("three").add(MergedCLIP(merged="two"), others, ["stripes"])
    with pytest.raises(InputError, match=r"the expert of task stripes .* give the same `proxies` \(label none, n 3, "):
        models.drop("out", "three", "stripes")
    models.trainer("again").drop(MergedCLIP(merged="three"), others, ["stripes"])
    assert_same_weights("again", "two", summed(64))
    models.drop("out", "three", "grays")


def test_a_state_of_an_earlier_version_is_of_one_draw(models: Models) -> None:
    models.merge("two", RegMean(), ["colors", "grays"], keep_state=1)
    header(Path("two"), proxies=asdict(Proxies()))
    drop = partial(models.trainer("out").drop, MergedCLIP(merged="two", verify=False))
    with pytest.raises(InputError, match="give the same `proxies`"):
        drop(VisionTasks(str(models.root / "suite.yaml"), proxies=Proxies(n=3)), ["grays"])
    drop(models.data(), ["grays"])


def header(directory: Path, text: str | None = None, **changes: Any) -> None:
    """Write what was kept with another header."""
    about = {"schema": 1, "merger": record(str(directory))["merger"], "experts": ["colors", "grays"], "proxies": {}, **changes}
    save_file(load_file(directory / STATE), directory / STATE, {"mergekit_vision": text or json.dumps(about)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda place: (place / STATE).write_bytes(b"x"), "is damaged"),
        (lambda place: (place / STATE).unlink(), f"{STATE} is missing"),
        (lambda place: header(place, schema=2), "schema: must be 1"),
        (lambda place: header(place, experts=["grays", "colors"]), "was kept of another merge"),
        (lambda place: header(place, merger={"name": "TSVM"}), "was kept of another merge"),
        (lambda place: header(place, "{"), "its header is not valid JSON"),
    ],
)
def test_a_spoiled_state_is_refused_even_unverified(
    models: Models, kept: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(Path(shutil.copytree(kept, "model")))
    with pytest.raises(InputError, match=message):
        models.add("out", "model", "stripes", verify=False)


def test_a_changed_state_is_used_only_unverified(models: Models, kept: Path) -> None:
    header(Path(shutil.copytree(kept, "model")))
    with pytest.raises(InputError, match=STATE):
        models.add("out", "model", "stripes")
    models.add("out", "model", "stripes", verify=False)


def test_a_method_that_is_not_installed_is_not_imported(models: Models, kept: Path) -> None:
    place = Path(shutil.copytree(kept, "model"))
    content = {key: value for key, value in record("model").items() if key not in ("files", "sha256", "schema")}
    content["merger"]["class_path"] = "antigravity.Method"
    (place / "merge.json").unlink()
    write_record(place, content)
    with pytest.raises(InputError, match=r"antigravity\.Method is registered by no installed package"):
        models.add("out", "model", "stripes")
    assert "antigravity" not in sys.modules


def test_the_commands(models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["mergekit-vision"])
    suite = ["-s", str(models.root / "suite.yaml"), "--trainer.accelerator", "cpu"]
    assert main(["merge", *suite, "-m", "TSVM", "--experts", "[colors, grays]", "-o", "model", "--keep-state", "1"]) == 0
    size = (Path("model") / STATE).stat().st_size
    assert f"model/{STATE}: {size / 1e6:.1f} MB, kept for experts that join or leave" in " ".join(capsys.readouterr().out.split())
    assert main(["add", *suite, "--merged", "model", "--experts", "[stripes]", "--scale", "0.5", "-o", "model"]) == 0
    assert main(["drop", *suite, "--merged", "model", "--experts", "[colors]", "-o", "model"]) == 0
    found = record("model")
    assert (list(found["experts"]), found["scale"]) == (["grays", "stripes"], 0.5)
    names = {path.name for path in Path("model").iterdir()}
    assert {"config.yaml", "config-add.yaml", "config-drop.yaml"} <= names
    capsys.readouterr()
    assert main(["drop", *suite, "--merged", "model", "--experts", "[colors]", "--no-verify", "-o", "x"]) == 1
    assert "--experts colors: not in the model; it has grays, stripes" in capsys.readouterr().err
