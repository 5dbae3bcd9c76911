"""ESM++ and SMILE against their formulas, written plainly in float64 with full SVDs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import formulas
import pytest
import torch
from synthetic import LINEARS, TOKENS, WIDTH, Zoo, bias_key, relative_error, weight_key
from tolerances import forward, of_formula, summed
from torch import Tensor, nn

from mergekit_vision.encoders.routed import RoutedLinear, Routing
from mergekit_vision.errors import InputError
from mergekit_vision.functional.routing import Axes, calibrate, discriminant, pool_tokens, principal_axes
from mergekit_vision.merger import Merged
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.esmpp import ESMPP, ESMPPBayes
from mergekit_vision.plugins.smile import SMILE
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.routers import LowRankExperts

T = 4
LAYER = forward(2, 4 * WIDTH)
"""Of a routed layer's output: the layer itself, and the experts."""


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    return Zoo(tasks=T)


def residuals(zoo: Zoo, name: str, base: Merged, scale: float) -> Tensor:
    key = weight_key(name)
    return zoo.delta64(key) - base.coefficient(key, scale) * base.update[key].double()


def product(experts: LowRankExperts) -> Tensor:
    return experts.up.double() @ experts.down.double()


def essential(delta: Tensor, rows: Tensor, rank: int, project: bool) -> Tensor:
    """Projector on the leading directions of the shifts, or what it keeps of the matrix."""
    B = torch.linalg.svd((rows @ delta.T).T)[0][:, :rank]
    return B @ B.T @ delta if project else B @ B.T


def run(zoo: Zoo, name: str, experts: LowRankExperts, x: Tensor, update: Tensor | float = 0.0, mode: str = "router") -> Tensor:
    """The routed layer on the backbone's weights, plus ``update``."""
    weight = zoo.base[weight_key(name)] + update
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight.data, linear.bias.data = weight, zoo.base[bias_key(name)]
    routing = Routing()
    routing.mode, routing.truth = mode, torch.arange(len(x)) % T
    with torch.inference_mode():
        return RoutedLinear(linear, replace(experts, evidence="own"), routing, name)(x)


# --- ESM++


@pytest.mark.parametrize("kinds", [("in_proj", "c_fc"), ("out_proj", "c_proj")])
@pytest.mark.parametrize("scale", [0.4, 0.0])
def test_esmpp(zoo: Zoo, kinds: tuple[str, ...], scale: float) -> None:
    rank, base = 6, ESM().merge(zoo.inputs())
    merged = ESMPP(rank=rank, layers=kinds).merge(replace(zoo.inputs(), choose_scale=lambda _: scale))
    names = [name for name in LINEARS if name.endswith(kinds)]
    assert list(merged.routed) == names
    assert not merged.scalable
    assert merged.scale == scale
    for key, update in merged.update.items():
        assert relative_error(update, base.coefficient(key, scale) * base.update[key].double()) < summed(1) or not update.any()
    for name in names:
        experts = merged.routed[name]
        for t, (task, delta) in enumerate(zip(zoo.experts, residuals(zoo, name, base, scale), strict=True)):
            X = zoo.rows(task, name)
            projector, kept = (partial(essential, rank=rank, project=project) for project in (False, True))
            up = experts.up[t].double()
            assert relative_error(up @ up.T, projector(delta, X)) < of_formula(projector, delta, X)
            assert relative_error(product(experts)[t], kept(delta, X)) < of_formula(kept, delta, X)
            assert relative_error(experts.router.prototypes[t], X.mean(0)) < summed(TOKENS)
        assert experts.bias is None
        assert experts.evidence == "own"


def test_esmpp_routes_by_the_cosine_of_the_mean_token(zoo: Zoo) -> None:
    merged = ESMPP(rank=6).merge(zoo.inputs())
    name = LINEARS[2]
    x = torch.cat([inputs[name][:5] for inputs in zoo.layer_inputs.values()])
    prototypes = torch.stack([zoo.rows(task, name).mean(0) for task in zoo.experts])
    chosen = torch.cosine_similarity(x.double().mean(1)[:, None], prototypes, dim=-1).argmax(1)
    assert chosen.unique().numel() > 1
    weight = zoo.base[weight_key(name)].double() + merged.update[weight_key(name)].double()
    dense = weight + product(merged.routed[name])[chosen]
    expected = x.double() @ dense.transpose(1, 2) + zoo.base[bias_key(name)].double()
    assert relative_error(run(zoo, name, merged.routed[name], x, merged.update[weight_key(name)]), expected) < LAYER


def test_esmpp_of_full_rank_is_the_expert(zoo: Zoo) -> None:
    merged = ESMPP(rank=999, layers=("in_proj", "out_proj", "c_fc", "c_proj")).merge(zoo.inputs())
    for name, experts in merged.routed.items():
        tuned = torch.stack([expert[weight_key(name)] for expert in zoo.experts.values()]).double()
        base = zoo.base[weight_key(name)].double() + merged.update[weight_key(name)].double()
        assert relative_error(base + product(experts), tuned) < summed(4 * WIDTH)


def test_esmpp_by_energy_takes_what_is_worth_most_a_byte(zoo: Zoo) -> None:
    kinds, base = ("in_proj", "c_proj"), ESM().merge(zoo.inputs())
    names = [name for name in LINEARS if name.endswith(kinds)]
    spectra, prices = [], []
    for name in names:
        for task, delta in zip(zoo.experts, residuals(zoo, name, base, 1.0), strict=True):
            X = zoo.rows(task, name)
            spectra.append(torch.linalg.svdvals(X @ delta.T)[: min(delta.shape)] ** 2)
            prices.append(4 * sum(delta.shape))
    for megabytes in (sum(prices) / 1e6, 0.03, 0.1, None):
        merged = ESMPP(rank="energy", megabytes=megabytes, layers=kinds).merge(zoo.inputs())
        found = [k for experts in merged.routed.values() for k in experts.ranks]
        budget = 32 * sum(prices) if megabytes is None else int(1e6 * megabytes)
        assert found == formulas.one_by_one(spectra, budget, 1, prices)
        stored = sum(experts.stored()[0][key].nbytes for experts in merged.routed.values() for key in ("up", "down"))
        assert stored == sum(k * price for k, price in zip(found, prices, strict=True)) <= budget
        for name, experts in merged.routed.items():
            for t, (task, delta) in enumerate(zip(zoo.experts, residuals(zoo, name, base, 1.0), strict=True)):
                kept, X = partial(essential, rank=experts.ranks[t], project=True), zoo.rows(task, name)
                assert relative_error(product(experts)[t], kept(delta, X)) < of_formula(kept, delta, X)
    assert len(set(found)) == 1, "the last budget holds them whole"


def test_esmpp_of_one_task_and_of_a_layer_that_did_not_change(zoo: Zoo) -> None:
    single = Zoo(tasks=2)
    key = weight_key(LINEARS[2])
    single.experts["task1"][key] = single.base[key].clone()
    merged = ESMPP(base=TaskArithmetic(), rank="energy", megabytes=0.02).merge(
        replace(single.inputs(), choose_scale=lambda _: 0.0)
    )
    assert not product(merged.routed[LINEARS[2]])[1].any()
    assert product(merged.routed[LINEARS[2]])[0].any()
    assert [len(experts.ranks) for experts in ESMPP(rank="energy", megabytes=0.02).merge(Zoo(tasks=1).inputs()).routed.values()]


def test_esmpp_does_not_depend_on_the_batches_of_proxies(zoo: Zoo) -> None:
    zoo, again = replace(zoo), replace(zoo, batch=7)
    one, two = (ESMPPBayes(rank=6).merge(z.inputs()).routed for z in (zoo, again))
    base, kept = ESM().merge(zoo.inputs()), partial(essential, rank=6, project=True)
    for name in one:
        deltas = residuals(zoo, name, base, 1.0)
        pairs = zip(product(one[name]), product(two[name]), deltas, zoo.experts, strict=True)
        for a, b, delta, task in pairs:
            assert relative_error(a, b) < of_formula(kept, delta, zoo.rows(task, name))
        router = two[name].router
        axes = Axes(router.basis.double(), router.offset.double())
        features = [pool_tokens(inputs[name].double(), router.pooling, axes) for inputs in zoo.layer_inputs.values()]
        bound = of_formula(lambda *features: discriminant(features, 0.5).weight, *features)
        assert relative_error(one[name].router.weight, router.weight.double()) < bound


@pytest.mark.parametrize("rule", ["cosine", "centered", "discriminant"])
def test_every_rule_finds_tasks_that_are_apart(zoo: Zoo, rule: str) -> None:
    zoo = replace(zoo)
    for t, inputs in enumerate(zoo.layer_inputs.values()):
        for name in LINEARS:
            inputs[name][:, :, t] += 50
    merged = ESMPP(rank=2, rule=rule).merge(zoo.inputs())
    for name, experts in merged.routed.items():
        for t, inputs in enumerate(zoo.layer_inputs.values()):
            scores = experts.router(inputs[name])
            assert scores.shape == (zoo.images, 1, T)
            assert (scores[:, 0].argmax(1) == t).all()


def test_discriminant_is_the_log_posterior_of_gaussians(zoo: Zoo) -> None:
    shrinkage = 0.3
    merged = ESMPP(rank=2, rule="discriminant", pooling=("mean", "deviation", "first"), shrinkage=shrinkage).merge(zoo.inputs())
    for name, experts in merged.routed.items():
        *groups, seen = (
            torch.cat([x.mean(1), x.std(1, correction=0), x[:, 0]], 1)
            for x in (*(inputs[name].double() for inputs in zoo.layer_inputs.values()), zoo.layer_inputs["task1"][name].double())
        )
        with torch.inference_mode():
            found = experts.router.double()(zoo.layer_inputs["task1"][name].double())[:, 0].log_softmax(1)
        expected = log_posteriors(seen, *groups, shrinkage=shrinkage)
        bound = of_formula(partial(log_posteriors, shrinkage=shrinkage), seen, *groups)
        assert relative_error(found, expected) < bound


def log_posteriors(seen: Tensor, *groups: Tensor, shrinkage: float) -> Tensor:
    """Of Gaussians that share one shrunk covariance."""
    means = [group.mean(0) for group in groups]
    rest = torch.cat([group - mean for group, mean in zip(groups, means, strict=True)])
    S = rest.T @ rest / (len(rest) - T)
    S = (1 - shrinkage) * S + shrinkage * S.diag().diag()
    gaussians = [torch.distributions.MultivariateNormal(mean, S) for mean in means]
    return torch.stack([gaussian.log_prob(seen) for gaussian in gaussians], 1).log_softmax(1)


@pytest.mark.parametrize("statistics", ["experts", "base", "routed"])
def test_statistics_come_from_the_model_that_was_asked_for(zoo: Zoo, statistics: str) -> None:
    seen: list[tuple[str, Merged | None]] = []

    def run_proxies(task: str, observers: object, model: Merged | None) -> None:
        seen.append((task, model))
        zoo.run_proxies(task, observers)

    inputs = replace(zoo.inputs(), run_proxies=run_proxies)
    merged = ESMPP(base=TaskArithmetic(), rank=2, statistics=statistics).merge(inputs)
    models = [model for task, model in seen if task == "task0"]
    assert len(seen) == T * len(models)
    assert models[0] is None
    assert [bool(model.routed) for model in models[1:]] == {"experts": [], "base": [False], "routed": [False, True]}[statistics]
    for model in models[1:]:
        assert model.update.keys() == merged.update.keys()
        assert all(torch.equal(model.update[key], merged.update[key]) for key in merged.update)


@pytest.mark.parametrize(
    ("options", "evidence"),
    [
        ({"decision": "layer"}, ["own", "own", "own", "own"]),
        ({"decision": "branch"}, ["start", "start", "start", "start"]),
        (
            {"decision": "branch", "layers": ("in_proj", "out_proj", "c_fc", "c_proj")},
            ["start", "hold", "start", "hold", "start", "hold", "start", "hold"],
        ),
        ({"decision": "branch", "layers": ("out_proj", "c_proj")}, ["start"] * 4),
        ({"decision": "sum"}, ["start", "add", "add", "add"]),
        ({"decision": "hold", "held_layer": 1}, ["own", "start", "hold", "hold"]),
        ({"decision": "hold"}, ["start", "hold", "hold", "hold"]),
        ({"decision": "once", "held_layer": 1}, ["hold", "ahead", "hold", "hold"]),
        ({"decision": "once"}, ["ahead", "ahead", "ahead", "ahead"]),
    ],
)
def test_decision(zoo: Zoo, options: dict[str, object], evidence: list[str]) -> None:
    merged = ESMPP(base=TaskArithmetic(), rank=2, **options).merge(zoo.inputs())
    assert [experts.evidence for experts in merged.routed.values()] == evidence


def test_bayes_judges_by_images_left_out_and_branches_share_their_judgement() -> None:
    zoo = Zoo(tasks=T)
    for name in LINEARS:  # ten images a task, all much alike
        images = zoo.layer_inputs["task0"][name].chunk(T)
        for t, inputs in enumerate(zoo.layer_inputs.values()):
            inputs[name] = images[t] + torch.arange(images[t].shape[2]).eq(t) * images[t].std()
    zoo.images = 10
    merged = ESMPPBayes(rank=2, layers=("in_proj", "out_proj")).merge(zoo.inputs())
    for name in LINEARS[::4]:
        router = merged.routed[name].router
        tokens = torch.cat([zoo.rows(task, name) for task in zoo.experts])
        features = [pool_tokens(x[name].double(), router.pooling, fitted_axes(tokens)) for x in zoo.layer_inputs.values()]
        assert relative_error(torch.tensor(router.temperature), temperature(*features)) < of_formula(temperature, *features)
        assert router.temperature > 1.5  # ten images are too few for the Gaussians' own word
        x = torch.cat([x[name] for x in zoo.layer_inputs.values()])
        assert relative_error(router(x)[:, 0].softmax(1), posteriors(*features)) < of_formula(posteriors, *features)
        held = merged.routed[name.replace("in_proj", "out_proj")]
        assert (held.evidence, held.router.temperature) == ("hold", router.temperature)


def temperature(*features: Tensor) -> Tensor:
    fit = discriminant(features, 0.5)
    return torch.tensor(calibrate(fit.left_out, fit.labels), dtype=torch.float64)


def posteriors(*features: Tensor) -> Tensor:
    fit = discriminant(features, 0.5)
    return (torch.cat(features) @ fit.weight.T + fit.bias).softmax(1)


def fitted_axes(tokens: Tensor) -> Axes:
    return principal_axes(tokens.mean(0), tokens.T @ tokens / len(tokens))


# --- nearest subspace


def projectors(bases: Tensor) -> Tensor:
    return bases.double().transpose(1, 2) @ bases.double()


def right(delta: Tensor, rank: int) -> Tensor:
    """Projector on the leading right singular vectors."""
    V = torch.linalg.svd(delta, full_matrices=False)[2][:rank]
    return V.T @ V


@pytest.mark.parametrize(
    ("merger", "rank"),
    [
        (ESMPP(base=TaskArithmetic(), rank=2, rule="mass"), WIDTH // T),
        (ESMPP(base=TaskArithmetic(), rank=2, rule="mass", pooling=("first",), gate_rank=3), 3),
        (SMILE(rank=2, gate_rank=3, rule="mass"), 3),
    ],
)
def test_mass_measures_the_distance_from_what_the_task_vectors_see(zoo: Zoo, merger: ESMPP | SMILE, rank: int) -> None:
    for name, experts in merger.merge(zoo.inputs()).routed.items():
        router = experts.router
        assert router.center is None
        assert router.pooling == getattr(merger, "pooling", ("first",))
        for found, delta in zip(projectors(router.basis), zoo.delta64(weight_key(name)), strict=True):
            assert relative_error(found, right(delta, rank)) < of_formula(partial(right, rank=rank), delta)


@pytest.mark.parametrize(
    "merger",
    [
        ESMPP(base=TaskArithmetic(), rank=2, rule="sim", statistics="base", pooling=("mean", "first"), gate_rank=3),
        SMILE(rank=2, gate_rank=3, rule="sim"),
    ],
)
def test_sim_measures_the_distance_from_the_features_of_a_task(zoo: Zoo, merger: ESMPP | SMILE) -> None:
    models: list[Merged | None] = []

    def run_proxies(task: str, observers: object, model: Merged | None) -> None:
        models.append(model)
        zoo.run_proxies(task, observers)

    for name, experts in merger.merge(replace(zoo.inputs(), run_proxies=run_proxies)).routed.items():
        router = experts.router
        found = projectors(router.basis)
        for t, inputs in enumerate(zoo.layer_inputs.values()):
            f = pool_tokens(inputs[name].double(), router.pooling)
            assert relative_error(router.center[t], f.mean(0)) < summed(zoo.images)
            assert relative_error(found[t], right(f - f.mean(0), 3)) < of_formula(partial(right, rank=3), f - f.mean(0))
    assert all(model is not None and not model.routed for model in models[-T:])


@pytest.mark.parametrize("make", [partial(ESMPP, base=TaskArithmetic(), rank=2), partial(SMILE, rank=2)])
def test_who_holds_a_decision_stores_no_scores(zoo: Zoo, make: Callable[..., ESMPP | SMILE]) -> None:
    merged = make(rule="mass", decision="once", held_layer=2, top_k=3).merge(zoo.inputs())
    routers = [experts.router for experts in merged.routed.values()]
    assert [bool(list(router.buffers())) for router in routers] == [at == 2 for at in range(len(routers))]
    assert all(router.top_k == 3 for router in routers)


# --- SMILE


@pytest.mark.parametrize("top_k", [1, 2])
def test_smile(zoo: Zoo, top_k: int) -> None:
    rank, gate_rank = 5, 3
    merged = SMILE(rank, gate_rank, top_k).merge(replace(zoo.inputs(), run_proxies=None))
    assert merged.update == {}
    assert list(merged.routed) == list(LINEARS)
    for name, experts in merged.routed.items():
        x = torch.cat([inputs[name][:4] for inputs in zoo.layer_inputs.values()]).double()
        deltas, shifts = zoo.delta64(weight_key(name)), zoo.delta64(bias_key(name))
        svds = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
        gates = torch.stack([(x @ Vh[:gate_rank].T).norm(dim=-1) for _, _, Vh in svds], -1)
        shares = gates.softmax(-1)
        shares = torch.where(shares >= shares.topk(top_k).values[..., -1:], shares, 0.0)
        shares = shares / shares.sum(-1, keepdim=True)
        expected = x @ zoo.base[weight_key(name)].double().T + zoo.base[bias_key(name)].double()
        for t, (U, S, Vh) in enumerate(svds):
            low = U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]
            expected = expected + shares[..., t, None] * (x @ low.T + shifts[t])
        found = run(zoo, name, experts, x.float())
        assert found.shape[:2] == (4 * T, TOKENS)
        assert relative_error(found, expected) < LAYER


def test_smile_of_full_rank_is_the_expert(zoo: Zoo) -> None:
    merged = SMILE(rank=999).merge(zoo.inputs())
    for name, experts in merged.routed.items():
        x = torch.cat([inputs[name][:1] for inputs in zoo.layer_inputs.values()])
        expected = [
            zoo.layer_inputs[task][name][0] @ expert[weight_key(name)].T + expert[bias_key(name)]
            for task, expert in zoo.experts.items()
        ]
        assert relative_error(run(zoo, name, experts, x, mode="oracle"), torch.stack(expected).double()) < 2 * LAYER


def test_smile_averages_the_rest_on_demand(zoo: Zoo) -> None:
    merged = SMILE(layers=("c_fc",), rest="mean").merge(zoo.inputs())
    routed = {key for name in LINEARS if name.endswith("c_fc") for key in (weight_key(name), bias_key(name))}
    assert merged.update.keys() == zoo.base.keys() - routed
    assert not merged.scalable
    assert relative_error(merged.update["visual.proj"], zoo.delta64("visual.proj").mean(0)) < summed(T)


# --- bad input, odd input


@pytest.mark.parametrize("merger", [ESMPP(), ESMPPBayes(), SMILE()])
def test_an_expert_that_is_the_backbone_adds_nothing(merger: ESMPP | SMILE) -> None:
    zoo = Zoo(tasks=2)
    zoo.experts = dict.fromkeys(zoo.experts, zoo.base)
    for experts in merger.merge(zoo.inputs()).routed.values():
        assert not product(experts).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ESMPP(rank=0), "rank is 0"),
        (lambda: ESMPP(rank="all"), "rank is 'all'"),
        (lambda: ESMPP(rank=None), "rank is None"),
        (lambda: ESMPP(megabytes=1.0), "goes with rank energy only"),
        (lambda: ESMPPBayes(rank="energy", megabytes=0.0), "ESMPPBayes: megabytes is 0.0, but must be above 0"),
        (
            lambda: ESMPP(rank="energy", megabytes=0.001).merge(Zoo(tasks=2).inputs()),
            "one direction of each expert in 4 layers takes 0.01; give more",
        ),
        (lambda: ESMPP(rule="nearest"), "one of cosine, centered, discriminant, mass, sim"),
        (lambda: ESMPP(rule="mass", pooling=("mean", "first")), r"rule mass takes either \[mean\] or \[first\]"),
        (lambda: ESMPP(rule="sim", pooling=("covariance",)), "covariance is for rule discriminant"),
        (lambda: ESMPP(gate_rank=0), "gate_rank is 0"),
        (lambda: ESMPP(gate_rank=8), "gate_rank is 8, but goes with rule mass or sim only, not with cosine"),
        (lambda: ESMPPBayes(gate_rank=8), "gate_rank is 8, but goes with rule mass or sim only, not with discriminant"),
        (lambda: ESMPP(held_layer=99), "held_layer is 99, which decision layer does not use"),
        (lambda: ESMPPBayes(held_layer=0), "ESMPPBayes: held_layer is 0, which decision branch does not use"),
        (lambda: SMILE(held_layer=2), "SMILE: held_layer is 2, which decision layer does not use"),
        (lambda: ESMPP(decision="once", statistics="routed"), "statistics must be base or experts"),
        (lambda: ESMPPBayes(decision="once"), "or once without held_layer"),
        (lambda: SMILE(decision="sum"), "one of layer, once"),
        (lambda: SMILE(decision="once", held_layer=8).merge(Zoo(tasks=2).inputs()), "there are 8 routed layers"),
        (lambda: ESMPP(rule="discriminant", shrinkage=0.0), "shrinkage is 0.0"),
        (lambda: ESMPP(pooling=("mean", "first")), "needs rule discriminant"),
        (lambda: ESMPP(rule="discriminant", pooling=("median",)), "some of mean, deviation, first, covariance"),
        (lambda: ESMPP(temperature=None), "temperature null is for rule discriminant"),
        (lambda: ESMPPBayes(decision="sum"), "not for decision sum"),
        (lambda: SMILE(gate_rank=0), "gate_rank is 0"),
        (lambda: SMILE(rest="none"), "one of base, mean"),
        (lambda: SMILE(layers=("c_fd",)), "SMILE: layers is .* must name some of in_proj"),
        (lambda: ESMPP(layers=()), "must name some of in_proj"),
        (lambda: ESMPP(top_k=True), "top_k is True, but must be a whole number"),
        (lambda: SMILE(rank=2.5), "rank is 2.5, but must be a whole number"),
        (lambda: ESMPPBayes(top_k=2, temperature=float("inf")), "temperature a finite number"),
        (lambda: ESMPP(base=SMILE()).merge(Zoo(tasks=2).inputs()), "SMILE has routed experts itself"),
        (lambda: ESMPP(decision="hold", held_layer=9).merge(Zoo(tasks=2).inputs()), "there are 4 routed layers"),
    ],
)
def test_bad_input(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
