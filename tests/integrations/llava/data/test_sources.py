"""What every source of samples has: places, sources, lengths, copies in other processes; images inside its file."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from integrations.llava.data import Selection, read_image, read_image_size, read_samples, sample_lengths, source_of
from integrations.llava.data.doctor.images import image_faults
from integrations.llava.data.feature_cache import picture_digest
from integrations.llava.data.images import UnreadableImageError
from integrations.llava.data.places import ImagePlaces, ImageStore
from integrations.llava.data.source import JoinedSamples, as_source, file_index
from tests.integrations.llava.data.test_files import SAMPLES, as_lines


class Album(ImageStore):
    """Images in memory."""

    def __init__(self, **images: bytes) -> None:
        self.path, self.images = Path("album"), images

    def read_image_bytes(self, name: str) -> bytes | None:
        return self.images.get(name)


def png(size: tuple[int, int] = (9, 6)) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 50).save(file, "PNG")
    return file.getvalue()


def test_an_image_inside_a_file_is_read_as_a_file_is(tmp_path: Path) -> None:
    content = png()
    (tmp_path / "a.png").write_bytes(content)
    places = ImagePlaces(tmp_path, {"x/album": Album(a=content)})
    inside, file = places / "x/album/a", places / "a.png"

    assert file == tmp_path / "a.png"
    np.testing.assert_array_equal(np.asarray(read_image(inside)), np.asarray(read_image(file)))
    assert read_image_size(inside, upright=False) == read_image_size(file, upright=False) == (6, 9)
    assert picture_digest(inside) == picture_digest(file)
    assert image_faults(places, "x/album/a", how="decode") == image_faults(places, "a.png", how="decode") == []


def test_faults_of_images_inside_a_file_are_those_of_files(tmp_path: Path) -> None:
    content = png()
    bad = {"empty": b"", "cut": content[:60], "page": b"<html>"}
    for name, damaged in bad.items():
        (tmp_path / name).write_bytes(damaged)
    places = ImagePlaces(tmp_path, {"album": Album(**bad, gif=content)})

    for name in (*bad, "gone"):
        inside, outside = (image_faults(places, own, how="decode") for own in (f"album/{name}", name))
        assert [fault.kind for fault in inside] == [fault.kind for fault in outside] and len(inside) == 1
    assert "'album: page'" in image_faults(places, "album/page", how="decode")[0].message
    with pytest.raises(UnreadableImageError, match="image album: cut cannot be read"):
        read_image(places / "album/cut")
    with pytest.raises(FileNotFoundError, match="image album: gone does not exist; give the path of a picture"):
        read_image(places / "album/gone")
    with pytest.raises(FileNotFoundError, match="image album: gone does not exist; give a name that album holds"):
        picture_digest(places / "album/gone")


def test_names_stay_inside_what_they_are_relative_to(tmp_path: Path) -> None:
    places = ImagePlaces(tmp_path, {"album": Album(), "folder": tmp_path / "images"})

    assert all(map(places.holds, ("a.png", "album/a/../b", "folder/a/../b.png", "albums/a.png")))
    assert not any(map(places.holds, ("../a.png", "/a.png", "album/../a", "folder/../a.png", "folder//a.png")))
    assert places / "folder/a.png" == tmp_path / "images" / "a.png"


def test_a_join_gives_the_samples_of_all_its_parts(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(as_lines(SAMPLES), encoding="utf-8")
    parts = [read_samples(tmp_path / "a.jsonl"), Selection(read_samples(tmp_path / "b.jsonl"), [2, 0])]
    joined = JoinedSamples(parts)

    assert list(joined) == [*SAMPLES, SAMPLES[2], SAMPLES[0]]
    assert joined[-1] == SAMPLES[0] and joined[2:4] == [SAMPLES[2]] * 2
    assert [source_of(joined, index) for index in range(5)] == ["a.jsonl"] * 3 + ["b.jsonl"] * 2
    assert JoinedSamples(parts, "both").source_of(4) == "both"
    assert (joined.place(1), joined.place(3)) == ("a.jsonl, line 2", "b.jsonl, line 3")
    assert joined.raw(3) == parts[0].raw(2)
    assert file_index(Selection(joined, [3]), 0) == 3
    assert sample_lengths(joined).tolist() == [6, -6, -1, -1, 6]
    assert not joined.images_inside
    assert list(pickle.loads(pickle.dumps(joined))) == list(joined)
    with pytest.raises(IndexError):
        _ = joined[5]


def test_a_list_is_a_source_without_a_name() -> None:
    source = as_source(SAMPLES)

    assert source == SAMPLES and source != SAMPLES[:2]
    assert (source.place(0), source_of(SAMPLES, 0), sample_lengths(SAMPLES).tolist()) == ("entry 1", "", [6, -6, -1])
    assert source.raw(0) != source.raw(1)
