"""The command line of conversion."""

from __future__ import annotations

from pathlib import Path

import pytest

from integrations.llava.checkpoints import layout_of
from integrations.llava.checkpoints.model_io import load_model, load_processor
from integrations.llava.cli.convert import main


def test_there_and_back_from_the_command_line(
    mmfuser_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, back = tmp_path / "ours", tmp_path / "back"
    options = ["--template", "brief", "--image-mode", "crop"]
    assert main(["--from", str(mmfuser_folder), "--to", str(ours), *options]) == 0
    assert capsys.readouterr().out == f"converted: {ours}\n"
    assert load_model(ours).config.prompt_template["name"] == "brief"
    assert load_processor(ours).image_processor.preprocessing["mode"] == "crop"
    assert main(["--from", str(ours), "--to", str(back), "--layout", "mmfuser", "--vision-tower", "my/clip"]) == 0
    assert layout_of(back) == "mmfuser"
    assert main(["--from", str(ours), "--to", str(tmp_path / "a"), "--layout", "mmfuser", "--adapter-only"]) == 0
    assert (tmp_path / "a" / "mm_projector.bin").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "llava-hf"], "transformers' LLaVA has no place for a fuser"),
        (["--adapter-only", "--template", "v1"], "--adapter-only takes no other options"),
        (["--adapter-only", "--merge-lora", "x"], "--adapter-only takes no other options"),
        (["--merge-lora", "x"], "x holds no adapters; expected adapter_config.json"),
        (["--layout", "mmfusr"], "invalid choice: 'mmfusr'"),
    ],
)
def test_what_cannot_be_done_ends_with_a_message(
    arguments: list[str], message: str, mmfuser_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--from", str(mmfuser_folder), "--to", str(tmp_path / "target"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
