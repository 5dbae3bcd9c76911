"""What results depend on, as text to hash."""

from collections.abc import Mapping
from contextlib import suppress

from mergekit_vision.checkpoints import Expert
from mergekit_vision.errors import InputError
from mergekit_vision.evaluation.evaluator import Evaluator
from mergekit_vision.merger import Merger
from mergekit_vision.merging.recipe import Recipe
from mergekit_vision.merging.record import composed, merger_record, parameter_fault
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.support.fingerprints import of_tensors
from mergekit_vision.support.json_files import to_json
from mergekit_vision.support.source_code import code_fingerprint, versions


def of_backbone(bench: Workbench) -> list[str]:
    """The backbone's weights and preprocessing, and the libraries that run it."""
    backbone = bench.evaluator.backbone
    return [to_json([versions(), dict(backbone.model), dict(backbone.preprocess)]), of_tensors(bench.base)]


def of_evaluation(evaluator: Evaluator, split: str | None) -> list[str]:
    """The images of all tasks that are evaluated, the heads of all there are (a search needs them too), and the precision.

    With no split, nothing is evaluated.
    """
    data, runtime, heads = evaluator.data, evaluator.runtime, evaluator.heads()
    return [
        code_fingerprint([Recipe, Evaluator]) or "",
        runtime.device.type,
        runtime.precision_name,
        of_tensors({task: heads.weight(task) for task in data.suite.tasks}),
        to_json({task: data.fingerprint(task, split) for task in data.task_names} if split else {}),
    ]


def of_experts(evaluator: Evaluator, experts: Mapping[str, Expert]) -> list[str]:
    """The weights of experts that are merged, in their order, and their proxy images."""

    def proxies(task: str) -> str:
        with suppress(InputError):
            return evaluator.data.proxy_fingerprint(task)
        return "none"

    return [to_json([[task, expert.fingerprint(), proxies(task)] for task, expert in experts.items()])]


def of_recipe(evaluator: Evaluator, recipe: Recipe) -> list[str]:
    """What the coefficient and the routing depend on, besides the method."""
    data, parts = evaluator.data, [str(recipe.scale), recipe.route, recipe.expert_dtype]
    if recipe.scale in ("search", "agreement"):
        parts += [str(recipe.search), *(data.fingerprint(task, split) for split in recipe.searched for task in data.suite.tasks)]
    return parts


def of_merger(merger: Merger) -> list[str] | None:
    """A method, its parameters and its source code; ``None`` where the code cannot be read, or the parameters not be told."""
    code, record = code_fingerprint(type(part) for part in composed(merger)), merger_record(merger)
    return None if code is None or parameter_fault(merger) is not None else [to_json(record), code]
