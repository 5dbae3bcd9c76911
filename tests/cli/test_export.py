"""``mergekit-vision export``."""

import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_vision import MergedCLIP, Trainer, VisionTasks
from mergekit_vision.cli.main import main
from mergekit_vision.export.formats import FORMATS
from mergekit_vision.plugins.average import Average
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.smile import SMILE


def test_an_export_says_how_well_it_agrees(tiny_suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(default_root_dir=str(tmp_path / "merged"), accelerator="cpu").merge(
        MergedCLIP(Average()), VisionTasks(str(tiny_suite))
    )
    output = tmp_path / "new" / "out"
    assert main(["export", "--merged", str(tmp_path / "merged"), "--to", "open_clip", "-o", str(output)]) == 0
    printed = capsys.readouterr()
    assert "\r" not in printed.out + printed.err
    *steps, last = printed.out.splitlines()
    assert len(steps) == 3
    assert last.startswith(f"{output}: embeddings of open_clip and of {tmp_path / 'merged'} agree to ")
    assert float(last.split()[-4]) < 1e-5
    assert (output / "open_clip_model.safetensors").is_file()


@pytest.mark.parametrize("to", ["huggingface", "peft"])
@pytest.mark.filterwarnings("error::FutureWarning")
def test_other_libraries_are_silent(to: str, tiny_suite: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft", reason="the extra hf is not installed")
    method = Average() if to == "huggingface" else ESMPP(rank=2, layers=("c_fc",))
    trainer = Trainer(default_root_dir=str(tmp_path / "merged"), accelerator="cpu")
    trainer.merge(MergedCLIP(method), VisionTasks(str(tiny_suite)))
    capfd.readouterr()
    assert main(["export", "--merged", str(tmp_path / "merged"), "--to", to, "-o", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert len(printed.out.splitlines()) == 4


def test_mistakes_are_lines_with_options(tiny_suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = str(tmp_path / "merged")
    Trainer(default_root_dir=merged, accelerator="cpu").merge(MergedCLIP(SMILE(rank=2)), VisionTasks(str(tiny_suite)))
    capsys.readouterr()
    assert main(["export", "--merged", merged, "--to", "open_clip", "-o", merged]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"mergekit-vision: error: --output {merged}: holds files that export did not write (")
    assert second.strip().startswith("--to open_clip: ")
    assert second.endswith("export its static base alone (--base-only)")
    for arguments, message in (
        (["--merged", merged, "--to", "onxx", "-o", "x"], "export: argument --to: invalid choice: 'onxx'"),
        (["--merged", merged], "the following arguments are required: --to, -o/--output"),
        (["--merged", str(tmp_path / "no"), "--to", "torch", "-o", "x"], "not a merged model"),
    ):
        assert main(["export", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_a_changed_model_is_exported_only_if_that_is_asked_for(
    tiny_suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "merged"
    Trainer(default_root_dir=str(merged), accelerator="cpu").merge(MergedCLIP(Average()), VisionTasks(str(tiny_suite)))
    config = merged / "open_clip_config.json"
    config.write_text(config.read_text().replace('"quick_gelu": false', '"quick_gelu": true'))
    command = ["export", "--merged", str(merged), "--to", "open_clip", "-o", str(tmp_path / "out")]
    assert main(command) == 1
    assert "give --no-verify to use the model as it is" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--no-verify"]) == 0


def test_help_lists_the_formats_and_loads_nothing_heavy() -> None:
    script = (
        "import sys; from mergekit_vision.cli.main import main\n"
        "try: main(['export', '--help'])\n"
        "finally: print([name for name in ('torch', 'lightning', 'open_clip', 'transformers') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"
    assert all(f"{name}:" in printed for name in FORMATS)
