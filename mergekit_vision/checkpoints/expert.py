"""Opening whatever a person fine-tuned from CLIP: what is asked for, and the decision what a checkpoint holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mergekit_vision.checkpoints.clip_config import activation, clip_config
from mergekit_vision.checkpoints.clip_lora import clip_lora_adapter
from mergekit_vision.checkpoints.container import Container
from mergekit_vision.checkpoints.hub import HubFile, commit_of, fetch_snapshot
from mergekit_vision.checkpoints.opening import ADAPTER_CONFIG, check_static, open_container, read_object, weights_file
from mergekit_vision.checkpoints.peft_lora import peft_adapter
from mergekit_vision.checkpoints.remainder import refusal, unused_names
from mergekit_vision.checkpoints.towers import Tower, find_part, find_tower, places
from mergekit_vision.checkpoints.weights import CheckpointWeights, Differences, Expert
from mergekit_vision.errors import InputError
from mergekit_vision.support.paths import expanded, is_directory, is_file

Kind = Literal["auto", "weights", "delta", "lora"]

_PROJECTION = frozenset({"visual.proj"})


@dataclass(frozen=True)
class ExpertSource:
    """Where an expert is, and what in it is meant where that is not plain.

    Attributes:
        path: file or directory; ``None`` for one on the hub.
        hub: of an expert on the Hugging Face hub, its repository, revision and place in it.
        kind: ``weights``, ``delta``, differences to the backbone, or ``lora``; ``auto`` finds out, differences aside.
        key: beginning of the names of the tower's tensors, where a file holds several.
        ema: whether averaged weights are taken; where not said, only if there are no others.
        scale: of ``delta``, what it is multiplied with; of ``lora``, the factor of ``B A`` in place of that of its configuration.
    """

    path: Path | None = None
    hub: HubFile | None = None
    kind: Kind = "auto"
    key: str | None = None
    ema: bool | None = None
    scale: float | None = None

    @classmethod
    def parse(cls, text: str, root: Path, **options: Any) -> "ExpertSource":
        """An expert as one text: a path, relative to ``root``, or ``hf-hub:org/name[@revision][:path/in/repo]``.

        Raises:
            InputError: when it names the hub in another form.

        >>> ExpertSource.parse("hf-hub:org/clip@v1:experts/dtd.pt", Path("/")).hub
        HubFile(repository='org/clip', revision='v1', inside='experts/dtd.pt')
        """
        if text.startswith("hf-hub:"):
            return cls(hub=HubFile.parse(text), **options)
        return cls(path=root / expanded(text), **options)

    def __str__(self) -> str:
        return str(self.path if self.hub is None else self.hub)

    @property
    def missing(self) -> bool:
        """Whether it is a file or directory that is not there."""
        return self.path is not None and not (is_file(self.path) or is_directory(self.path))

    def fetch(self) -> Path:
        """The expert's file or directory on this machine, downloaded where it is not.

        Raises:
            InputError: when it is on the hub and cannot be had.
        """
        return fetch_snapshot(self.hub) if self.hub is not None else self.path or Path()


def open_expert(source: ExpertSource) -> Expert:
    """Open an expert's checkpoint; only headers are read.

    Raises:
        InputError: when there is none, or it is not one of a CLIP vision tower; the message has the reason and the remedy.
    """
    place = source.fetch()
    check_static(place)
    container = open_container(weights_file(place))
    tower = find_tower(container, source.key, source.ema)
    if tower is None and source.kind == "delta":  # what is missing in it was not changed, be it the patch embedding
        tower = find_part(container, source.key)
    expert = _adapter(container, source, tower) or _tuned(container, source, tower, place)
    expert.origin["container"] = container.kind
    if source.hub is not None:
        expert.origin |= {"hub": str(source.hub), "revision": commit_of(place)}
    return expert


def open_weights(path: str | Path) -> Expert:
    """Open an expert in a file or directory; see :func:`open_expert`."""
    return open_expert(ExpertSource(Path(path)))


def _adapter(container: Container, source: ExpertSource, tower: Tower | None) -> Expert | None:
    """The adapter in a checkpoint; ``None`` where there is none."""
    names, file = container.entries, container.path.parent / ADAPTER_CONFIG
    clip_lora = any(".w_lora_A" in name for name in names)
    if not clip_lora and not any(".lora_A." in name for name in names):
        if source.kind == "lora" or (file.is_file() and tower is None):
            raise InputError(f"{container.path}: has no LoRA matrices (names with lora_A and lora_B)")
        return None
    if source.kind in ("weights", "delta"):
        raise InputError(f"{container.path}: holds LoRA matrices, and is said to be {source.kind}; leave out `kind`")
    if clip_lora:
        return clip_lora_adapter(container, source.scale)
    if tower is not None:
        _check_architecture(container, tower)
    base = None if tower is None else _weights(container, tower, "weights")
    return peft_adapter(container, (file, read_object(file)) if file.is_file() else None, source.scale, base)


def _tuned(container: Container, source: ExpertSource, tower: Tower | None, place: Path) -> Expert:
    """The tower in a checkpoint, or the differences of one."""
    if tower is None:
        raise InputError(f"{container.path}: {refusal(container.entries)}")
    _check_architecture(container, tower)
    config = _config(place, tower)
    delta = source.kind == "delta" or tower.prefix.startswith("vector.")  # as the class TaskVector keeps it
    weights = _weights(container, tower, "delta" if delta else "weights")
    if config is not None:
        weights.origin["activation"] = activation(*config)
    if delta:
        return Differences(weights, 1.0 if source.scale is None else source.scale)
    if source.scale is not None:
        raise InputError(f"{container.path}: `scale` goes with `kind: delta` or an adapter; these are whole weights")
    return weights


def _config(place: Path, tower: Tower) -> tuple[Path, Mapping[str, Any]] | None:
    """See :func:`clip_config`; beside a tower with open_clip's names, a file of that name may be anything else."""
    try:
        return clip_config(place)
    except InputError:
        if tower.family == "huggingface":
            raise
        return None


def _check_architecture(container: Container, tower: Tower) -> None:
    """Refuse towers that no backbone can have."""
    if tower.family == "huggingface" and any(name.startswith(f"{tower.parent}classifier.") for name in container.entries):
        raise InputError(
            f"{container.path}: is a CLIPForImageClassification, which pools patches without CLIP's projection; "
            "its tower cannot be used with zero-shot heads"
        )
    if any(name.startswith("layer1.") for name in tower.names):
        raise InputError(f"{container.path}: holds a ResNet, and only open_clip's own ViTs are merged")


def _weights(container: Container, tower: Tower, kind: Kind) -> CheckpointWeights:
    parts, unknown = places(tower)
    if unknown:
        raise InputError(f"{container.path}: its tower has {', '.join(unknown[:4])}, which no vision tower of CLIP has")
    strange = [name for name, value in container.values.items() if name.startswith(tower.prefix) and _is_object(value)]
    if strange:
        raise InputError(f"{container.path}: {strange[0]} is not a plain tensor (sparse, quantized, or of a class of its own)")
    origin: dict[str, Any] = {"kind": kind, "family": tower.family, "names": f"{tower.prefix}*"}
    optional = frozenset[str]()
    if tower.family == "huggingface" and "visual.proj" not in parts:
        optional, origin["projection"] = _PROJECTION, "the backbone's"
    if unused := unused_names(tower, container.entries):
        origin["unused"] = unused
    return CheckpointWeights(container, parts, origin, optional)


def _is_object(value: object) -> bool:
    return not isinstance(value, str | int | float | bool | list | tuple | type(None))
