"""The model card of a merged model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_vision.support.json_files import readable
from mergekit_vision.version import __version__

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
    arguments = "\n".join(f"- `{name}`: {readable(value)}" for name, value in merger["init_args"].items())
    use = _USE_DYNAMIC if dynamic else _USE_STATIC
    papers = "\n".join(f"- {paper}" for paper in record.get("citation", ()))
    citation = f"\n## Citation\n\n{papers}\n" if papers else ""
    backbone = record["backbone"].rpartition("/")[2]
    return f"""---
library_name: open_clip
tags: [clip, model-merging, mergekit-vision]
{base}---

# {record["suite"]} merged with {merger.get("recipe", merger["name"])}

{len(record["experts"])} experts fine-tuned from `{backbone}` merged without training by mergekit-vision {__version__},
at scaling coefficient {record["scale"]:g}.

| task | expert |
|---|---|
{rows}

## Method

`{merger["class_path"]}`

{arguments}
{citation}
## Use

{use}"""
