"""ImageNet as distributed: class folders, or the tar of tars read without unpacking."""

import io
import os
import re
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from afm_pipe.autoencoders.encoding import encode_dataset
from afm_pipe.data.latents_format import MOMENTS
from afm_pipe.data.manifest import Manifest, read_manifest, write_manifest
from afm_pipe.data.reading import LazyImages, build_manifest, load_images, read_images, require_images
from afm_pipe.data.tars import index_tar
from afm_pipe.params import Data, Params
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import track
from tests.autoencoders.parts import tiny_vae

CLASSES = ("n01440764", "n01443537", "n02105855")
PER_CLASS = 4
SIZE = 32
PNG, CMYK, GREY = "n01440764_1.JPEG", "n01443537_0.JPEG", "n02105855_2.JPEG"  # ImageNet has one PNG and 22 CMYK files


def image_bytes(name: str) -> bytes:
    """Return a photograph-like file; the odd ones are odd in their content, never in their name."""
    rng = np.random.default_rng(int(re.sub(r"\D", "", name)))
    size = tuple(rng.integers(40, 90, 2))
    image = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    mode = {CMYK: "CMYK", GREY: "L"}.get(name, "RGB")
    file = io.BytesIO()
    image.convert(mode).save(file, format="PNG" if name == PNG else "JPEG")
    return file.getvalue()


FILES = {
    wnid: {name: image_bytes(name) for name in (f"{wnid}_{index}.JPEG" for index in range(PER_CLASS))}
    for wnid in CLASSES
}


def packed(members: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, content in members:
            tar.addfile(member(name, len(content)), io.BytesIO(content))
    return file.getvalue()


def member(name: str, size: int = 0, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def nested() -> bytes:
    """The official archive in small; the order within it is not the order of the names."""
    return packed([(f"{wnid}.tar", packed(list(FILES[wnid].items())[::-1])) for wnid in CLASSES[::-1]])


def flat() -> bytes:
    """What `tar -cf train.tar ./train` makes, with a hidden file that a Mac adds."""
    files = [(f"./train/{wnid}/{name}", FILES[wnid][name]) for wnid in CLASSES for name in FILES[wnid]]
    return packed([*files, (f"./train/{CLASSES[0]}/._{PNG}", b"Mac")], tarfile.GNU_FORMAT)


def data(source: str, root: Path) -> Data:
    fields = {"source": source, "root": str(root), "image_size": SIZE, "channels": 3, "mirror": True, "min_images": 1}
    fields["orientation"] = "ignore"
    return Data.model_validate(fields)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Data]:
    folder = tmp_path_factory.mktemp("imagenet")
    for wnid in CLASSES:
        (folder / "ILSVRC" / "train" / wnid).mkdir(parents=True)
        for name, content in FILES[wnid].items():
            (folder / "ILSVRC" / "train" / wnid / name).write_bytes(content)
    (folder / "ILSVRC" / "val").mkdir()
    (folder / "ILSVRC" / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"no business of ours")
    (folder / "ILSVRC2012_img_train.tar").write_bytes(nested())
    (folder / "train.tar").write_bytes(flat())
    return {
        "folder": data("folder", folder / "ILSVRC"),
        "train": data("folder", folder / "ILSVRC" / "train"),
        "nested": data("tar", folder / "ILSVRC2012_img_train.tar"),
        "flat": data("tar", folder / "train.tar"),
    }


@pytest.fixture(scope="module")
def manifests(layouts: dict[str, Data]) -> dict[str, Manifest]:
    return {name: track("prepare", build_manifest(each)) for name, each in layouts.items()}


def test_every_layout_gives_the_same_classes_images_and_digest(manifests: dict[str, Manifest]) -> None:
    for manifest in manifests.values():
        assert manifest.classes == CLASSES
        assert manifest.paths == tuple(f"{wnid}/{name}" for wnid in CLASSES for name in FILES[wnid])
        assert manifest.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert manifest.digest == manifests["folder"].digest


def test_every_layout_gives_the_same_pixels_of_odd_files_too(
    layouts: dict[str, Data], manifests: dict[str, Manifest]
) -> None:
    images = {name: track("read", load_images(manifests[name], layouts[name])) for name in layouts}
    for each in images.values():
        np.testing.assert_array_equal(each, images["folder"])
    assert images["folder"].shape == (12, 3, SIZE, SIZE)
    grey = images["nested"][CLASSES.index("n02105855") * PER_CLASS + 2]
    assert (grey == grey[:1]).all()
    plain = images["nested"][CLASSES.index("n01443537") * PER_CLASS + 1]
    cmyk = images["nested"][CLASSES.index("n01443537") * PER_CLASS]
    assert all((each != each[:1]).any() for each in (plain, cmyk))


def test_images_of_a_tar_are_read_by_many_threads_at_once(layouts: dict[str, Data], manifests: dict) -> None:
    unread = LazyImages(manifests["nested"], layouts["nested"])
    assert (len(unread), unread.shape, unread.nbytes) == (12, (12, 3, SIZE, SIZE), 12 * 3 * SIZE * SIZE)
    whole = track("read", load_images(manifests["folder"], layouts["folder"]))
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: unread[np.array([11, 0, 5])], range(8)):
            np.testing.assert_array_equal(found, whole[[11, 0, 5]])


def test_nothing_is_unpacked(layouts: dict[str, Data], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(layouts["nested"].root, "train.tar")
    manifest = track("prepare", build_manifest(data("tar", Path("train.tar"))))
    read_images(manifest, layouts["nested"], range(12))
    assert os.listdir() == ["train.tar"]


def test_the_manifest_of_a_tar_survives_the_round_trip(manifests: dict[str, Manifest], tmp_path: Path) -> None:
    write_manifest(tmp_path / "manifest.json", manifests["nested"])
    again = read_manifest(tmp_path / "manifest.json")
    assert again.spans == manifests["nested"].spans
    assert again.digest == manifests["nested"].digest
    offset, size = manifests["nested"].spans[3]
    archive = Path(again.root).read_bytes()
    assert archive[offset : offset + size] == FILES["n01440764"]["n01440764_3.JPEG"]


def test_latents_are_the_same_and_encoding_resumes(
    layouts: dict[str, Data], manifests: dict[str, Manifest], smoke_params: Params, tmp_path: Path
) -> None:
    vae = tiny_vae(channels=3)
    moments = {}
    for name in ("folder", "nested"):
        encode = smoke_params.encode.model_copy(update={"batch_size": 4})
        params = smoke_params.model_copy(update={"data": layouts[name], "encode": encode})
        work, path = tmp_path / name, tmp_path / f"{name}.h5"
        encoding = encode_dataset(params, manifests[name], vae, "a" * 64, path, work)
        if name == "nested":
            while next(encoding).done < 4:  # one of three batches is done
                pass
            encoding.close()
            assert not path.exists()
            encoding = encode_dataset(params, manifests[name], vae, "a" * 64, path, work)
        track("encode", encoding)
        with h5py.File(path) as file:
            moments[name] = file[MOMENTS][:]
    assert moments["folder"].shape == (12, 2, 8, 8, 8)
    np.testing.assert_array_equal(moments["folder"], moments["nested"])


def test_a_tar_that_is_gone_or_changed_is_refused_by_name(layouts: dict[str, Data], tmp_path: Path) -> None:
    path = tmp_path / "train.tar"
    shutil.copy(layouts["nested"].root, path)
    own = data("tar", path)
    manifest = track("prepare", build_manifest(own))
    track("require", require_images(manifest, own))
    content = bytearray(path.read_bytes())
    content[manifest.spans[5].offset + 30] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train\.tar/n01443537/n01443537_1\.JPEG changed since"):
        read_images(manifest, own, [4, 5])
    path.write_bytes(content[:4000])
    with pytest.raises(UserError, match=r"images missing under .*train\.tar"):
        track("require", require_images(manifest, own))
    path.unlink()
    with pytest.raises(UserError, match="Found 12 of 12 images missing"):
        track("require", require_images(manifest, own))


JPEG = FILES[CLASSES[0]]["n01440764_0.JPEG"]
GOOD = ("a/x.JPEG", JPEG)


def with_member(info: tarfile.TarInfo) -> bytes:
    return packed([GOOD])[: 512 + -(-len(JPEG) // 512) * 512] + info.tobuf() + bytes(1024)


def sparse_by_pax() -> bytes:
    info = member("a/y.JPEG", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a/y"})
    return with_member(info)


def negative() -> bytes:
    info = bytearray(member("a/y.JPEG").tobuf(tarfile.GNU_FORMAT))
    info[124:136] = b"\xff" * 10 + b"\x00\x00"  # base 256: -65536
    return checked(info)


def long_name_without_end() -> bytes:
    info = bytearray(member("././@LongLink", 1 << 32, type=tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT))
    return checked(info)


def checked(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return packed([GOOD])[: 512 + -(-len(JPEG) // 512) * 512] + bytes(header) + bytes(1024)


HOSTILE = {
    "symbolic link": (lambda: with_member(member("a/y.JPEG", type=tarfile.SYMTYPE, linkname="/etc/passwd")), "a link"),
    "hard link": (lambda: with_member(member("a/y.JPEG", type=tarfile.LNKTYPE, linkname="a/x.JPEG")), "a link"),
    "device": (lambda: with_member(member("a/y.JPEG", type=tarfile.CHRTYPE)), "a device"),
    "sparse": (lambda: with_member(member("a/y.JPEG", type=tarfile.GNUTYPE_SPARSE)), "sparse file"),
    "sparse by attributes": (sparse_by_pax, "sparse file|not a complete"),
    "absolute": (lambda: packed([("/etc/x.JPEG", JPEG)]), "'/etc/x.JPEG' in .*, expected one within"),
    "upwards": (lambda: packed([("a/../../x.JPEG", JPEG)]), "expected one within the archive"),
    "upwards folder": (lambda: with_member(member("../b", type=tarfile.DIRTYPE)), "expected one within the archive"),
    "upwards inside": (lambda: packed([("a.tar", packed([("../x.JPEG", JPEG)]))]), "hostile.tar/a.tar, expected one"),
    "cut within a file": (lambda: packed([GOOD])[:700], "cut short within a/x.JPEG"),
    "cut between files": (lambda: packed([GOOD])[: 512 + -(-len(JPEG) // 512) * 512], "damaged or cut short after"),
    "damaged header": (lambda: with_member(member("a/y.JPEG"))[:-1400] + b"\7" * 1400, "damaged or cut short after"),
    "cut inner archive": (lambda: packed([("a.tar", packed([("x.JPEG", JPEG)])[:700])]), "a.tar cut short within"),
    "negative size": (negative, "of -65536 bytes|not a complete|cut short"),
    "endless name": (long_name_without_end, "a header of 4294967296 bytes"),
    "compressed": (lambda: b"\x1f\x8b" + bytes(600), "uncompressed tar archive"),
    "empty": (lambda: b"", "not a complete, uncompressed tar archive"),
    "no images": (lambda: bytes(1024), "Found no class under"),
    "empty class": (lambda: packed([("a.tar", packed([]))]), "no image of class a"),
    "twice": (lambda: packed([GOOD, GOOD]), "x.JPEG twice"),
    "other files": (lambda: packed([GOOD, ("a/notes.txt", b"hello")]), "Found a/notes.txt"),
    "too deep": (lambda: packed([("a/b/c/x.JPEG", JPEG)]), "expected CLASS/IMAGE, train/CLASS/IMAGE or CLASS.tar"),
    "folder in a class": (lambda: packed([("a.tar", packed([("b/x.JPEG", JPEG)]))]), "Found the folder b in"),
    "damaged image": (lambda: packed([("a/x.JPEG", b"no image")]), "1 of 1 images .* unusable"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_damaged_tar_is_refused_and_says_why(name: str, tmp_path: Path) -> None:
    make, words = HOSTILE[name]
    path = tmp_path / "hostile.tar"
    path.write_bytes(make())
    with pytest.raises(UserError, match=words):
        track("prepare", build_manifest(data("tar", path)))
    assert os.listdir(tmp_path) == ["hostile.tar"]


def test_a_long_name_and_a_missing_archive(tmp_path: Path) -> None:
    path = tmp_path / "long.tar"
    name = f"{'a' * 120}/{'é' * 100}.JPEG"
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path.write_bytes(packed([(name, JPEG)], kind))
        assert track("index", index_tar(path))[0].images == [(name, 0)]
    with pytest.raises(UserError, match="Found no file .*, expected a tar archive"):
        track("index", index_tar(tmp_path))


def test_a_class_that_is_called_train_is_a_class(tmp_path: Path) -> None:
    for name in ("bus", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(JPEG)
    assert track("prepare", build_manifest(data("folder", tmp_path))).classes == ("bus", "train")
