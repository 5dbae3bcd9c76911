"""The model card of a merged model."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_vision.export.markdown import code, plain
from mergekit_vision.export.sharing import hub_id, shareable
from mergekit_vision.support.json_files import readable
from mergekit_vision.support.terminal import harmless
from mergekit_vision.version import __version__

_USE_STATIC = """```python
import open_clip
{imports}
model, _, preprocess = open_clip.create_model_and_transforms({name})
```
"""


_USE_DYNAMIC = """The model is dynamic: every image or token chooses among low-rank experts.

```python
import mergekit_vision
{imports}
encoder = mergekit_vision.load({directory})   # encoder.encode_image(images)
```

open_clip loads it as `{name}` too, but only the static base, without the experts.
"""


def model_card(
    record: Mapping[str, Any],
    dynamic: bool = False,
    results: Mapping[str, Any] | None = None,
    license_id: str | None = None,
    repository: str | None = None,
    revision: str | None = None,
) -> str:
    """README of a merged model, in the layout the Hugging Face hub reads. No path of this machine stands in it.

    Bytes of names that are no UTF-8 become ``�``.

    Args:
        record: what ``merge.json`` holds.
        dynamic: whether the model has routed experts.
        results: what ``results.json`` of an evaluation holds.
        license_id: the license by its name on the hub, where it is known.
        repository: ``org/name`` on the hub, if that is where the model will be.
        revision: branch there; ``main`` unless given.
    """
    merger = record["merger"]
    shared = shareable(record)
    configuration = json.dumps(shared, indent=2, default=str)
    arguments = "\n".join(f"- {code(name)}: {plain(readable(value))}" for name, value in _arguments(shared).items())
    papers = "\n".join(f"- {plain(paper)}" for paper in record.get("citation", ()))
    citation = f"\n## Citation\n\n{papers}\n" if papers else ""
    backbone = shared["backbone"].removeprefix("local-dir:").rpartition("/")[2]
    return harmless(f"""---
{_metadata(record, dynamic, results, license_id)}
---

# {_title(record)}

{len(record["experts"])} experts fine-tuned from {code(backbone)} merged without training by mergekit-vision {__version__},
at scaling coefficient {record["scale"]:g}.{_history(record)}

{_table(shared["experts"], results)}

## Method

{code(merger["class_path"])}

{arguments}
{citation}
## Use

{_use(dynamic, repository, revision)}
## Configuration

```json
{configuration}
```
""")


def _arguments(record: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = record["merger"]["init_args"]
    return found


def _title(record: Mapping[str, Any]) -> str:
    merger = record["merger"]
    return plain(f"{record['suite']} merged with {merger.get('recipe', merger['name'])}")


def _history(record: Mapping[str, Any]) -> str:
    """Which experts joined and left since, in sentences."""
    found = []
    for step in record.get("history", ()):
        who = [f"{', '.join(map(plain, step[what]))} {what}" for what in ("joined", "left") if step.get(what)]
        how = "by OPCM's rule" if step.get("rule") == "OPCM" else "as if all others had been merged anew"
        found.append(f" Then {' and '.join(who)}, {how}.")
    return "".join(found)


def _table(experts: Mapping[str, Any], results: Mapping[str, Any] | None) -> str:
    """The experts, and what was measured."""
    if results is None:
        named = [f"| {plain(task)} | {plain(file)} |" for task, file in experts.items()]
        return "\n".join(["| task | expert |", "|---|---|", *named])
    rows = [f"| task | expert | {plain(results['split'])} accuracy | images |", "|---|---|---|---|"]
    for task in [*experts, *(task for task in results["tasks"] if task not in experts)]:
        measured = results["tasks"].get(task)
        numbers = f"{100 * measured['accuracy']:.2f} % | {measured['n']}" if measured else "– | –"
        rows.append(f"| {plain(task)} | {plain(experts.get(task, '–'))} | {numbers} |")
    return "\n".join(rows)


def _use(dynamic: bool, repository: str | None, revision: str | None) -> str:
    """How the model is loaded: from a directory, from the hub, or from a branch there, which open_clip downloads none of."""
    if repository is None:
        imports, directory, name = "", '"PATH_OF_THIS_DIRECTORY"', '"local-dir:PATH_OF_THIS_DIRECTORY"'
    else:
        branch = "" if revision in (None, "main") else f", revision={json.dumps(revision)}"
        imports = "from huggingface_hub import snapshot_download\n" if dynamic or branch else ""
        directory = f'snapshot_download("{repository}"{branch})'
        name = f'"local-dir:" + {directory}' if branch else f'"hf-hub:{repository}"'
    return (_USE_DYNAMIC if dynamic else _USE_STATIC).format(imports=imports, directory=directory, name=name)


def _metadata(record: Mapping[str, Any], dynamic: bool, results: Mapping[str, Any] | None, license_id: str | None) -> str:
    """The block that the hub reads, without its marks."""
    from huggingface_hub import ModelCardData

    base_models = list(dict.fromkeys(_base_models(record)))
    known: dict[str, Any] = {"base_model": base_models, "base_model_relation": "merge"} if base_models else {}
    if datasets := sorted(set((record.get("datasets") or {}).values())):
        known["datasets"] = datasets
    if results:
        known |= {"metrics": ["accuracy"], "model_name": _line(_name(record)), "eval_results": _measured(record, results)}
    card = ModelCardData(
        library_name="mergekit-vision" if dynamic else "open_clip",
        license=license_id or "other",
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "merge", "model-merging", "mergekit-vision"],
        **known,
    )
    return str(card.to_yaml())


def _measured(record: Mapping[str, Any], results: Mapping[str, Any]) -> list[Any]:
    """The accuracies as the hub has them; data sets of one id and configuration would be taken for one."""
    from huggingface_hub import EvalResult

    ids: Mapping[str, str] = record.get("datasets") or {}
    return [
        EvalResult(
            task_type="zero-shot-image-classification",
            dataset_type=ids.get(task, "custom"),
            dataset_name=_line(task),
            dataset_config=None if list(ids.values()).count(ids.get(task, "")) == 1 else _line(task),
            dataset_split=_line(results["split"]),
            metric_type="accuracy",
            metric_value=round(row["accuracy"], 6),
        )
        for task, row in results["tasks"].items()
    ]


def _name(record: Mapping[str, Any]) -> str:
    return f"{record['suite']} {record['merger'].get('recipe', record['merger']['name'])}"


def _line(text: object) -> str:
    return harmless(" ".join(str(text).split()))


def _base_models(record: Mapping[str, Any]) -> Iterator[str]:
    """Ids on the hub of the backbone and of the experts, of those that have one."""
    for name in (record["backbone"], *shareable(record)["experts"].values()):
        if found := hub_id(name):
            yield found
        elif name == record["backbone"] and record.get("pretrained"):
            import open_clip

            source = open_clip.get_pretrained_cfg(name, record["pretrained"]).get("hf_hub") or ""
            yield from ["/".join(source.split("/")[:2])] if source.count("/") else []
