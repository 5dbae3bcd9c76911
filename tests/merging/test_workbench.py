"""Running mergers on a real encoder: what they get, and what is refused."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import whole_split
from tiny import TASKS
from tolerances import assert_near, forward
from torch import Tensor

from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.data.proxies import Proxies
from mergekit_vision.encoders.backbone import load_clip
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.errors import InputError
from mergekit_vision.evaluation.evaluator import Runtime
from mergekit_vision.merger import Merged, MergeInputs, Merger
from mergekit_vision.merging import workbench
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.esmpp import ESMPP, ESMPPBayes
from mergekit_vision.plugins.esmppfit import ESMPPFit
from mergekit_vision.plugins.featcal import FeatCal
from mergekit_vision.plugins.fisher import FisherFit
from mergekit_vision.plugins.regmean import RegMean
from mergekit_vision.plugins.smile import SMILE
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.routers import CosineRouter, LowRankExperts


class Broken(Merger):
    """Returns what a careless plugin might."""

    def __init__(self, update: Callable[[Tensor], dict[str, Tensor]]) -> None:
        self.update = update

    def merge(self, inputs: MergeInputs) -> Merged:
        return Merged(self.update(inputs.deltas("visual.proj").sum(0)))


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda proj: {"visual.nothing": proj}, "visual.nothing, which the encoder does not have"),
        (lambda proj: {"visual.proj": proj[:1]}, r"wrong shape for visual\.proj: \(1, 32\), not \(32, 32\)"),
        (lambda proj: {"visual.proj": proj * float("nan")}, r"NaN or infinity for visual\.proj"),
        (
            lambda proj: {"visual.proj": proj.bfloat16()},
            r"in torch\.bfloat16 for visual\.proj, but must return float32",
        ),
        (lambda proj: {"visual.proj": proj.half()}, r"an update in torch\.float16 for visual\.proj"),
        (lambda proj: {"visual.proj": proj.long()}, r"an update in torch\.int64 for visual\.proj"),
        (lambda proj: {"visual.proj": proj.double() + 1e300}, r"NaN or infinity for visual\.proj"),
    ],
)
def test_what_a_plugin_must_not_return(bench: Workbench, update: Callable[[Tensor], dict[str, Tensor]], message: str) -> None:
    with pytest.raises(InputError, match=f"Broken returned .*{message}"):
        bench.merge(Broken(update), bench.evaluator.data.suite.experts)


class Miscounted(Merger):
    """Returns other experts than there are tasks."""

    def __init__(self, experts: int, scores: int, width: int = 32, layer: str = "") -> None:
        self.experts, self.scores, self.width, self.layer = experts, scores, width, layer

    def merge(self, inputs: MergeInputs) -> Merged:
        linear = inputs.linears[0]
        d_out, d_in = inputs.base[linear.weight].shape
        up, down = torch.zeros(self.experts, d_out, 1), torch.zeros(self.experts, 1, d_in)
        router = CosineRouter(torch.ones(self.scores, self.width))
        return Merged({}, routed={self.layer or linear.name: LowRankExperts(up, down, router)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 2), r"2 experts for \S+in_proj, but there are 3 tasks"),
        ((4, 4), r"4 experts for \S+in_proj, but there are 3 tasks"),
        ((3, 6), r"experts for \S+in_proj that cannot be used: its router gives scores \[1, 1, 6\] for the 3 experts"),
        ((3, 3, 31), r"experts for \S+in_proj that cannot be used: its router does not run"),
        ((3, 3, 32, "nowhere"), r"experts for nowhere, which is no Linear layer"),
    ],
)
def test_what_experts_a_plugin_must_not_return(bench: Workbench, arguments: tuple[Any, ...], message: str) -> None:
    experts = bench.evaluator.data.suite.experts
    with pytest.raises(InputError, match=f"Miscounted returned {message}"):
        bench.merge(Miscounted(*arguments), experts)
    assert bench.merge(Miscounted(3, 3), experts).routed


def test_float64_is_rounded_once(bench: Workbench) -> None:
    experts = bench.evaluator.data.suite.experts
    merged = bench.merge(Broken(lambda proj: {"visual.proj": proj.double() / 3}), experts)
    expected = bench.inputs(experts).deltas("visual.proj").sum(0).double() / 3
    assert merged.update["visual.proj"].dtype == torch.float32
    assert torch.equal(merged.update["visual.proj"], expected.float())


def test_the_backbone_is_whole_and_apart_from_what_runs(bench: Workbench, tiny_suite: Path) -> None:
    clip = load_clip(bench.evaluator.data.suite.backbone)
    state = clip.state_dict()
    assert {**bench.base, **bench.text}.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in {**bench.base, **bench.text}.items())
    bench.merge(TaskArithmetic(), bench.evaluator.data.suite.experts)
    assert all(torch.equal(value, state[key]) for key, value in bench.evaluator.encoder.weights().items())


@pytest.mark.parametrize(
    ("merger", "place", "message"),
    [
        (ESM(), "0.mlp.c_fc", r"the expert of task grays: layer \S+0\.mlp\.c_proj gets NaN or infinity"),
        (ESM(), "1.mlp.c_proj", r"the expert of task grays, layer \S+1\.mlp\.c_proj: .*products with the task vector"),
        (ESMPP(base=TaskArithmetic()), "0.mlp.c_fc", r"the expert of task grays: layer \S+1\.attn\.in_proj gets NaN"),
        (
            ESMPP(base=TaskArithmetic(), layers=("c_proj",)),
            "1.mlp.c_proj",
            r"task colors, layer \S+1\.mlp\.c_proj: .*products with the task vector",
        ),
        (ESMPPBayes(base=TaskArithmetic()), "0.mlp.c_fc", r"the merged model on task colors: layer \S+1\.attn\.in_proj gets NaN"),
        (RegMean(), "0.mlp.c_fc", r"layer \S+0\.mlp\.c_proj gets NaN or infinity"),
        (FeatCal(), "0.attn.out_proj", r"layer \S+0\.ln_2 gets NaN or infinity"),
        (FisherFit(base=TaskArithmetic()), "0.mlp.c_fc", r"merged model on task \S+, or the task's expert: layer \S+ gets NaN"),
        (ESMPPFit(base=TaskArithmetic()), "0.mlp.c_fc", r"layer \S+0\.mlp\.c_proj gets NaN or infinity"),
    ],
)
def test_activations_that_overflow_are_one_message(bench: Workbench, merger: Merger, place: str, message: str) -> None:
    spoiled = {key: value.clone() for key, value in bench.evaluator.data.suite.experts["grays"].items()}
    spoiled[f"visual.transformer.resblocks.{place}.weight"][0] = 3.4e38
    with pytest.raises(InputError, match=message):
        bench.merge(merger, {**bench.evaluator.data.suite.experts, "grays": spoiled})


@torch.no_grad()
def inputs_of(encoder: VisionEncoder, images: Tensor, layer: str) -> Tensor:
    """Reference: what a layer gets when the images run through."""
    seen: list[Tensor] = []
    handle = encoder.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoder(images)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("batch_size", [4, 64])
def test_observers_see_the_experts_inputs_on_its_own_proxy_images(tiny_suite: Path, batch_size: int) -> None:
    data = VisionTasks(str(tiny_suite), batch_size=batch_size, proxies=Proxies(n=10))
    bench = Workbench.open(data, Runtime(torch.device("cpu")))
    experts, name = data.suite.experts, bench.evaluator.encoder.linears[5].name
    inputs, seen = bench.inputs(experts), list[Tensor]()
    with torch.no_grad():
        inputs.observe("grays", {name: lambda x: seen.append(x.clone())})
    assert [len(x) for x in seen] == ([4, 4, 2] if batch_size == 4 else [10])
    images = torch.cat(list(data.proxy_loader("grays")))
    other = VisionEncoder(load_clip(data.suite.backbone).visual)
    other.assign(experts["grays"])
    assert_near(torch.cat(seen), inputs_of(other, images, name), forward(2 * 8 + 2, 128))
    base = VisionEncoder(load_clip(data.suite.backbone).visual)
    assert not torch.allclose(torch.cat(seen), inputs_of(base, images, name))


def test_observers_can_watch_a_merged_model_with_its_routed_experts(bench: Workbench) -> None:
    experts = bench.evaluator.data.suite.experts
    merged, inputs = bench.merge(SMILE(rank=4), experts), bench.inputs(experts)
    name, seen = bench.evaluator.encoder.linears[-1].name, list[Tensor]()
    models = (Merged({}), Merged({}, routed=merged.routed))
    with torch.no_grad():
        for model in models:
            inputs.observe("grays", {name: lambda x: seen.append(x.clone())}, model)
    plain, routed = seen
    images = torch.cat(list(bench.evaluator.data.proxy_loader("grays")))
    assert_near(plain, inputs_of(bench.evaluator.encoder, images, name), forward(2 * 8 + 2, 128))
    assert not torch.allclose(routed, plain)


class Asked(dict[str, Tensor]):
    """Weights that know which of them were asked for."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__(weights)
        self.keys_asked = set[str]()

    def __getitem__(self, key: str) -> Tensor:
        self.keys_asked.add(key)
        return super().__getitem__(key)


@torch.no_grad()
def test_streams_read_the_weights_that_they_run(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    expert, inputs = bench.evaluator.data.suite.experts["grays"], bench.inputs({})
    images = torch.cat(list(bench.evaluator.data.proxy_loader("grays")))
    other = VisionEncoder(load_clip(bench.evaluator.data.suite.backbone).visual)
    other.assign(expert)
    weights = Asked(expert)
    tokens = inputs.blocks.embed("grays", weights)
    assert torch.equal(tokens, other.embed(images))
    assert weights.keys_asked == {key for key, depth in inputs.depths.items() if depth == -1}
    whole = inputs.blocks.block(0, weights := Asked(expert), tokens, {})
    assert weights.keys_asked == {key for key, depth in inputs.depths.items() if depth == 0}
    monkeypatch.setattr(workbench, "TOKENS", 3 * tokens.shape[1] + 1)
    name, seen = bench.evaluator.encoder.linears[1].name, list[Tensor]()
    parts = inputs.blocks.block(0, expert, tokens, {name: lambda x: seen.append(x.clone())})
    assert {len(x) for x in seen[:-1]} == {3}
    assert_near(torch.cat(seen), inputs_of(other, images, name), forward(2 * 8 + 2, 128))
    assert_near(parts, whole, forward(8, 128))


def test_a_merger_sees_the_suite_in_its_order(bench: Workbench, tiny_suite: Path) -> None:
    experts = bench.evaluator.data.suite.experts
    inputs = bench.inputs({task: experts[task] for task in ("stripes", "colors")})
    assert inputs.tasks == ("stripes", "colors")
    assert inputs.linears == bench.evaluator.encoder.linears
    assert inputs.base is bench.base
    assert set(inputs.base) == {key for key in bench.base if key.startswith("visual.")} == set(experts["grays"])
    delta = experts["stripes"]["visual.proj"] - bench.base["visual.proj"]
    assert torch.equal(inputs.deltas("visual.proj")[0], delta)
    labels = whole_split(tiny_suite, "colors", "val")[1]
    assert len(labels) == bench.evaluator.data.size("colors", "val")


def test_heads_are_not_built_unless_something_is_evaluated(
    bench: Workbench, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench.merge(TaskArithmetic(), bench.evaluator.data.suite.experts)
    assert not (cache / "heads").exists()
    bench.evaluator.accuracy("grays", "val")
    assert len(list((cache / "heads").iterdir())) == len(TASKS)
