"""Files of samples: grids, PNG files, npz files."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from afm_pipe.params import LatentSpec
from afm_pipe.sampling.image_writers import NpzWriter, grid
from afm_pipe.sampling.sampler import balanced_labels


@pytest.mark.parametrize("channels", [1, 3])
def test_uint8_images_survive_a_png_round_trip(channels: int) -> None:
    image = LatentSpec((4, 2, 2), True).to_uint8(
        torch.rand(1, channels, 9, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    file = io.BytesIO()
    grid(image, columns=1, gap=0).save(file, "PNG")
    back = np.asarray(Image.open(file)).reshape(9, 7, channels).transpose(2, 0, 1)
    assert (back == image[0].numpy()).all()


def test_grid_lays_out_row_by_row_on_white() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 4, 3)
    sheet = np.asarray(grid(images, columns=2, gap=1))
    assert sheet.shape == (3 * 5 + 1, 2 * 4 + 1)
    assert sheet[1, 1] == 0 and sheet[1, 5] == 1 and sheet[6, 1] == 2 and sheet[11, 1] == 4
    assert (sheet[11:, 5:] == 255).all() and (sheet[0] == 255).all()


def test_npz_for_adms_evaluator_is_shuffled_with_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(60, 1, 4, 4)
    labels = balanced_labels(range(60), 7)
    for name in ("a", "b"):
        if name == "b":
            monkeypatch.delattr(os, "posix_fallocate", raising=False)  # as on macOS
        file = NpzWriter(tmp_path / f"{name}.npz", labels, shuffle_seed=5)
        for batch in images.split(25):
            file.add(batch)
        file.finish()
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        pixels, order = found["arr_0"], found["arr_0"][:, 0, 0, 0]
        assert pixels.shape == (60, 4, 4, 3) and pixels.dtype == np.uint8
        assert sorted(order) == list(range(60)) and (order != np.arange(60)).any()
        assert (found["arr_1"] == order % 7).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]
