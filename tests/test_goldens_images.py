"""The published code's image preparation, reproduced (goldens/README.md section 4).

Every recorded case is compared, whatever its image, mode and size; two faults of the published stack are told by the
image's height.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from layerfuse.preprocessing import Preprocessing
from tests.goldens_support import SHARED

FOLDER = SHARED / "images"
# Read channels-first without padding: 1 pixel high raises there, 3 pixels high give a plausible but wrong tensor.
MISREAD_HEIGHTS = (1, 3)
MODES = {"pad": "pad", "nopad": "crop"}

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="goldens not found; set LAYERFUSE_GOLDENS to their folder")


@dataclass(frozen=True)
class Case:
    """One recorded tensor."""

    size: int
    mode: str
    image: str

    @property
    def key(self) -> str:
        return f"{self.mode}.{self.image}"

    def preprocessing(self) -> Preprocessing:
        return preprocessing(self.size, self.mode)

    def expected(self) -> torch.Tensor:
        return load_file(FOLDER / f"pixel_values_{self.size}.safetensors")[self.key]


def preprocessing(size: int, mode: str) -> Preprocessing:
    """What the recorded processor does."""
    settings = json.loads((FOLDER / f"processor_{size}.json").read_text())
    assert settings["size"] == {"shortest_edge": settings["crop_size"]["height"]}
    return Preprocessing(
        size=(settings["crop_size"]["height"], settings["crop_size"]["width"]),
        mean=settings["image_mean"],
        std=settings["image_std"],
        interpolation=Image.Resampling(settings["resample"]).name.lower(),  # type: ignore[arg-type]
        mode=MODES[mode],  # type: ignore[arg-type]
    )


def info() -> dict[str, Any]:
    file = FOLDER / "info.json"
    return dict(json.loads(file.read_text())) if file.is_file() else {"files": {}}


def image_of(name: str) -> Image.Image:
    return read(next(file for file in info()["files"] if Path(file).stem == name))


def read(file: str) -> Image.Image:
    with Image.open(FOLDER / file) as image:
        image.load()
    return image


def recorded_cases() -> list[Case]:
    found = []
    for path in sorted(FOLDER.glob("pixel_values_*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found += [Case(int(path.stem.split("_")[-1]), *key.split(".", 1)) for key in sorted(file.keys())]
    return found


def is_misread(case: Case) -> bool:
    return case.mode == "nopad" and case.image in THIN


THIN = [Path(file).stem for file, noted in info()["files"].items() if noted["size"][1] in MISREAD_HEIGHTS]
CASES = recorded_cases()
EQUAL = [case for case in CASES if not is_misread(case)]
LARGE = [(int(key[3:]), name) for key, noted in info().items() if key.startswith("at_") for name in noted]


@pytest.mark.parametrize("case", EQUAL, ids=lambda case: f"{case.key}-{case.size}")
def test_pixel_values_equal_goldens(case: Case) -> None:
    actual = case.preprocessing()(image_of(case.image))

    torch.testing.assert_close(actual, case.expected(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("file", info()["files"])
def test_images_of_goldens_are_what_their_list_says(file: str) -> None:
    noted, image = info()["files"][file], read(file)

    assert (image.mode, list(image.size)) == (noted["mode"], noted["size"])
    assert noted["padded_size"] == [max(image.size)] * 2
    for case in EQUAL:
        if case.image == Path(file).stem:
            pixels = case.preprocessing()(image)
            assert list(pixels.shape) == noted[case.mode]["shape"]
            assert float(pixels.mean()) == pytest.approx(noted[case.mode]["mean"], abs=1e-5)
            assert float(pixels.std()) == pytest.approx(noted[case.mode]["std"], abs=1e-5)


def test_every_case_of_goldens_is_compared_or_misread() -> None:
    compared = {(Path(case.image).stem, case.mode) for case in CASES}
    for file, noted in info()["files"].items():
        for mode in MODES:
            raised = isinstance(noted[mode], str)
            assert raised != ((Path(file).stem, mode) in compared)
            assert not raised or noted["size"][1] in MISREAD_HEIGHTS
    assert {case.mode for case in EQUAL} == set(MODES)


@pytest.mark.parametrize(("size", "name"), LARGE)
def test_images_at_full_size_equal_goldens(size: int, name: str) -> None:
    noted = info()[f"at_{size}"][name]
    mode, image = name.split(".", 1)
    prepare = preprocessing(size, mode)
    pixels = prepare(image_of(image))
    middle = pixels.shape[-1] // 2

    np.testing.assert_array_equal(np.asarray(prepare.fit(image_of(image))), np.asarray(read(noted["file"])))
    assert pixels[:, 0, 0].tolist() == pytest.approx(noted["corner_rgb"], abs=1e-6)
    assert pixels[:, middle, middle].tolist() == pytest.approx(noted["centre_rgb"], abs=1e-6)
    assert float(pixels.mean()) == pytest.approx(noted["pixel_values_mean"], abs=1e-5)
    assert float(pixels.std()) == pytest.approx(noted["pixel_values_std"], abs=1e-5)


def test_the_border_has_the_colour_of_goldens() -> None:
    size = min(case.size for case in CASES)
    prepared = preprocessing(size, "pad").fit(Image.new("RGB", (4 * size, size)))

    assert prepared.getpixel((0, 0)) == tuple(info()["background_colour"])


def test_images_that_goldens_misread_are_prepared_as_their_transpose_is() -> None:
    prepare = preprocessing(min(case.size for case in CASES), "nopad")
    one_level = 1.01 / 255 / min(prepare.std)
    for name in THIN:
        image = image_of(name).convert("RGB")
        ours, across = prepare(image), prepare(image.transpose(Image.Transpose.TRANSPOSE)).transpose(1, 2)
        torch.testing.assert_close(ours, across, rtol=0, atol=one_level)
    for case in CASES:
        if is_misread(case):
            assert (case.preprocessing()(image_of(case.image)) - case.expected()).abs().max() > 0.1
