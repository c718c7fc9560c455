from __future__ import annotations

from pathlib import Path

import pytest

from integrations.llava.study import fingerprint
from integrations.llava.study.fingerprint import begin, code_digest, digest, finished, folder_digest, mark_finished


def test_digest_ignores_the_order_of_keys_and_sees_values() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_part_is_finished_only_with_its_own_fingerprint(tmp_path: Path) -> None:
    assert finished(tmp_path, "training", "x") is None
    mark_finished(tmp_path, "training", "x", {"seconds": 1.5})
    mark_finished(tmp_path, "evaluation", "y", {})
    assert finished(tmp_path, "training", "x") == {"seconds": 1.5}
    assert finished(tmp_path, "training", "y") is None
    assert finished(tmp_path, "evaluation", "y") == {}
    begin(tmp_path)
    begin(tmp_path)
    assert finished(tmp_path, "training", "x") is None


def test_changed_code_changes_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, library = tmp_path / "integrations" / "llava", tmp_path / "layerfuse"
    for folder in (package / "evaluation", package / "study", library / "analysis"):
        folder.mkdir(parents=True)
        (folder / "code.py").write_text("first")
    (package / "train.py").write_text("first")
    monkeypatch.setattr(fingerprint, "_PACKAGE", package)
    monkeypatch.setattr(fingerprint, "_LIBRARY", library)

    def digests() -> tuple[str, str]:
        code_digest.cache_clear()
        return code_digest("training"), code_digest("evaluation")

    training, evaluation = digests()
    (package / "study" / "code.py").write_text("second")
    (library / "analysis" / "code.py").write_text("second")
    assert digests() == (training, evaluation)
    (package / "evaluation" / "code.py").write_text("second")
    assert digests()[0] == training
    assert digests()[1] != evaluation
    (package / "train.py").write_text("second")
    assert digests()[0] != training
    code_digest.cache_clear()


def test_folder_digest_sees_every_file_and_allows_names_on_a_hub(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("first")
    before = folder_digest(tmp_path)
    assert folder_digest(tmp_path) == before
    (tmp_path / "weights").write_text("second")
    assert folder_digest(tmp_path) != before
    assert folder_digest("owner/name") != folder_digest("owner/other")
