"""Results of a comparison that never was."""

from random import Random
from typing import Any

TASKS = {"glyphs": (0.5, 0.9), "<b>&'signs'": (0.4, 0.8)}
LAYERS = {
    f"visual.transformer.resblocks.{block}.{owner}.{kind}": {"block": block, "kind": kind}
    for block in (0, 1)
    for owner, kind in (("attn", "in_proj"), ("mlp", "c_fc"))
}


def row(name: str, kind: str, accuracies: list[float], **more: Any) -> dict[str, Any]:
    tasks = {
        task: {"accuracy": value, "normalized": value / expert, "n": 50}
        for (task, (_, expert)), value in zip(TASKS.items(), accuracies, strict=True)
    }
    mean = {key: sum(task[key] for task in tasks.values()) / len(tasks) for key in ("accuracy", "normalized")}
    worst = min(tasks, key=lambda task: tasks[task]["normalized"])
    return {"name": name, "kind": kind, "tasks": tasks, "mean": mean, "worst": worst, "extra_parameters": 0, **more}


def method(name: str, kind: str, accuracies: list[float], **more: Any) -> dict[str, Any]:
    merger = {"name": name, "class_path": f"theirs.{name}", "init_args": {"rank": None, "layers": ["c_fc", "in_proj"]}}
    found = {
        "merger": merger,
        "scale": 0.5,
        "search": [],
        "seconds": {"merge": 1.25, "search": 0.0, "eval": 3.0},
        "routing": None,
    }
    return row(name, kind, accuracies, **{**found, **more})


def made_up() -> dict[str, Any]:
    search = [{"coefficient": c, "accuracy": 0.5, "normalized": n} for c, n in ((0.5, 0.9), (1.0, 0.7))]
    curve = {"directions": [1, 4, 16], "esd": [0.5, 0.9, 1.0], "svd": [0.4, 0.8, 1.0], "per_task": 8}
    routing = {layer: dict.fromkeys(TASKS, 0.75) for layer in LAYERS}
    return {
        "kind": "comparison",
        "schema": 1,
        "suite": "made up",
        "backbone": "local-dir:/home/someone/base",
        "pretrained": None,
        "parameters": 1_000_000,
        "layers": LAYERS,
        "experts": {task: f"{number}.safetensors" for number, task in enumerate(TASKS)},
        "tasks": {task: {"images": 50, "classes": 4} for task in TASKS},
        "split": "test",
        "scale": "search",
        "search": {"low": 0.0, "high": 3.0, "first": 0.125, "halvings": 2},
        "route": "router",
        "proxies": {"n": 32, "split": "val", "seed": 0, "label": None, "source": None},
        "draws": 1,
        "seed": 0,
        "precision": "32-true",
        "device": "cpu",
        "processes": 1,
        "versions": {"mergekit_vision": "0.1", "torch": "2"},
        "rows": [
            row("zero-shot", "backbone", [0.5, 0.4]),
            method("Plain", "static", [0.6, 0.6], search=search),
            method("Clever", "dynamic", [0.8, 0.7], routing=routing, extra_parameters=120_000, scale=None),
            row("experts", "experts", [0.9, 0.8], extra_parameters=1_000_000),
        ],
        "left_out": {"Shy": "<script>alert(1)</script>"},
        "similarity": {"tasks": list(TASKS), "cosine": [[1.0, 0.1], [0.1, 1.0]]},
        "energy": dict.fromkeys(LAYERS, curve),
    }


def large(tasks: int = 20, methods: int = 20) -> dict[str, Any]:
    """The same of many tasks and methods, with everything that a report can have."""
    chance = Random(0)
    names = [*_TASKS[:tasks]]
    experts = {task: chance.uniform(0.7, 0.99) for task in names}
    layers = {f"layer.{block}.{kind}": {"block": block, "kind": kind} for block in range(12) for kind in ("in_proj", "c_fc")}

    def filled(name: str, kind: str, share: float, **more: Any) -> dict[str, Any]:
        found = {task: min(0.99, expert * chance.gauss(share, 0.05)) for task, expert in experts.items()}
        cells = {task: {"accuracy": value, "normalized": value / experts[task], "n": 5000} for task, value in found.items()}
        mean = {key: sum(cell[key] for cell in cells.values()) / tasks for key in ("accuracy", "normalized")}
        draws = [{"seed": seed, "scale": 0.5, "tasks": cells, "mean": mean} for seed in (0, 1)] if kind == "dynamic" else []
        worst = min(cells, key=lambda task: cells[task]["normalized"])
        return {
            "name": name,
            "kind": kind,
            "tasks": cells,
            "mean": mean,
            "worst": worst,
            "extra_parameters": 0,
            "draws": draws,
            **more,
        }

    rows = []
    for number, name in enumerate(_METHODS[:methods]):
        kind, share = ("dynamic" if number >= methods - 3 else "static"), 0.6 + 0.35 * number / methods
        top = chance.uniform(0.2, 1.5)
        search = [
            {"coefficient": c, "accuracy": 0.5, "normalized": share - (c - top) ** 2 / 10} for c in (0.125, 0.25, 0.5, 1.0, 2.0)
        ]
        merger = {"name": name, "class_path": f"mergekit_vision.plugins.{name}", "init_args": {"rank": None}}
        routing = {layer: {task: chance.uniform(0.3, 1) for task in names} for layer in layers} if kind == "dynamic" else None
        seconds = {"merge": 10.0 * number, "search": 30.0, "eval": 20.0}
        published = {
            "accuracy": share,
            "normalized": None,
            "scale": 0.3,
            "remark": "",
            "source": "A",
            "experts": "B",
            "note": "C",
        }
        more = {"merger": merger, "scale": 0.5, "search": search, "seconds": seconds, "routing": routing, "published": published}
        rows.append(filled(name, kind, share, **more))
    for method in ("ESM", "ESMPP", "FeatCal"):
        for rank in (4, 8, 16, 32, 64, 128):
            more = {key: rows[-1][key] for key in ("merger", "scale", "seconds", "routing", "search")}
            more |= {"merger": {**more["merger"], "name": method, "class_path": method}, "search": [], "routing": None}
            differs = {"proxies.n": rank, "route": "router"}
            found = filled(f"{method}, {rank} proxy images a task", "static", 0.7 + 0.03 * rank**0.3, **more)
            rows.append({**found, "settings": differs, "differs": ["proxies.n"]})
    cosine = [[1.0 if i == j else chance.uniform(0, 0.4) for j in range(tasks)] for i in range(tasks)]
    curve = {"directions": [1, 4, 16, 64], "esd": [0.5, 0.9, 0.95, 1.0], "svd": [0.4, 0.8, 0.9, 1.0], "per_task": 38}
    return {
        **made_up(),
        "suite": "tall/ViT-B-32-20",
        "draws": 2,
        "layers": layers,
        "experts": {task: f"{task}.safetensors" for task in names},
        "tasks": {task: {"images": 5000, "classes": 10} for task in names},
        "rows": [filled("zero-shot", "backbone", 0.55), *rows, filled("experts", "experts", 1.0)],
        "similarity": {"tasks": names, "cosine": cosine},
        "energy": dict.fromkeys(list(layers)[:2] + list(layers)[10:12] + list(layers)[-2:], curve),
    }


_TASKS = (
    "stanford_cars",
    "dtd",
    "eurosat",
    "gtsrb",
    "mnist",
    "resisc45",
    "svhn",
    "sun397",
    "stl10",
    "oxford-iiit-pet",
    "oxford_flowers102",
    "cifar100",
    "pcam",
    "fer2013",
    "cifar10",
    "food101",
    "fashion_mnist",
    "rendered-sst2",
    "emnist",
    "kmnist",
)
_METHODS = (
    "Average",
    "TaskArithmetic",
    "DARE",
    "DELLA",
    "Breadcrumbs",
    "Trim",
    "TIES",
    "ConsensusTA",
    "STAR",
    "LiNeS",
    "SubspaceBoosting",
    "SVC",
    "CART",
    "SWUDI",
    "RegMean",
    "IsoC",
    "TSVM",
    "ESM",
    "SMILE",
    "ESMPPBayes",
)
