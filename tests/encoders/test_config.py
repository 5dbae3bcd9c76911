"""open_clip's configurations: those that exist are let pass."""

import json
from pathlib import Path

import open_clip
import pytest

from mergekit_vision.encoders.config import check_size, read_config
from mergekit_vision.errors import InputError


@pytest.mark.parametrize("name", open_clip.list_models())
def test_all_models_of_open_clip_are_described_as_they_must_be(name: str, tmp_path: Path) -> None:
    content = {"model_cfg": open_clip.get_model_config(name)}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    assert read_config(tmp_path) == content


def test_all_faults_are_listed(tmp_path: Path) -> None:
    model = {"embed_dim": 0, "vision_cfg": {"layers": -1, "width": True}, "text_cfg": {"vocab_size": [1, 2.5]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    with pytest.raises(InputError, match=r"open_clip_config\.json: 4 faults\n") as caught:
        read_config(tmp_path)
    assert "model_cfg.vision_cfg.layers: must be a whole number from 1 to 1000, not the int -1" in str(caught.value)


def test_a_configuration_without_weights_has_any_size(tmp_path: Path) -> None:
    check_size(tmp_path, 10**12)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"1234")
    check_size(tmp_path, 4)
    with pytest.raises(InputError, match=r"describes a model of 5 parameters, but the weights beside it are 4 bytes"):
        check_size(tmp_path, 5)
