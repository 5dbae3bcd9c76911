"""What a run leaves behind: the table, ``results.json`` and the directory of a merged model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from mergekit_vision.files import replacing
from mergekit_vision.merger import Merger
from mergekit_vision.progress import console
from mergekit_vision.version import __version__


def describe_merger(merger: Merger) -> dict[str, Any]:
    """A merger as data: its class and its hyper-parameters."""
    parameters = {name: value for name, value in vars(merger).items() if not name.startswith("_")}
    return {
        "name": type(merger).__name__,
        "class_path": f"{type(merger).__module__}.{type(merger).__qualname__}",
        "init_args": {name: describe_merger(value) if isinstance(value, Merger) else value for name, value in parameters.items()},
    }


def summarise(accuracy: Mapping[str, float], expert: Mapping[str, float | None], images: Mapping[str, int]) -> dict[str, Any]:
    """The ``tasks`` and ``mean`` parts of ``results.json``; accuracies in [0, 1].

    Args:
        accuracy: task -> accuracy.
        expert: task -> accuracy of the task's own expert, ``None`` where it is not known.
        images: task -> number of images evaluated.

    >>> summarise({"a": 0.5, "b": 0.8}, {"a": 1.0, "b": 0.8}, {"a": 10, "b": 20})["mean"]
    {'accuracy': 0.65, 'normalized': 0.75}
    """
    tasks = {}
    for task, value in accuracy.items():
        own = expert.get(task)
        tasks[task] = {"accuracy": value, "normalized": value / own if own else None, "n": images[task]}
    return {"tasks": tasks, "mean": {key: _mean([row[key] for row in tasks.values()]) for key in ("accuracy", "normalized")}}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def print_table(results: Mapping[str, Any], title: str) -> None:
    """One row a task, the mean last; accuracies in %."""
    table = Table(title=escape(title), title_justify="left")
    table.add_column("task")
    for name in ("images", "accuracy %", "normalised %"):
        table.add_column(name, justify="right")
    for task, row in results["tasks"].items():
        table.add_row(task, str(row["n"]), _percent(row["accuracy"]), _percent(row["normalized"]))
    table.add_section()
    mean = results["mean"]
    total = sum(row["n"] for row in results["tasks"].values())
    table.add_row("mean", str(total), _percent(mean["accuracy"]), _percent(mean["normalized"]), style="bold")
    console.print(table)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def comparison_table(results: Mapping[str, Any]) -> Table:
    """One row a method, the backbone first and the experts last, as in ``results.json`` of a comparison."""
    table = Table(
        title=escape(f"{results['suite']}: {len(results['tasks'])} tasks, {results['split']} split"), title_justify="left"
    )
    table.add_column("method", no_wrap=True)
    for name in ("mean\n%", "normalised\n%", "worst task,\nnormalised %", "merge\ns", "extra"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in results["rows"]:
        method, worst = row["kind"] in ("static", "dynamic"), row["worst"]
        table.add_row(
            escape(row["name"]),
            percent(row["mean"]["accuracy"]),
            percent(row["mean"]["normalized"]),
            "–" if row["kind"] == "experts" else f"{worst} {percent(row['tasks'][worst]['normalized'])}",
            f"{row['seconds']['merge']:.1f}" if method else "–",
            count(row["extra_parameters"]),
            style=None if method else "dim",
        )
    table.caption = "normalised: relative to each task's own expert · extra: parameters besides one encoder"
    table.caption_justify = "left"
    return table


def percent(value: float | None) -> str:
    """A share in [0, 1] in per cents with one digit, without a sign.

    >>> percent(0.9312), percent(None)
    ('93.1', '–')
    """
    return "–" if value is None else f"{100 * value:.1f}"


def count(number: int) -> str:
    """A large number with three digits.

    >>> count(0), count(950), count(35_200), count(86_000_000)
    ('0', '950', '35.2 k', '86 M')
    """
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def own_expert_shares(counts: Mapping[str, torch.Tensor], experts: list[str]) -> dict[str, dict[str, float]]:
    """How often the images of a task pick their own task's expert.

    Args:
        counts: layer -> ``[T, T]``, images of each true task (row) by expert taken (column).
        experts: tasks of the rows and columns.

    Returns:
        Layer -> task -> share in [0, 1]; tasks without images are left out.

    >>> own_expert_shares({"c_fc": torch.tensor([[3.0, 1.0], [0.0, 0.0]])}, ["mnist", "gtsrb"])
    {'c_fc': {'mnist': 0.75}}
    """
    shares = {}
    for layer, count in counts.items():
        rows = zip(experts, count.diagonal().tolist(), count.sum(1).tolist(), strict=True)
        shares[layer] = {task: own / total for task, own, total in rows if total}
    return {layer: tasks for layer, tasks in shares.items() if tasks}


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    from importlib.metadata import version

    packages = ("torch", "torchvision", "lightning", "open_clip_torch")
    return {"mergekit_vision": __version__, **{name: version(name) for name in packages}}


def same(a: Any, b: Any) -> bool:
    """Whether two pieces of configuration say the same; JSON knows no tuples."""
    return to_json(a) == to_json(b)


def to_json(content: Any, in_order: bool = False) -> str:
    """JSON of one line, its keys sorted unless they are to stay ``in_order``; tensors and paths become plain values."""
    return json.dumps(content, sort_keys=not in_order, default=_plain)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON beside ``path`` and rename it there; tensors and paths become plain values."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else str(value)


_USE_STATIC = """```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:PATH_OF_THIS_DIRECTORY")
```
"""

_USE_DYNAMIC = """The model is dynamic: every image or token chooses among low-rank experts.

```python
import mergekit_vision

encoder = mergekit_vision.load("PATH_OF_THIS_DIRECTORY")   # encoder.encode_image(images)
```

open_clip loads the directory as `local-dir:PATH_OF_THIS_DIRECTORY` too, but only the static base, without the experts.
"""


def model_card(record: Mapping[str, Any], dynamic: bool = False) -> str:
    """README of a merged model's directory, in the layout the Hugging Face hub reads.

    Args:
        record: what ``merge.json`` holds.
        dynamic: whether the model has routed experts.
    """
    merger = record["merger"]
    hub = record["backbone"].startswith("hf-hub:")  # what stands here must be a model of the hub
    base = f"base_model: {record['backbone'].removeprefix('hf-hub:')}\n" if hub else ""
    rows = "\n".join(f"| {task} | {Path(file).name} |" for task, file in record["experts"].items())
    arguments = "\n".join(f"- `{name}`: {value}" for name, value in merger["init_args"].items())
    use = _USE_DYNAMIC if dynamic else _USE_STATIC
    backbone = record["backbone"].rpartition("/")[2]
    return f"""---
library_name: open_clip
tags: [clip, model-merging, mergekit-vision]
{base}---

# {record["suite"]} merged with {merger["name"]}

{len(record["experts"])} experts fine-tuned from `{backbone}` merged without training by mergekit-vision {__version__},
at scaling coefficient {record["scale"]:g}.

| task | expert |
|---|---|
{rows}

## Method

`{merger["class_path"]}`

{arguments}

## Use

{use}"""
