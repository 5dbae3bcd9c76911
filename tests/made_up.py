"""Results of a comparison that never was."""

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
