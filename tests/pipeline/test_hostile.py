"""Data, params and results made to do harm: refused in words, in little memory and time, and nothing in them is run."""

import copy
import json
import os
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from afm_pipe import pipeline
from afm_pipe.data.images import decode_image, read_image_file
from afm_pipe.data.latents import Latents
from afm_pipe.data.latents_format import CLASSES, LABELS, MOMENTS, read_provenance
from afm_pipe.data.listing import list_images
from afm_pipe.data.manifest import columns_digest, read_manifest
from afm_pipe.data.reading import require_images
from afm_pipe.distributed.launch import Launch
from afm_pipe.evaluation.arrays import load_arrays
from afm_pipe.evaluation.thumbnails import Thumbnails, build_thumbnails
from afm_pipe.params import Imported, Params
from afm_pipe.params.file import load_params
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json, write_json
from tests.conftest import SMOKE
from tests.hostile import CPU, TERABYTE, Bomb, model_folder, refused, repacked

pytestmark = pytest.mark.usefixtures("nothing_is_run")


# Latents


@pytest.fixture
def latents(discs: Path) -> Path:
    path = Path("latents.h5")
    path.write_bytes((discs / paths.LATENTS).read_bytes())
    return path


def put(name: str, **options: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **options)

    return change


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((60,), "i8")
    layout[:] = h5py.VirtualSource("other.h5", LABELS, (60,))
    del file[LABELS]
    file.create_virtual_dataset(LABELS, layout)


def external(file: h5py.File) -> None:
    del file[LABELS]
    file.create_dataset(LABELS, (60,), "i8", external=[("/etc/passwd", 0, 480)])


def set_attribute(name: str, value: Any) -> Callable[[h5py.File], None]:
    return lambda file: file.attrs.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(LABELS, shape=(1 << 37,), dtype="i8", chunks=(1 << 20,)), "labels chunked"),
        (put(CLASSES, shape=(1 << 37,), dtype="S8", chunks=(1 << 10,)), "classes chunked"),
        (put(CLASSES, shape=(3,), dtype=h5py.string_dtype()), "classes of object"),
        (put(MOMENTS, shape=(60, 1, 8, 8 << 20, 8 << 10), dtype="f2", chunks=(1, 1, 8, 8, 8)), "moments chunked"),
        (put(LABELS, data=np.zeros(60)), "labels of float64"),
        (virtual, "labels chunked, compressed, virtual"),
        (external, "labels chunked, compressed, virtual or in another file"),
        (set_attribute("scaling_factor", "nan"), "scaling_factor 'nan', expected a number above 0"),
        (set_attribute("scaling_factor", "large"), "scaling_factor 'large', expected a number above 0"),
        (set_attribute("scaling_factor", 0.5), "attribute 'scaling_factor' of float64"),
        (set_attribute("note", np.zeros(1000)), r"attribute 'note' of float64 and shape \(1000,\)"),
        (lambda file: file.attrs.__delitem__("manifest_digest"), "without its provenance"),
    ],
)
def test_hdf5_that_declares_what_it_does_not_hold_is_refused(latents: Path, change: Any, words: str) -> None:
    with h5py.File(latents, "r+") as file:
        change(file)
    refused(lambda: Latents.open(latents), words)


def test_a_latents_file_of_many_attributes_says_so_without_torch(latents: Path) -> None:
    assert read_provenance(latents)["crop"] == "adm"
    with h5py.File(latents, "r+") as file:
        file.attrs["note"] = np.zeros(1000)
    refused(lambda: read_provenance(latents), "an attribute 'note'")


# Statistics


def test_objects_in_an_npz_are_refused_unrun() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.savez("x.npz", mu=np.array([Bomb()], dtype=object))
    refused(lambda: load_arrays(Path("x.npz"), ("mu",)), "says it is object")


def test_an_array_larger_than_its_bytes_is_refused() -> None:
    np.savez("x.npz", mu=np.zeros((8, 8)))
    repacked(Path("x.npz"), lambda name, content: content.replace(b"(8, 8), }     ", b"(1<<9,1<<9), }"))
    refused(lambda: load_arrays(Path("x.npz"), ("mu",)), "unreadable")
    np.savez("x.npz", mu=np.zeros((8, 8)))
    shape = b"'shape': (1000000, 1000000), }"
    repacked(Path("x.npz"), lambda name, content: content.replace(b"'shape': (8, 8), }" + b" " * 12, shape))
    refused(lambda: load_arrays(Path("x.npz"), ("mu",)), r"says it is float64 of shape \(1000000, 1000000\)")


def test_an_array_that_inflates_a_thousandfold_is_refused() -> None:
    np.savez_compressed("x.npz", mu=np.zeros(80 << 17))
    refused(lambda: load_arrays(Path("x.npz"), ("mu",)), "would become 83,88")


def test_thumbnails_that_do_not_match_are_refused() -> None:
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    whole = build_thumbnails(images, np.arange(5))
    whole.save(Path("x.npz"))
    arrays = dict(np.load("x.npz"))
    for name, array in (("labels", np.arange(4)), ("images", np.zeros((5, 8), np.uint8)), ("ratio", np.array("x"))):
        np.savez("y.npz", **(arrays | {name: array}))
        refused(lambda: Thumbnails.load(Path("y.npz")), "do not match")


# Images and their list


def test_a_pipe_and_a_sparse_terabyte_among_the_images_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "cat"
    folder.mkdir(parents=True)
    (folder / "whole.bmp").write_bytes(b"BM")
    os.mkfifo(folder / "pipe.png")
    refused(lambda: list_images(folder.parent), "pipe.png")
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(TERABYTE)
    for name, message in (("sparse.png", "more than 536,870,912 bytes"), ("pipe.png", "a pipe or a device")):
        with pytest.raises(OSError, match=message):
            read_image_file(folder / name)


def test_an_image_without_pixels_is_refused() -> None:
    header = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, 0, 0, 1, 24, 0, 0, 0, 0, 0, 0)
    refused(lambda: decode_image(header, "x.bmp", 32, 3), "of 0x0 pixels|x.bmp")


def edited(discs: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Write the manifest of the discs changed, its digest made to fit."""
    raw = json.loads((discs / paths.MANIFEST).read_text())
    change(raw)
    raw["digest"] = columns_digest(raw["classes"], raw["paths"], raw["labels"], raw["sha256"])
    Path("manifest.json").write_text(json.dumps(raw))
    return Path("manifest.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["paths"].__setitem__(0, "class0/../../../../etc/passwd"),
        lambda raw: raw["paths"].__setitem__(0, "/etc/passwd"),
        lambda raw: raw["paths"].__setitem__(0, "class0/.."),
        lambda raw: raw["classes"].__setitem__(0, ".."),
        lambda raw: raw["labels"].__setitem__(0, 3),
        lambda raw: raw["labels"].__setitem__(0, 1 << 70),
        lambda raw: raw.update(labels={}, paths={}, sha256={}),
    ],
)
def test_a_manifest_whose_paths_lead_elsewhere_is_refused(discs: Path, change: Any) -> None:
    path = edited(discs, change)
    with pytest.raises(UserError, match="edited or damaged"):
        read_manifest(path)


def test_a_manifest_of_another_folder_is_not_followed(discs: Path, discs_params: Params) -> None:
    manifest = read_manifest(edited(discs, lambda raw: raw.update(root="/etc")))
    with pytest.raises(UserError, match=r"images under /etc, expected those under data/images \(data\.root\)"):
        list(require_images(manifest, discs_params.data))


# Params, results, names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [x]\nb: [*a, *a]", "found an alias"),
        ("[" * 5000, "more than 32 nested levels"),
        ("a: " + "9" * 5000, "not plain YAML"),
        ("a: 2001-13-45", "not plain YAML"),
        ("? [x]\n: y", "a key that is not a scalar"),
        ("a: !!python/object/apply:os.mkdir [exploded]", "not plain YAML"),
        ("x" * 300_000, "expected at most 262,144"),
        ("a: 1\na: 2", "found a twice"),
        ("seed: !!set {x}\ntrain: 7\nruns: [3]", "mistakes in"),
    ],
)
def test_hostile_yaml_is_refused(text: str, words: str) -> None:
    Path("x.yaml").write_text(text)
    refused(lambda: load_params(Path("x.yaml")), words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr=.inf", r"train\.lr: found inf, expected a finite number"),
        ("train.lr=.nan", r"train\.lr: found nan, expected a finite number"),
        (
            "train.batch_size=1000000000000",
            r"batch_size: found 1000000000000, expected less than or equal to 1000000000",
        ),
        ("seed=-1", r"seed: found -1, expected greater than or equal to 0"),
        ("seed=100000000000000000000", "seed: found 100000000000000000000, expected less than"),
        (
            "runs.t4.phases=[{until_epoch: 1.0e+300}]",
            r"until_epoch: found 1e\+300, expected less than or equal to 1000000",
        ),
        ("data.image_size=1000000000", "expected less than or equal to 8192"),
        ("runs.trials={}", "expected another name than trials, which is taken"),
        ("runs.dvclive={}", "expected another name than dvclive, which is taken"),
        ("runs.t4={seed: [" + "x, " * 5000 + "x]}", r"runs\.t4\.seed: found \['x'.{50,70}\.\.\., expected"),
        ("runs.²=1", "mistake"),
        ("train.phases.²=1", "params has no train.phases"),
        ("train.lr=" + "9" * 5000, "whose value is not YAML"),
    ],
)
def test_params_out_of_all_measure_are_refused(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_params(SMOKE, [override])


@pytest.mark.parametrize("name", ["../x", "a b", "a/b", "ä", "x" * 65, "", ".", "..", "-rf", "x\n", "X", "x\0"])
def test_names_that_could_be_paths_are_refused_everywhere(name: str, smoke_params: Params) -> None:
    launch = Launch(device="cpu")
    doors: list[tuple[Callable[[], Any], str]] = [
        (lambda: pipeline.load_sampler(smoke_params, name, CPU), "the model name"),
        (lambda: pipeline.sample(smoke_params, name, launch), "the model name"),
        (lambda: pipeline.evaluate(smoke_params, name, launch), "the model name"),
        (lambda: pipeline.export(name, "released", Path("x.pth")), "the model name"),
        (lambda: pipeline.train(smoke_params, name, launch), "no run"),
        (lambda: pipeline.import_weights(smoke_params, name, Imported(file="x.pth")), "the name"),
        (lambda: pipeline.tables(smoke_params, [name], launch), "no table"),
    ]
    for door, words in doors:
        with pytest.raises(UserError, match=f"Found {words}"):
            door()
    raw = copy.deepcopy(smoke_params.model_dump(mode="json", by_alias=True))
    raw["runs"][name] = raw["runs"]["t4"]
    Path("x.yaml").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="expected text that should match pattern|not plain YAML"):
        load_params(Path("x.yaml"))
    assert [path.name for path in Path().iterdir() if path.name != "x.yaml"] == []


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, '{"a": NaN}', "\xff", '{"a": '])
def test_json_that_is_none_is_a_user_error(text: str) -> None:
    Path("x.json").write_bytes(text.encode("latin1"))
    refused(lambda: read_json(Path("x.json")), "which is not JSON")


def test_json_of_a_terabyte_or_from_a_pipe_is_not_read() -> None:
    with Path("x.json").open("wb") as file:
        file.truncate(TERABYTE)
    refused(lambda: read_json(Path("x.json")), "expected at most")
    os.mkfifo("pipe.json")
    refused(lambda: read_json(Path("pipe.json")), "a pipe or a device")
    refused(lambda: read_json(Path()), "a folder")


@pytest.mark.parametrize(
    "changes", [{"classes": None}, {"classes": [1] * 10}, {"scaling_factor": "x"}, {"scaling_factor": -1}]
)
def test_a_model_that_says_nonsense_of_its_latents_is_refused(
    weights: dict[str, Tensor], discs: Path, discs_params: Params, changes: dict[str, Any]
) -> None:
    folder = model_folder(weights)
    shutil.copytree(discs / paths.AUTOENCODER, paths.AUTOENCODER)
    described = read_json(folder / "config.json") | {"classes": list("abcdefghij"), "scaling_factor": 1.0}
    write_json(folder / "config.json", described | changes)
    with pytest.raises(
        UserError, match="without 10 class names or with a scaling factor that is not a positive number"
    ):
        pipeline.load_sampler(discs_params, "x", CPU)


def test_a_base_that_is_another_network_is_refused_before_training(
    weights: dict[str, Tensor], discs: Path, change: Callable[..., Params]
) -> None:
    shutil.copytree(discs / "data", "data")
    shutil.copytree(discs / "models", "models")
    params, launch = change("guided.g={from: t4, until_epoch: 9}"), Launch(device="cpu")
    folder = Path("models/t4")
    folder.mkdir()
    save_file({"a": torch.ones(1)}, folder / "generator.safetensors")
    save_file({"a": torch.ones(1)}, folder / "discriminator.safetensors")
    for updates in (None, "many", -1, True):
        write_json(folder / "config.json", {"updates": updates})
        with pytest.raises(UserError, match="without its number of updates: train t4 again"):
            pipeline.train(params, "g", launch)
    write_json(folder / "config.json", {"updates": 60})
    with pytest.raises(UserError, match="generator.safetensors that do not match the model"):
        pipeline.train(params, "g", launch)
