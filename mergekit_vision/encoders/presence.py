"""Whether a backbone's weights are on this machine; the hub is not asked."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from mergekit_vision.checkpoints import SUFFIXES
from mergekit_vision.checkpoints.hub import HubFile, cached_snapshot
from mergekit_vision.errors import InputError


def pretrained_place(name: str, pretrained: str | None) -> tuple[bool, str]:
    """Whether a backbone's weights are here, and the file or directory that they are in, else where they are from.

    Args:
        name: open_clip model name, ``hf-hub:…`` or ``local-dir:…``.
        pretrained: tag or file of the weights, for an open_clip model name.
    """
    if name.startswith("local-dir:"):
        directory = Path(name.removeprefix("local-dir:"))
        return directory.is_dir(), str(directory)
    if name.startswith("hf-hub:"):
        return _on_the_hub(name)
    if pretrained is None or Path(pretrained).is_file():
        return pretrained is not None, pretrained or name
    return _of_tag(name, pretrained)


def _of_tag(name: str, tag: str) -> tuple[bool, str]:
    """Of one of open_clip's own tags: in the hub's cache or, by older versions and for other tags, in open_clip's."""
    import open_clip

    known = open_clip.get_pretrained_cfg(name, tag) or {}
    address = known.get("url", "")
    cache = os.path.expanduser("~/.cache/clip")  # noqa: PTH111 (as open_clip has it; none where no home directory is known)
    file = Path(cache) / Path(urlsplit(address).path).name
    if address and file.is_file() and not known.get("hf_hub"):
        return True, str(file)
    if not known.get("hf_hub"):
        return False, address or f"{name}, {tag}"
    repository, _, inside = known["hf_hub"].rpartition("/")
    return _on_the_hub(f"hf-hub:{repository}{f':{inside}' if inside else ''}")


def _on_the_hub(address: str) -> tuple[bool, str]:
    try:
        place = cached_snapshot(HubFile.parse(address))
    except InputError:  # no address at all
        return False, address
    weights = [] if place is None else [place] if place.is_file() else [*place.rglob("*")]
    return (True, str(place)) if any(file.suffix in SUFFIXES for file in weights) else (False, address)
