"""Weights made to do harm: refused in words, in little memory and time, and nothing in them is run."""

import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from afm_pipe.evaluation.classifier import Classifier, load_classifier, save_classifier
from afm_pipe.models.classifier import load_latent_classifier
from afm_pipe.models.model_files import load_generator, load_tensors
from afm_pipe.models.released import import_generator, read_tensors
from afm_pipe.params import Imported
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import write_json
from tests.hostile import CPU, TERABYTE, Bomb, model_folder, refused, repacked

pytestmark = pytest.mark.usefixtures("nothing_is_run")


def test_a_file_of_a_terabyte_is_refused_before_it_is_read() -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [TERABYTE // 4], "data_offsets": [0, TERABYTE]}}).encode()
    for name in ("x.safetensors", "x.pth"):
        with Path(name).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + TERABYTE)
        refused(lambda name=name: import_generator(Imported(file=name), Path("models/x")), "expected at most 34,359,7")
    refused(lambda: load_tensors(Path("x.safetensors")), "expected at most")


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", TERABYTE) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        b"\x01",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        *(
            struct.pack("<Q", len(header)) + header + bytes(64)
            for header in (
                b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},"b":{"dtype":"F32","shape":[8],"data_offsets":[16,48]}}',
                b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,64]}}',
                b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}}',
                b'{"a":{"dtype":"X9","shape":[16],"data_offsets":[0,64]}}',
                b'{"a":{"dtype":"F32","shape":[-16],"data_offsets":[64,0]}}',
                b'{"../../a":7}',
            )
        ),
    ],
)
def test_headers_that_lie_are_refused(content: bytes) -> None:
    Path("x.safetensors").write_bytes(content)
    refused(lambda: read_tensors(Path("x.safetensors")), "unreadable as safetensors")
    refused(lambda: load_tensors(Path("x.safetensors")), "missing or damaged")


def test_names_of_tensors_are_never_paths(weights: dict[str, Tensor]) -> None:
    save_file(weights | {"../../escaped": torch.ones(1), "/etc/escaped": torch.ones(1)}, "x.safetensors")
    with pytest.raises(UserError, match=r"unexpected \.\./\.\./escaped; unexpected /etc/escaped"):
        import_generator(Imported(file="x.safetensors"), Path("models/x"))
    assert not list(Path().rglob("*escaped*")) and not Path("../../escaped").exists()


def test_deep_metadata_is_refused() -> None:
    save_file({"a": torch.ones(1)}, "x.safetensors", {"afm_pipe": "[" * 100_000})
    refused(lambda: read_tensors(Path("x.safetensors")), "unreadable as safetensors")


def test_one_number_in_the_shape_of_a_terabyte_is_refused(weights: dict[str, Tensor]) -> None:
    torch.save(weights | {"pos_embed": torch.ones(1).expand(1, 1 << 20, 1 << 20)}, "x.pth")
    refused(lambda: import_generator(Imported(file="x.pth"), Path("models/x")), "pos_embed sparse, quantized, or with")
    torch.save(weights | {"pos_embed": torch.ones(1, 4, 128).to_sparse()}, "x.pth")
    refused(lambda: import_generator(Imported(file="x.pth"), Path("models/x")), "")
    torch.save(weights | {"pos_embed": torch.empty(1, 1 << 40, 128, device="meta")}, "x.pth")
    refused(lambda: import_generator(Imported(file="x.pth"), Path("models/x")), "")


def test_a_storage_that_says_it_is_longer_than_its_bytes_is_not_read_past(weights: dict[str, Tensor]) -> None:
    torch.save({"w": torch.ones(3, 7)}, "x.pth")
    # ... 'cpu' K\x15 (21 numbers) ... and the shape (3, 7) with strides (7, 1)
    repacked(Path("x.pth"), lambda name, content: content.replace(b"K\x15", b"J\xff\xff\xff\x00"))
    read = read_tensors(Path("x.pth")).tensors["w"]
    assert read.untyped_storage().nbytes() <= Path("x.pth").stat().st_size
    repacked(Path("x.pth"), lambda name, content: content.replace(b"K\x03K\x07", b"J\xff\xff\x03\x00K\x07"))
    refused(lambda: read_tensors(Path("x.pth")), "unreadable as a tensor file")


def test_compressed_entries_are_refused_before_they_are_inflated() -> None:
    torch.save({"w": torch.zeros(1 << 22)}, "x.pth")
    repacked(Path("x.pth"), lambda name, content: content, zipfile.ZIP_DEFLATED)
    refused(lambda: read_tensors(Path("x.pth")), "with compressed entries")


def test_an_archive_that_says_it_goes_on_on_another_disk_is_refused(weights: dict[str, Tensor]) -> None:
    torch.save(weights, "x.pth")
    content = Path("x.pth").read_bytes()
    end = content.rindex(b"PK\6\7")  # the locator of the end of a large archive: signature, disk, place, disks
    Path("x.pth").write_bytes(content[: end + 16] + b"\2\0\0\0" + content[end + 20 :])
    with pytest.raises(UserError, match="not a complete torch.save archive"):
        read_tensors(Path("x.pth"))


def test_tuples_that_take_years_to_hash_are_refused() -> None:
    torch.save({"w": torch.ones(1)}, "x.pth")
    nested = b"\x80\x02}" + b"U\x01aq\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(200)) + b"K\x01s."
    repacked(Path("x.pth"), lambda name, content: nested if name.endswith("data.pkl") else content)
    refused(lambda: read_tensors(Path("x.pth")), "with a tuple used again")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_code_in_a_pickle_is_refused_unrun(protocol: int) -> None:
    torch.save({"w": torch.ones(1)}, "x.pth")
    code = pickle.dumps({"w": Bomb()}, protocol)
    Path("bare.pth").write_bytes(code)
    repacked(Path("x.pth"), lambda name, content: code if name.endswith("data.pkl") else content)
    for path in ("x.pth", "bare.pth"):
        refused(lambda path=path: read_tensors(Path(path)), "Nothing in it was run|unreadable as a tensor file")


@pytest.mark.parametrize(
    "changes",
    [
        {"latent_size": 4096},
        {"latent_size": 1 << 40},
        {"num_classes": 10**7},
        {"num_classes": 1 << 50},
        {"channels": -4},
        {"latent_size": 7},
        {"size": "../x"},
        {"repeats": 1 << 40},
        {"channels": "many"},
    ],
)
def test_a_config_that_asks_for_terabytes_is_refused(weights: dict[str, Tensor], changes: dict[str, Any]) -> None:
    folder = model_folder(weights, **changes)
    refused(lambda: load_generator(folder, CPU), "do not match the model|does not describe a model")
    classes = range(changes.get("num_classes", 10))
    if "repeats" not in changes:
        refused(lambda: load_latent_classifier(folder, CPU, classes), "do not match the model|without a classifier")


def test_weights_of_whole_numbers_are_refused(weights: dict[str, Tensor]) -> None:
    wrong = {name: tensor.long() if name == "pos_embed" else tensor for name, tensor in weights.items()}
    with pytest.raises(UserError, match="pos_embed of int64, expected floating point"):
        load_generator(model_folder(wrong), CPU)


def test_a_feature_classifier_that_asks_for_terabytes_is_refused() -> None:
    folder = Path("reference")
    save_classifier(Classifier(1, [4, 4], 8, 3), folder)
    assert load_classifier(folder).config["features"] == 8
    for change in ({"widths": [1 << 20, 1 << 20]}, {"features": 1 << 40}, {"widths": 3}, {"channels": None}):
        write_json(
            folder / "classifier.json", {"channels": 1, "widths": [4, 4], "features": 8, "num_classes": 3} | change
        )
        refused(lambda: load_classifier(folder), "unreadable")
