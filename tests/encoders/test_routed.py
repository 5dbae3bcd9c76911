"""Routed layers: against dense formulas, and that an image's output depends on that image only."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from routed_encoder import (
    KINDS,
    LINEARS,
    RANK,
    ROUND_OFF,
    TASKS,
    WIDTH,
    make_encoder,
    make_experts,
    make_routed,
    make_router,
    normal,
)
from tolerances import assert_near, eps, forward, summed
from torch import Tensor, nn

from mergekit_vision.encoders.hooks import capture_inputs
from mergekit_vision.encoders.routed import Route, RoutedLinear, Routing, attach
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.errors import InputError
from mergekit_vision.routers import LinearRouter, LowRankExperts


def dense_layer(linear: nn.Linear, experts: LowRankExperts, x: Tensor) -> Tensor:
    """The routed layer token by token with dense matrices, in float64."""
    scores = experts.router.double()(x)
    out = torch.empty(*x.shape[:2], linear.out_features, dtype=x.dtype)
    for n in range(x.shape[0]):
        for token in range(x.shape[1]):
            row = scores[n, token if scores.shape[1] > 1 else 0]
            chosen = sorted(range(TASKS), key=lambda t: -float(row[t]))[: experts.router.top_k]
            shares = torch.softmax(row[chosen] / experts.router.temperature, 0)
            W, b = linear.weight.double(), torch.zeros(()) if linear.bias is None else linear.bias.double()
            for share, t in zip(shares, chosen, strict=True):
                W = W + share * experts.up[t].double() @ experts.down[t].double()
                b = b if experts.bias is None else b + share * experts.bias[t].double()
            out[n, token] = W @ x[n, token] + b
    return out


@pytest.fixture
def images() -> Tensor:
    return normal(7, 3, 16, 16, seed=9)


@pytest.mark.parametrize("biased", ["layer", "experts", "both", "neither"])
@pytest.mark.parametrize("path", ["eager", "graph"])
@pytest.mark.parametrize("kind", KINDS)
def test_layer_equals_the_dense_formula(kind: str, path: str, biased: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: path == "graph")
    linear, x = nn.Linear(WIDTH, 48, bias=biased in ("layer", "both")), normal(6, 5, WIDTH, seed=1)
    up, down, bias = normal(TASKS, 48, RANK, seed=2), normal(TASKS, RANK, WIDTH, seed=3), normal(TASKS, 48, seed=4)
    experts = LowRankExperts(up, down, make_router(kind, WIDTH, 5), bias if biased in ("experts", "both") else None)
    layer = RoutedLinear(linear, experts, Routing(), "layer")
    reference = dense_layer(linear, deepcopy(experts), x.double())
    with torch.inference_mode():
        assert_near(layer(x), reference, forward(2, WIDTH + RANK))
        assert_near(layer.double()(x.double()), reference, forward(2, WIDTH + RANK, torch.float64))


@pytest.mark.parametrize("mode", ["router", "oracle"])
@pytest.mark.parametrize("path", ["eager", "graph"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_factors_count_as_the_numbers_they_are(
    kind: str, path: str, mode: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit as the same numbers in float32, in half the memory; nothing else is computed in bfloat16."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: path == "graph")
    linear, x = nn.Linear(WIDTH, 48), normal(6, 5, WIDTH, seed=1)
    up, down, bias = normal(TASKS, 48, RANK, seed=2), normal(TASKS, RANK, WIDTH, seed=3), normal(TASKS, 48, seed=4)
    rounded = LowRankExperts(up, down, make_router(kind, WIDTH, 5), bias).rounded("bfloat16")
    routings = [Routing(), Routing()]
    half, whole = (
        RoutedLinear(linear, experts, routing, "layer")
        for experts, routing in zip((rounded, rounded.rounded("float32")), routings, strict=True)
    )
    for routing, layer in zip(routings, (half, whole), strict=True):
        routing.layers["layer"], routing.mode, routing.truth = layer, mode, torch.arange(6) % TASKS
        routing.record()
    with torch.inference_mode():
        found = half(x)
        assert torch.equal(found, whole(x))
        if mode == "router":
            assert_near(found, dense_layer(linear, deepcopy(rounded), x.double()), forward(2, WIDTH + RANK))
    assert torch.equal(routings[0].counts["layer"], routings[1].counts["layer"])
    held = {name: buffer.dtype for name, buffer in half.named_buffers()}
    assert {held.pop("up"), held.pop("down")} == {torch.bfloat16}
    assert set(held.values()) == {torch.float32}
    assert torch.equal(half.experts.up, rounded.up)


@pytest.mark.parametrize("lead", [0.1, 12.0, 20.0, 95.0, 1000.0])
def test_an_expert_of_no_weight_is_left_out(lead: float) -> None:
    """As the float64 formula, without denormal weights, and the second expert is not computed where it is nothing."""
    linear, x = nn.Linear(WIDTH, 48), torch.ones(3, 5, WIDTH)
    up, down = normal(TASKS, 48, RANK, seed=2), normal(TASKS, RANK, WIDTH, seed=3)
    router = LinearRouter(torch.zeros(TASKS, WIDTH), torch.tensor([0.0, lead, -lead]), top_k=2)
    weights = router.choose(router(x)).weight
    assert torch.all((weights == 0) | (weights >= eps()))
    assert weights[0, 0].count_nonzero() == (2 if lead < 15 else 1)  # exp(-15) is near the spacing of float32 at 1
    layer = RoutedLinear(linear, LowRankExperts(up, down, router), Routing(), "layer")
    exact = torch.softmax(torch.tensor([0.0, lead], dtype=torch.float64), 0)
    dense = linear.weight.double() + torch.einsum("t,tor,tri->oi", exact, up[:2].double(), down[:2].double())
    expected = x.double() @ dense.T + linear.bias.double()
    with torch.inference_mode():
        assert_near(layer(x), expected, forward(2, WIDTH + RANK))
        if lead > 15:
            layer.up[0] = torch.nan
            assert_near(layer(x), expected, forward(2, WIDTH + RANK))


@pytest.mark.parametrize("biased", [False, True])
def test_an_expert_of_no_weight_is_left_out_where_all_are_mixed(biased: bool) -> None:
    linear = nn.Linear(WIDTH, 48)
    x = torch.tensor([1.0, -1.0]).view(2, 1, 1).expand(2, 5, WIDTH)
    up, down, bias = normal(TASKS, 48, RANK, seed=2), normal(TASKS, RANK, WIDTH, seed=3), normal(TASKS, 48, seed=4)
    router = LinearRouter(torch.tensor([0.0, 1.0, -1.0]).view(3, 1).expand(3, WIDTH), torch.zeros(3), top_k=TASKS)
    layer = RoutedLinear(linear, LowRankExperts(up, down, router, bias if biased else None), Routing(), "layer")
    expected = []
    for expert, image in zip((1, 2), x.double(), strict=True):
        dense = linear.weight.double() + up[expert].double() @ down[expert].double()
        expected.append(image @ dense.T + linear.bias.double() + (bias[expert].double() if biased else 0))
    layer.up[0] = torch.nan
    with torch.inference_mode():
        assert_near(layer(x), torch.stack(expected), forward(2, WIDTH + RANK))


@pytest.mark.parametrize("kind", KINDS)
def test_zero_experts_are_the_plain_encoder(kind: str, images: Tensor) -> None:
    plain = make_encoder()["visual"](images)
    encoder, _ = make_routed(kind, size=0.0)
    assert_near(encoder["visual"](images), plain, ROUND_OFF)


@pytest.mark.parametrize("evidence", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_see_its_batch(kind: str, evidence: bool, images: Tensor) -> None:
    if evidence and kind.startswith("projection"):
        pytest.skip("token scores are of one layer's tokens")
    encoder, _ = make_routed(kind, evidence=evidence)
    visual = encoder["visual"]
    with torch.inference_mode():
        whole = visual(images)
        alone = torch.cat([visual(image[None]) for image in images])
        order = torch.tensor([3, 0, 6, 5, 1, 2, 4])
        mixed = torch.cat([visual(images[order][:2]), visual(images[order][2:])])
        other = visual(torch.cat([images[:1], 10 * normal(4, 3, 16, 16, seed=77)]))
    assert_near(alone, whole, ROUND_OFF)
    assert_near(mixed, whole[order], ROUND_OFF)
    assert_near(other[0], whole[0], ROUND_OFF)
    assert whole.std(0).min() > 1e-3  # images differ, so that the above means something


def test_one_choice_per_image_or_token(images: Tensor) -> None:
    for kind, length in (("cosine", 1), ("projection", 17)):
        encoder, routing = make_routed(kind)
        seen = []
        for layer in routing.layers.values():
            choose = layer.router.choose
            layer.router.choose = lambda scores, choose=choose, seen=seen: seen.append(choose(scores)) or seen[-1]
        encoder["visual"](images)
        assert [tuple(choice.experts.shape) for choice in seen] == [(7, length, 1)] * len(LINEARS)
        assert all(bool((choice.weight == 1).all()) for choice in seen)


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_is_the_true_tasks_expert_alone(kind: str, images: Tensor) -> None:
    encoder, routing = make_routed(kind)
    experts = make_experts(encoder, kind)
    routing.mode, routing.truth = "oracle", torch.tensor([0, 1, 2, 0, 1, 2, 0])
    forced = encoder["visual"](images)
    for task in range(TASKS):
        single = make_encoder()
        for name, entry in experts.items():
            linear = single.get_submodule(name)
            linear.weight.data += entry.up[task] @ entry.down[task]
            linear.bias.data += entry.bias[task]
        of_task = routing.truth == task
        assert_near(forced[of_task], single["visual"](images[of_task]), ROUND_OFF)


def test_base_mode_is_the_plain_encoder(images: Tensor) -> None:
    encoder, routing = make_routed("cosine")
    routing.mode = "base"
    assert torch.equal(encoder["visual"](images), make_encoder()["visual"](images))


@pytest.mark.parametrize("mode", ["oracle", "router"])
def test_truth_has_to_fit_the_batch(mode: str, images: Tensor) -> None:
    encoder, routing = make_routed("cosine")
    routing.mode = mode
    routing.record()
    if mode == "oracle":
        with pytest.raises(InputError, match="7 images in `truth`; got none"):
            encoder["visual"](images)
    else:
        encoder["visual"](images)
        assert not any(counts.any() for counts in routing.counts.values())
    routing.truth = torch.zeros(3, dtype=torch.long)
    with pytest.raises(InputError, match="7 images in `truth`; got 3"):
        encoder["visual"](images)


@pytest.mark.parametrize("kind", ["cosine", "linear, all mixed", "projection"])
def test_counts(kind: str, images: Tensor) -> None:
    encoder, routing = make_routed(kind)
    chosen: dict[str, list[Tensor]] = {name: [] for name in LINEARS}
    for name, layer in routing.layers.items():
        choose = layer.router.choose
        layer.router.choose = lambda scores, choose=choose, name=name: chosen[name].append(choose(scores)) or chosen[name][-1]
    truth = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    routing.record()
    for part in (slice(0, 3), slice(3, 7)):
        routing.truth = truth[part]
        encoder["visual"](images[part])
    for name, counts in routing.counts.items():
        expected = torch.zeros(TASKS, TASKS, dtype=torch.float64)
        choices = [(e, w) for batch in chosen[name] for e, w in zip(batch.experts, batch.weight, strict=True)]
        for task, (experts, weights) in zip(truth.tolist(), choices, strict=True):
            for e, w in zip(experts.flatten().tolist(), weights.flatten().tolist(), strict=True):
                expected[task, e] += w / len(experts)
        assert_near(counts, expected, summed(17))
    routing.record(False)
    assert routing.counts == {}


def test_shared_evidence() -> None:
    """Scores 1, 2 and 4 for three experts in turn: the sum, the held decision and the layers' own differ."""
    x, linear = torch.ones(2, 1, 1), nn.Linear(1, 1, bias=False)
    nn.init.zeros_(linear.weight)
    up, down = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1), torch.ones(3, 1, 1)
    scores = torch.tensor([[3.0, 0.0, 0.0], [2.0, 0.0, 2.5], [-4.0, 1.0, -1.0]])

    def outputs(*evidence: str) -> list[float]:
        routing = Routing()
        layers = [
            RoutedLinear(
                linear, LowRankExperts(up, down, LinearRouter(row[:, None], torch.zeros(3)), evidence=e), routing, str(i)
            )
            for i, (row, e) in enumerate(zip(scores, evidence, strict=True))
        ]
        return [layer(x)[0, 0, 0].item() for _ in range(2) for layer in layers]  # twice: a batch starts afresh

    assert outputs("own", "own", "own") == [1, 3, 2] * 2
    assert outputs("start", "add", "add") == [1, 1, 3] * 2  # 3 0 0; 5 0 2.5; 1 1 1.5
    assert outputs("own", "start", "hold") == [1, 3, 3] * 2
    with pytest.raises(RuntimeError, match="no earlier layer"):
        outputs("add", "own", "own")


@pytest.mark.parametrize("ahead", [(2,), (0, 3)])
@pytest.mark.parametrize("kind", ["linear of covariance, mixed", "projection"])
def test_layers_decide_ahead_by_the_base_and_for_all(kind: str, ahead: tuple[int, ...], images: Tensor) -> None:
    """All layers take the expert with the largest sum of the scores that some of them give the tokens of the plain encoder."""
    plain, experts = VisionEncoder(make_encoder()["visual"]), make_experts(make_encoder(), kind)
    seen: dict[str, Tensor] = {}
    with torch.no_grad(), capture_inputs(plain, {LINEARS[at]: partial(seen.__setitem__, LINEARS[at]) for at in ahead}):
        plain(images)
        scores = sum(experts[name].router(x).mean(1) for name, x in seen.items())
    encoder = VisionEncoder(make_encoder()["visual"])
    encoder.route({name: replace(e, evidence="ahead" if at in ahead else "hold") for at, (name, e) in enumerate(experts.items())})
    encoder.routing.record()
    encoder.routing.truth = torch.zeros(len(images), dtype=torch.long)
    with torch.no_grad():
        for _ in range(2):  # a batch starts afresh
            found = encoder(images)
    with pytest.raises(RuntimeError, match="no earlier layer"):  # what was decided is of that pass alone
        encoder.visual(images.flip(0))
    top = experts[LINEARS[0]].router.choose(scores[:, None])
    for counts in encoder.routing.counts.values():
        assert_near(counts[0], 2 * top.dense(TASKS).sum((0, 1)).double(), summed(7))
    for image, (chosen, weights) in enumerate(zip(top.experts[:, 0], top.weight[:, 0], strict=True)):
        single = make_encoder()
        for name, entry in experts.items():
            linear = single.get_submodule(name)
            linear.weight.data += sum(w * entry.up[t] @ entry.down[t] for t, w in zip(chosen, weights, strict=True))
            linear.bias.data += sum(w * entry.bias[t] for t, w in zip(chosen, weights, strict=True))
        assert_near(found[image], single["visual"](images[image, None])[0], ROUND_OFF)
    encoder.routing.mode = "base"
    assert torch.equal(encoder(images), plain(images))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_routes_alike_and_stays_close(kind: str, images: Tensor) -> None:
    encoder, _ = make_routed(kind, size=0.1)
    with torch.inference_mode():
        full = encoder["visual"](images)
        with torch.autocast("cpu", torch.bfloat16):
            half = encoder["visual"](images)
    roundings = 2 * 8  # in a row, at random: they add up by the square root
    assert (half.float() - full).norm() / full.norm() < roundings**0.5 * eps(torch.bfloat16)


@pytest.mark.parametrize("evidence", [False, True])
@pytest.mark.parametrize("kind", ["cosine", "projection"])
def test_compiles_to_one_graph(kind: str, evidence: bool, images: Tensor) -> None:
    encoder, routing = make_routed(kind, evidence=evidence)
    routing.record()
    routing.truth = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    with torch.inference_mode():
        plain = encoder["visual"](images)
        counts = {name: count.clone() for name, count in routing.counts.items()}
        routing.record()
        compiled = torch.compile(encoder["visual"], fullgraph=True, backend="aot_eager")
        assert_near(compiled(images), plain, ROUND_OFF)
    assert routing.counts.keys() == counts.keys()
    for name, count in counts.items():
        assert_near(routing.counts[name], count, summed(17))


def test_an_encoder_that_decides_ahead_compiles_to_one_graph(images: Tensor) -> None:
    encoder = VisionEncoder(make_encoder()["visual"])
    experts = {name: entry.rounded("bfloat16") for name, entry in make_experts(encoder, "linear of covariance, mixed").items()}
    encoder.route({name: replace(e, evidence="ahead" if name == LINEARS[-2] else "hold") for name, e in experts.items()})
    with torch.inference_mode():
        plain = encoder(images)
        compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
        for _ in range(2):  # a batch starts afresh
            assert_near(compiled(images), plain, 2 * ROUND_OFF)  # the first run's rounding is in the second's decision


def test_attach_refuses_what_does_not_fit() -> None:
    encoder = make_encoder()
    experts = make_experts(encoder, "cosine")
    with pytest.raises(InputError, match=r"'visual\.nothing'"):
        attach(encoder, {"visual.nothing": experts[LINEARS[0]]})
    with pytest.raises(ValueError, match="the layer is 96 x 32, its experts are 128 x 32"):
        attach(encoder, {LINEARS[0]: experts[LINEARS[1]]})
    with pytest.raises(ValueError, match="do not fit each other"):
        LowRankExperts(torch.zeros(2, 5, 3), torch.zeros(2, 4, 6), make_router("cosine", 6, 0))


def test_attached_experts_are_independent_of_the_data() -> None:
    encoder = make_encoder()
    experts = make_experts(encoder, "cosine")
    routing = attach(encoder, experts)
    encoder.double()
    assert experts[LINEARS[0]].router.prototypes.dtype == torch.float32
    assert routing.layers[LINEARS[0]].router.prototypes.dtype == torch.float64
