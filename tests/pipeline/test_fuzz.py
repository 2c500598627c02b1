"""Every loader, given any bytes or a valid file changed anywhere, gives a valid object or a UserError, nothing else.

`make test` tries a few dozen examples, always the same; `make fuzz` thousands, other ones each time.
"""

import io
import json
import os
import signal
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from afm_pipe.autoencoders.representation import read_weights
from afm_pipe.data.images import decode_image
from afm_pipe.data.latents import Latents
from afm_pipe.data.latents_format import CLASSES, DONE, LABELS, MOMENTS, read_provenance
from afm_pipe.data.manifest import Manifest, columns_digest, read_manifest, write_manifest
from afm_pipe.data.tars import index_tar
from afm_pipe.evaluation.held_out import HeldOutFeatures
from afm_pipe.evaluation.statistics import Reference
from afm_pipe.evaluation.thumbnails import Thumbnails, build_thumbnails
from afm_pipe.models.model_files import load_config, load_tensors
from afm_pipe.models.released import WeightsFile, infer_config, read_tensors
from afm_pipe.params import Imported, Params
from afm_pipe.params.file import load_params
from afm_pipe.reporting.inputs import Cost, Measured, read_output
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json
from afm_pipe.training.curves import scan_curves
from afm_pipe.training.events import scan_events
from tests.conftest import SMOKE

SECONDS, WAITED = 20, 300  # of the processor, and in all, for one example: more is a hang, however busy the machine
NUMBERS = (b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff" * 8, b"\0" * 8, b"\1\0\0\0\0\0\0\0")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TimeoutError(f"an example took more than {SECONDS} s of the processor, or {WAITED} s")

    before = {number: signal.signal(number, ring) for number in (signal.SIGPROF, signal.SIGALRM)}
    yield
    limit(0, 0)
    for number, handler in before.items():
        signal.signal(number, handler)


def limit(seconds: float, waited: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, waited)


def holds(load: Callable[[], Any]) -> bool:
    """Load; tell whether that gave an object. Anything but a UserError is let through, and fails the test."""
    limit(SECONDS, WAITED)
    try:
        load()
    except UserError as error:
        words = str(error)
    else:
        return True
    finally:
        limit(0, 0)
    assert len(words) < 20_000
    return False


@st.composite
def changes(draw: st.DrawFn) -> list[tuple[float, str, bytes]]:
    """Draw a few changes to some bytes: where (as a share, or so many bytes from either end), what, and with what."""
    where = st.one_of(st.floats(0, 1), st.integers(0, 300).map(float), st.integers(-300, -1).map(float))
    kind = st.sampled_from(["set", "set", "set", "insert", "delete", "cut", "repeat"])
    what = st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(NUMBERS))
    return draw(st.lists(st.tuples(where, kind, what), min_size=1, max_size=4))


def changed(content: bytes, how: list[tuple[float, str, bytes]]) -> bytes:
    for where, kind, what in how:
        at = int(where * len(content)) if 0 < where < 1 else int(where) % (len(content) or 1)
        if kind == "set":
            content = content[:at] + what + content[at + len(what) :]
        elif kind == "insert":
            content = content[:at] + what + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + len(what) :]
        elif kind == "cut":
            content = content[:at]
        else:
            content = content[:at] + content[at : at + 64] * 2 + content[at + 64 :]
    return content


def anything(valid: bytes) -> st.SearchStrategy[bytes]:
    """Return any bytes, but mostly a valid file with changes."""
    return st.one_of(
        changes().map(lambda how: changed(valid, how)), changes().map(lambda how: changed(valid, how)), st.binary()
    )


def saved(write: Callable[[Path], Any], name: str) -> bytes:
    """Return the bytes that a writer gives a file."""
    path = Path(f"/tmp/afm-fuzz-{os.getpid()}-{name}")
    try:
        write(path)
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)


def hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        file.create_dataset(LABELS, data=np.zeros(3, "<i8"))
        file.create_dataset(CLASSES, data=np.array([b"cat"]))
        file.create_dataset(DONE, data=np.ones(3, bool))
        file.create_dataset(MOMENTS, (3, 1, 2, 2, 2), "<f2", dcpl=early)
        file.attrs.update(format_version="1", vae_sha256="0", scaling_factor="0.5", manifest_digest="1")


def image(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("cat/a.png", "cat/" + "b" * 120 + ".png", "dog/c.png"):
            member = tarfile.TarInfo(name)
            member.size = 5
            tar.addfile(member, io.BytesIO(b"12345"))
    return buffer.getvalue()


def decode(path: Path) -> Any:
    return decode_image(path.read_bytes(), path.name, 16, 3)


TENSORS = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2, dtype=torch.float16)}
DECODER = saved(lambda path: save_file({"mean": torch.zeros(2, 3)}, path, {"encoder": "{}"}), "decoder")
SAFE = saved(lambda path: save_file(TENSORS, path, {"afm_pipe": '{"model": {"nfe": 2}}'}), "safe")
PICKLED = saved(lambda path: torch.save({"ema": TENSORS, "step": 3}, path), "pickled")
LATENTS = saved(hdf5, "latents")
THUMBNAILS = saved(
    lambda path: build_thumbnails(torch.arange(48, dtype=torch.uint8).view(3, 1, 4, 4), np.arange(3)).save(path),
    "x.npz",
)
HELD = {
    "name": "classifier",
    "sha256": "s",
    "manifest_digest": "m",
    "features": np.ones((3, 2)),
    "labels": np.arange(3),
}
HELD_OUT = saved(lambda path: np.savez(path, **HELD), "held_out.npz")
REFERENCE = Reference("classifier", "s", "m", 3, np.zeros(2), np.eye(2), np.ones((3, 2), np.float32), np.arange(3), 1.0)
LISTED = (["c"], ["c/1.png", "c/2.png"], [0, 0], ["0", "1"])
MANIFEST = saved(
    lambda path: write_manifest(
        path,
        Manifest(Path("r"), ("c",), *map(tuple, LISTED[1:2]), np.array([0, 0]), ("0", "1"), columns_digest(*LISTED)),
    ),
    "manifest",
)
CONFIG = json.dumps({"model": {"size": "t4", "channels": 4, "latent_size": 8, "num_classes": 10, "nfe": 2}}).encode()
COST = json.dumps(dict.fromkeys(Cost.model_fields, 1) | {"machine": "m", "device": "cpu"}).encode()
METRICS = b'{"fid_5k": 3.5, "kid_5k": null, "intervals": {"fid_5k": [3, 4]}, "protocol": {"samples": 5000}}'
CURVES = b"update,images,epoch,lr\n10,80,1.25,0.001\n20,160,2.5,0.001\n"
EVENTS = b'{"update": 1, "images": 8, "kind": "identity", "text": "x", "evidence": {"move": 0.1}, "action": null}\n'


def test_what_is_changed_below_is_valid(place: Path) -> None:
    for name, valid, load in LOADERS:
        (place / name).write_bytes(valid)
        assert holds(lambda load=load, name=name: load(place / name)), name


LOADERS: list[tuple[str, bytes, Callable[[Path], Any]]] = [
    ("x.safetensors", SAFE, read_tensors),
    ("y.safetensors", SAFE, load_tensors),
    ("decoder.safetensors", DECODER, lambda path: read_weights(path, {"mean": torch.Size([2, 3])})),
    ("x.pth", PICKLED, read_tensors),
    ("x.h5", LATENTS, Latents.open),
    ("y.h5", LATENTS, read_provenance),
    ("x.npz", THUMBNAILS, Thumbnails.load),
    ("held_out-classifier.npz", HELD_OUT, lambda path: HeldOutFeatures.load(path.parent, REFERENCE, "m")),
    ("x.json", COST, read_json),
    ("manifest.json", MANIFEST, read_manifest),
    ("config.json", CONFIG, lambda path: load_config(path.parent)),
    ("cost.json", COST, lambda path: read_output(Cost, path, "train@x")),
    ("metrics.json", METRICS, lambda path: read_output(Measured, path, "evaluate@x")),
    ("curves.csv", CURVES, scan_curves),
    ("events.jsonl", EVENTS, scan_events),
    ("x.tar", archive(), lambda path: list(index_tar(path))),
    *((f"x.{kind}", image(kind), decode) for kind in ("png", "jpeg", "webp", "bmp")),
    ("x.yaml", SMOKE.read_bytes(), load_params),
]


@pytest.mark.parametrize(("name", "valid", "load"), LOADERS, ids=[name for name, _, _ in LOADERS])
@given(data=st.data())
def test_any_bytes_give_an_object_or_a_user_error(
    name: str, valid: bytes, load: Callable[[Path], Any], place: Path, data: st.DataObject
) -> None:
    path = place / name
    path.write_bytes(data.draw(anything(valid)))
    holds(lambda: load(path))


@given(how=changes())
def test_a_changed_pickle_inside_a_whole_archive_runs_nothing(place: Path, how: list[tuple[float, str, bytes]]) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(PICKLED)) as whole, zipfile.ZipFile(buffer, "w") as other:
        for entry in whole.namelist():
            content = whole.read(entry)
            other.writestr(entry, changed(content, how) if entry.endswith("data.pkl") else content)
    path = place / "inside.pth"
    path.write_bytes(buffer.getvalue())
    holds(lambda: read_tensors(path))


NAMES = st.sampled_from(
    [
        "x_embedder.proj.weight",
        "pos_embed",
        "y_embedder.embedding_table.weight",
        "blocks.0.attn.qkv.weight",
        "cls_embed",
    ]
    + ["t_embedder.mlp.0.weight", "t_tgt_embedder.mlp.0.weight", "blocks.9999.x", "../../x", "", "blocks.٣.x"]
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 10, 64, 128]), max_size=4)


@given(tensors=st.dictionaries(NAMES, SHAPES), said=st.dictionaries(st.text(), st.integers() | st.text()))
def test_any_names_and_shapes_are_recognized_or_refused(tensors: dict[str, list[int]], said: dict[str, Any]) -> None:
    held = {
        name: torch.empty(()).expand(shape) if 0 not in shape else torch.empty(shape) for name, shape in tensors.items()
    }
    contents = WeightsFile(held, "", {"model": said})
    holds(lambda: infer_config(contents, Path("x.pth"), Imported(file="x.pth")))


WHOLE = yaml.safe_load(SMOKE.read_text())
SECTIONS = sorted(WHOLE)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10) | st.integers(), inner, max_size=4)
    ),
    max_leaves=10,
)


@st.composite
def params_with(draw: st.DrawFn) -> Any:
    """Draw the smoke profile with a value or two replaced, removed or added, anywhere."""
    raw = json.loads(json.dumps(WHOLE))
    for _ in range(draw(st.integers(1, 2))):
        here = raw
        while True:
            key = draw(
                st.sampled_from(sorted(here, key=str)) if here and draw(st.integers(0, 9)) else st.text(max_size=8)
            )
            if isinstance(here.get(key), dict) and draw(st.integers(0, 4)):
                here = here[key]
                continue
            break
        if draw(st.integers(0, 5)):
            here[key] = draw(VALUES)
        else:
            here.pop(key, None)
    return raw


@given(raw=params_with())
def test_params_of_any_values_are_valid_or_refused_in_words(place: Path, raw: Any) -> None:
    path = place / "values.yaml"
    path.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    loaded: list[Params] = []
    if holds(lambda: loaded.append(load_params(path))):
        assert loaded[0].model_dump_json()
        assert loaded[0].models and loaded[0].trials is not None


@given(text=st.text(max_size=60), value=st.text(max_size=30))
def test_any_override_is_taken_or_refused(text: str, value: str) -> None:
    holds(lambda: load_params(SMOKE, [text]))
    holds(lambda: load_params(SMOKE, [f"train.{text}={value}", f"runs.{value}={text}"]))
