"""What is published of a suite's experts, against what was measured: the last net under wrong labels, texts and files."""

from collections.abc import Iterable, Mapping

from mergekit_vision.suites.suite import Task

_POINTS = 3.0


def departures(tasks: Iterable[Task], measured: Mapping[str, float | None]) -> list[str]:
    """A text for every expert whose accuracy is more than three points off the published one, or higher than any honest one.

    What may be the reason is added.

    Args:
        tasks: of the suite.
        measured: task -> accuracy of its expert on the test split, in [0, 1]; ``None`` or absent where it was not measured.

    >>> from mergekit_vision.checkpoints import ExpertSource
    >>> pcam = Task("pcam", ExpertSource(), {}, ("a", "b"), accuracy=87.96, traps=("true, which is 1, is tumor",))
    >>> departures([pcam], {"pcam": 0.1204})
    ['the expert of task pcam scores 12.0 % on test, but 88.0 % is published; true, which is 1, is tumor']
    """
    texts = []
    for task in tasks:
        found = measured.get(task.name)
        if found is None:
            continue
        head = f"the expert of task {task.name} scores {100 * found:.1f} % on test, but"
        if task.accuracy is not None and abs(100 * found - task.accuracy) > _POINTS:
            texts.append("; ".join([f"{head} {task.accuracy:.1f} % is published", *task.traps]))
        elif task.at_most is not None and 100 * found > task.at_most:
            texts.append("; ".join([f"{head} at most {task.at_most:.1f} % is honest", *task.traps]))
    return texts
