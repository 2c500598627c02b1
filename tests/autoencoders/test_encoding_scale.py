"""ImageNet's size without ImageNet: the whole file's shape, sparse, through the real writer and the real reader."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from afm_pipe.autoencoders import encoding
from afm_pipe.autoencoders.encoding import _PartialFile, _RowWriter
from afm_pipe.data.latents import Latents
from afm_pipe.data.latents_format import FORMAT_VERSION, create_latents_file, encoding_settings
from afm_pipe.data.manifest import Manifest
from afm_pipe.data.order import Order
from afm_pipe.params.file import load_params
from afm_pipe.runtime.errors import UserError
from tests.autoencoders.parts import in_child
from tests.conftest import ROOT

IMAGES = 1_281_167
SIZE = IMAGES * 2 * 8 * 32 * 32 * 2
UPDATES = 150  # of 256 images: 600 MiB that are read
MEMORY = 250 << 20  # bytes that writing, opening and reading may add; the allocator's slack alone varies by 40 MiB
WRITTEN = (0, 7, 640_583, 1_281_166 // 32 * 32)  # first images of batches, the last one short


def own_memory() -> int:
    """Return the bytes of this process that are its own, not a file's, which the kernel takes back at will."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_the_file_of_imagenet_is_written_and_read_at_random_in_constant_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latents.h5"
    with path.open("wb") as hole:
        hole.truncate(1 << 30)
    if path.stat().st_blocks:
        pytest.skip("this file system has no sparse files")
    path.unlink()
    params = load_params(ROOT / "profiles" / "imagenet256.yaml")
    labels = np.arange(IMAGES) * 1000 // IMAGES
    manifest = Manifest(tmp_path, (), (), labels, (), "digest")
    classes = [f"n{number:08d}" for number in range(1000)]
    attributes = {
        "format_version": FORMAT_VERSION,
        **encoding_settings(params),
        "vae_sha256": "a" * 64,
        "scaling_factor": "0.18215",
        "manifest_digest": "digest",
    }
    generator = torch.Generator().manual_seed(0)
    batches = [range(first, min(first + 32, IMAGES)) for first in WRITTEN]
    values = [torch.randn(len(batch), 2, 8, 32, 32, generator=generator).half() for batch in batches]
    monkeypatch.setattr(encoding, "SECONDS_BETWEEN_SYNCS", 0.0)

    def work() -> None:
        before = own_memory()
        create_latents_file(path, params.latent_spec, 2, labels, classes, attributes)
        rows = _PartialFile.of(path)
        assert len(rows.pending(32)) == -(-IMAGES // 32)
        with path.open("r+b") as file:
            journal = _RowWriter(file, rows, manifest)
            for batch, moments in zip(batches, values, strict=True):
                journal.add(batch, moments)
        assert SIZE < path.stat().st_size < SIZE + 20_000_000
        with pytest.raises(UserError, match=f"partial, with {sum(map(len, batches)) - 7 - 18} of {IMAGES} images"):
            Latents.open(path, params)
        with path.open("r+b") as file:
            file.seek(rows.done_offset)
            file.write(b"\1" * IMAGES)

        latents = Latents.open(path, params, "a" * 64)
        assert latents.num_images == IMAGES and latents.labels[-1] == 999
        for batch, moments in zip(batches, values, strict=True):
            for mirror in (0, 1):
                found = latents.read(np.array(batch), np.full(len(batch), mirror))
                last = len(batch) if batch.start else 7  # where the next batch was written over it
                assert torch.equal(found[:last], moments[:last, mirror].float())
        order = Order(IMAGES, seed=0, stream="generator")
        for update in range(UPDATES):
            x = latents.draw(order.indices(256 * update, 256), generator)
            assert x.shape == (256, 4, 32, 32)
        assert own_memory() - before < MEMORY  # labels, done map, an epoch's order, a few batches
        assert path.stat().st_blocks * 512 < 100_000_000

    assert in_child(work) == 0
    os.remove(path)
