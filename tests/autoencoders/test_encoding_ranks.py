"""Encoding by several processes: the bytes of one, whichever is killed and however many resume."""

import itertools
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from afm_pipe.autoencoders import encoding
from afm_pipe.autoencoders.encoding import encode_dataset
from afm_pipe.autoencoders.kl import KLAutoencoder
from afm_pipe.data import reading
from afm_pipe.data.manifest import Manifest
from afm_pipe.data.reading import build_manifest
from afm_pipe.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from afm_pipe.params import Params
from afm_pipe.runtime.progress import track
from tests.autoencoders.parts import SHA256, changed, tiny_vae, unfinished
from tests.conftest import write_images
from tests.forked import in_ranks

NUM_IMAGES = 51  # 13 batches of 4, the last padded


@pytest.fixture(scope="module")
def params(smoke_params: Params, tmp_path_factory: pytest.TempPathFactory) -> Params:
    root = tmp_path_factory.mktemp("data") / "images"
    write_images(root, classes=3, per_class=NUM_IMAGES // 3)
    data = changed(smoke_params, "data", source="folder", root=str(root), min_images=1, mirror=True)
    return changed(data, "encode", batch_size=4)


@pytest.fixture(scope="module")
def images(params: Params) -> Manifest:
    return track("prepare", build_manifest(params.data))


@pytest.fixture(scope="module")
def vae() -> KLAutoencoder:
    return tiny_vae()


class Encoding:
    """Encodings of the same images into one folder, that count the forward passes of each rank."""

    def __init__(self, params: Params, images: Manifest, vae: KLAutoencoder, folder: Path) -> None:
        self.given = params, images, vae, SHA256, folder / "latents.h5", folder / "work"
        self.path, self.work, self.folder, self.vae = folder / "latents.h5", folder / "work", folder, vae

    def run(self, ranks: ProcessGroup) -> None:
        passes = []
        hook = self.vae.model.encoder.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
        list(encode_dataset(*self.given, group=ranks))
        hook.remove()
        assert set(passes) <= {4}
        (self.folder / f"passes{ranks.rank}").write_text(str(len(passes) // 2))  # of an image and its mirror

    def batches(self, size: int) -> list[int]:
        return [int((self.folder / f"passes{rank}").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def alone(params: Params, images: Manifest, vae: KLAutoencoder, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    encoding = Encoding(params, images, vae, tmp_path_factory.mktemp("alone"))
    encoding.run(SINGLE_PROCESS)
    assert encoding.batches(1) == [13]
    return encoding.path.read_bytes()


@pytest.fixture
def shared(params: Params, images: Manifest, vae: KLAutoencoder, tmp_path: Path) -> Encoding:
    return Encoding(params, images, vae, tmp_path)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_batches_and_write_the_bytes_of_one(shared: Encoding, alone: bytes, size: int) -> None:
    assert in_ranks(size, shared.folder, shared.run) == [0] * size
    assert shared.path.read_bytes() == alone
    assert shared.batches(size) == {2: [7, 6], 3: [5, 4, 4]}[size]
    assert unfinished(shared.work) == []


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("killed", [0, 1])
def test_what_was_encoded_before_a_kill_is_kept_for_any_number_of_ranks(
    shared: Encoding, alone: bytes, killed: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = encoding._encoded

    def kill(ranks: ProcessGroup) -> None:
        passes = itertools.count()

        def encode(*arguments: Any) -> Any:
            if ranks.rank == killed and next(passes) == 3:
                time.sleep(0.5)  # until the main process has written the batches before
                os.kill(os.getpid(), signal.SIGKILL)
            return forward(*arguments)

        monkeypatch.setattr(encoding, "_encoded", encode)
        shared.run(ranks)

    monkeypatch.setattr(encoding, "SECONDS_BETWEEN_SYNCS", 0.0)
    codes = in_ranks(2, shared.folder, kill)
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] not in (0, None)  # it notices, and publishes nothing
    assert not shared.path.exists()
    monkeypatch.setattr(encoding, "_encoded", forward)

    assert in_ranks(size, shared.folder, shared.run) == [0] * size
    assert shared.path.read_bytes() == alone
    assert sum(shared.batches(size)) == 13 - 6  # three of each rank
    assert unfinished(shared.work) == []


def test_the_next_batch_is_encoded_while_one_is_written_and_later_ones_are_decoded(
    shared: Encoding, alone: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, add, decode = encoding._encoded, encoding._RowWriter.add, reading.decode_image
    begun, decoded = [threading.Event() for _ in range(14)], [threading.Event() for _ in range(NUM_IMAGES)]
    passes, decodings = itertools.count(), itertools.count()

    def encode(*arguments: Any) -> Any:
        number = next(passes)
        begun[number].set()
        assert decoded[min(4 * (number + 3), NUM_IMAGES - 1)].wait(10), "nothing is decoded ahead"
        return forward(*arguments)

    def write(journal: Any, batch: range, moments: Any) -> int:
        assert batch.stop == NUM_IMAGES or begun[batch.start // 4 + 1].wait(10), "the autoencoder waits for the disk"
        return add(journal, batch, moments)

    def read(*arguments: Any) -> Any:
        decoded[next(decodings)].set()
        return decode(*arguments)

    monkeypatch.setattr(encoding, "_encoded", encode)
    monkeypatch.setattr(encoding._RowWriter, "add", write)
    monkeypatch.setattr(reading, "decode_image", read)
    shared.run(SINGLE_PROCESS)
    assert shared.path.read_bytes() == alone
