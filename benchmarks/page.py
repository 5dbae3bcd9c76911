"""The page of results, ``docs/benchmarks.md``: all that is in ``benchmarks/results``. ``python docs/update.py`` refreshes it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.records import RESULTS, Run, read_all
from benchmarks.tables import markdown

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

All that the benchmarks have measured, with what it was measured on. [Performance](performance.md) says what follows from it. This
page is generated from `benchmarks/results`:

```sh
make bench
make bench-quick
python -m benchmarks --only routing reading
```

`make bench` measures the demo and ViT-B/32, in under an hour on two cores, and refreshes the page; other rows, as
those of ViT-L/14, come from single programs with other arguments. `make bench-quick` takes less than five minutes with a small
encoder; its results stay in `runs/benchmarks`. Both end with the cases that got worse than before by more than the noise, on the
same machine; rows of other machines stay beside the new ones. `python -m benchmarks.compare OLD NEW` compares any two files or
folders of results.

A value is the median of its repeats, followed by the least and the greatest where there are several. Made-up experts have full
shapes and random weights, on which cost does not depend. Memory is the peak of anonymous pages of one process, without mapped
checkpoints.
"""

SECTIONS = {
    "merging": """## Merging

From checkpoints on disk to the merged model on disk, beside a textbook implementation of the same formula in its own process.
*Times faster* and *less memory* compare with it; *error* is the relative distance to its weights.
""",
    "polar": """## Polar factors

CPU time of the polar factor of ESM's directions times 768 columns, and errors relative to a float64 SVD; the program uses the
band ([how](performance.md#polar-factors)).
""",
    "scaling": """## Threads and processes

The command `merge`, with the slowest process's time. *Times faster* compares with one process of one thread; by CPU time, it also
holds on a machine that is busy with other work. Where the source is Amdahl's law, the time follows from one and two threads
([how](performance.md#threads-and-processes)).
""",
    "routing": """## Dynamic encoders

Forward passes of encoders with routed experts. *Times slower* compares with the plain encoder; *adds* is the experts' memory.
""",
    "evaluation": """## Evaluation

The command `test` beside a bare loop over the same encoder and the same decoded batches, with which *times faster* compares.
""",
    "reading": """## Reading images

A pass over JPEG and PNG files of 500 x 375 pixels. *By CPU time* compares with a bare loop over the same files; *share* is the
part of an evaluation's CPU time, beside the forward pass.
""",
    "planning": """## Estimates of a plan

What a run took, and the ratio of what `plan` estimates to it.
""",
    "agreement": """## The coefficient without labels

Test accuracy that a rule loses against the best coefficient of a grid; the repeats are draws of the proxy images.
[Methods](methods.md#the-coefficient-without-labels) explains the rules.
""",
    "adapters": """## Adapters for peft

Mean test accuracy of dynamic models by how experts are chosen; see [Adapters for peft](peft.md).
""",
}


def content(results: Mapping[str, Sequence[Run]]) -> str:
    """The page of some results."""
    parts = [HEAD]
    for benchmark, section in SECTIONS.items():
        if runs := results.get(benchmark):
            parts.append(section)
            parts += [f"{_about(run)}\n\n{markdown(run.rows)}\n" for run in reversed(runs)]
    return "\n".join(parts)


def _about(run: Run) -> str:
    machine, versions = run.machine, run.versions
    where = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    commit = f", commit `{run.commit}`" if run.commit else ""
    return f"**{where}, {machine['cores']} cores; Python {versions['python']}, torch {versions['torch']}{commit}, {run.date}**"


def write() -> None:
    """Refresh the page."""
    PAGE.write_text(content(read_all(RESULTS)), encoding="utf-8")
