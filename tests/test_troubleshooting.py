"""docs/troubleshooting.md: each message of its list is provoked here, by the command or function that prints it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from dvc.exceptions import DvcException
from dvc.repo import Repo
from PIL import Image
from typer.testing import CliRunner

from afm_pipe.cli.app import app
from afm_pipe.data.manifest import read_manifest
from afm_pipe.data.reading import require_images
from afm_pipe.distributed import pool, process_group
from afm_pipe.evaluation.reference import class_counts
from afm_pipe.params.file import load_params
from afm_pipe.runtime import environment, paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import write_json
from afm_pipe.runtime.progress import track
from afm_pipe.training import live_log
from tests.conftest import ROOT, SMOKE, write_images
from tests.hostile import repacked
from tests.models.test_containers import Popen
from tests.runtime.test_permissions import run as unprivileged  # noqa: F401 (fixture)

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^\| `([^`]+)`", PAGE.split("## Messages")[1], re.MULTILINE)
PLACES = re.compile(r"\.\.\.|\bN\b|\bNAME\b|\bDIR\b|\bHOST\b|\bPORT\b")  # what differs from case to case

Provocation = Callable[[pytest.FixtureRequest], str]
PROVOKED: dict[str, Provocation] = {}


def provokes(*messages: str) -> Callable[[Provocation], Provocation]:
    def register(function: Provocation) -> Provocation:
        PROVOKED.update(dict.fromkeys(messages, function))
        return function

    return register


def test_every_message_of_the_page_is_provoked_and_no_other() -> None:
    assert len(MESSAGES) == len(set(MESSAGES)) > 30
    assert set(MESSAGES) == set(PROVOKED)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_is_what_is_printed(message: str, project: Path, request: pytest.FixtureRequest) -> None:
    said = " ".join(PROVOKED[message](request).split())
    parts = PLACES.split(" ".join(message.split()))
    assert re.search(".+?".join(map(re.escape, parts)), said), said
    assert "Traceback" not in said


def afm(*words: str, settings: Sequence[str] = ()) -> str:
    """Return what a command prints: with overrides, the smoke profile's params; else those of the folder."""
    overrides = [word for setting in settings for word in ("--set", setting)]
    params = [] if paths.PARAMS.exists() else ["--params", str(SMOKE)]
    done = CliRunner().invoke(app, [*words, *params, *overrides])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output


def prepare(*settings: str) -> str:
    own = ("data.source=folder", "data.min_images=1", "reference.thumbnails=1001")
    return afm("prepare", settings=[*own, *settings])


def train(*settings: str) -> str:
    return afm("train", "t4", "--dry-run", settings=settings)


def encoded(request: pytest.FixtureRequest) -> None:
    """Copy the project on discs into the working directory."""
    shutil.copytree(request.getfixturevalue("discs"), ".", dirs_exist_ok=True)


def images(root: str = "data/images") -> Path:
    write_images(Path(root), per_class=2)
    return Path(root)


# A study


@provokes("Found no params.yaml in DIR: run this in the project root")
def _(request: pytest.FixtureRequest) -> str:
    return CliRunner().invoke(app, ["status"]).output


@provokes("Found no git repository in DIR, which DVC needs")
def _(request: pytest.FixtureRequest) -> str:
    return CliRunner().invoke(app, ["init"]).output


@provokes("Found dvc.yaml in DIR, expected a folder without a study: nothing was written")
def _(request: pytest.FixtureRequest) -> str:
    Path("dvc.yaml").write_text("stages: {}\n")
    return CliRunner().invoke(app, ["init", "--no-git"]).output


@provokes("Found versions.yaml of another version of afm-pipe")
def _(request: pytest.FixtureRequest) -> str:
    CliRunner().invoke(app, ["init", "--no-git"])
    Path("versions.yaml").write_text(Path("versions.yaml").read_text().replace("data: ", "data: 9"))
    return CliRunner().invoke(app, ["stage", "prepare"]).output


@provokes("afm-pipe: not found")
def _(request: pytest.FixtureRequest) -> str:
    done = subprocess.run(
        ["/bin/sh", "-c", "afm-pipe stage train t4"], env={"PATH": "/nowhere"}, capture_output=True, text=True
    )
    return (done.stdout + done.stderr).replace("command not found", "not found")


# Images


@provokes("N of them carry an EXIF orientation other than upright, ignored, as in ADM")
def _(request: pytest.FixtureRequest) -> str:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (32, 32)).save(images() / "class0" / "photo.jpg", exif=exif)
    return prepare()


@provokes("Found a manifest of images with the EXIF orientation ignore, expected apply")
def _(request: pytest.FixtureRequest) -> str:
    encoded(request)
    with pytest.raises(UserError) as error:
        track(
            "check", require_images(read_manifest(paths.MANIFEST), load_params(SMOKE, ["data.orientation=apply"]).data)
        )
    return str(error.value)


@provokes("Found data/latents.h5 with orientation ignore, expected apply as params say")
def _(request: pytest.FixtureRequest) -> str:
    encoded(request)
    return afm("train", "t4", settings=["data.orientation=apply"])


@provokes("models/t4 results/curves/t4.csv ...: current.")
def _(request: pytest.FixtureRequest) -> str:
    encoded(request)
    afm("train", "t4")
    return afm("train", "t4")


@provokes("Found launch setting tensorboard = true, and no package tensorboard")
def _(request: pytest.FixtureRequest) -> str:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    encoded(request)
    monkeypatch = request.getfixturevalue("monkeypatch")
    monkeypatch.setattr(live_log, "distribution", missing)
    monkeypatch.setenv("AFM_TENSORBOARD", "1")
    return afm("train", "t4")


@provokes("Not logged with TensorBoard: ... The run continues")
def _(request: pytest.FixtureRequest) -> str:
    pytest.importorskip("tensorboard")
    encoded(request)
    Path("work").mkdir(exist_ok=True)
    Path("work/tensorboard").write_text("in the way")
    request.getfixturevalue("monkeypatch").setenv("AFM_TENSORBOARD", "1")
    return afm("train", "t4")


@provokes("Held-out images reach for about N samples in the reference's class shares")
def _(request: pytest.FixtureRequest) -> str:
    write_images(Path("data/images"), per_class=10)
    return prepare("held_out={share: 0.5, root: null}", "evaluate.samples=100")


@provokes("Found one of the pool's N processes killed, perhaps for lack of memory")
def _(request: pytest.FixtureRequest) -> str:
    with pytest.raises(UserError) as error, pool._pool(2, None):
        raise BrokenProcessPool
    return str(error.value)


@provokes("Few updates: N of NAME")
def _(request: pytest.FixtureRequest) -> str:
    write_images(Path("data/images"), per_class=10)
    return prepare()


@provokes("Found no image of class 'class0' to train on under DIR")
def _(request: pytest.FixtureRequest) -> str:
    first, second = sorted((images() / "class0").iterdir())
    shutil.copy(first, second)
    return prepare("held_out={share: 0.5, root: null}")


@provokes("Found no held-out images in data/held_out.json")
def _(request: pytest.FixtureRequest) -> str:
    encoded(request)
    return afm("reference", settings=["held_out={share: 0.5, root: null}"])


@provokes("Found cats under DIR, a link that leads nowhere")
def _(request: pytest.FixtureRequest) -> str:
    (images() / "cats").symlink_to("/no/such/place")
    return prepare()


@provokes("Found extra next to DIR/train, expected the class folders in train and at most dev, eval, ...")
def _(request: pytest.FixtureRequest) -> str:
    images("data/images/train")
    Path("data/images/extra").mkdir()
    return prepare()


@provokes("Found class0/notes.txt under DIR, expected class folders with only files ending in ...")
def _(request: pytest.FixtureRequest) -> str:
    (images() / "class0" / "notes.txt").touch()
    return prepare()


@provokes("skipped N: 2 'Thumbs.db', 1 'val'")
def _(request: pytest.FixtureRequest) -> str:
    root = images("data/images/train")
    for folder in (root / "class0", root / "class1", root.parent / "val"):
        folder.mkdir(exist_ok=True)
        (folder / "Thumbs.db").touch()
    return prepare()


@provokes("FIX  data: data/manifest.json does not fit params or the images")
def _(request: pytest.FixtureRequest) -> str:
    encoded(request)
    Path("data/images/class0/000.png").unlink()
    return afm("doctor")


@provokes("Found data/images, which user NAME may not list")
def _(request: pytest.FixtureRequest) -> str:
    run = request.getfixturevalue("unprivileged")
    Path("images").rename("data/images")
    Path("data/images").chmod(0)
    said = run("prepare", "--set", "data.root=data/images")
    Path("data/images").chmod(0o755)
    return said


@provokes("Found what later stages cannot work with")
def _(request: pytest.FixtureRequest) -> str:
    images()
    return prepare("reference.thumbnails=3")


@provokes("Not measured: accuracy on held-out images and variance of 3 classes of one image.")
def _(request: pytest.FixtureRequest) -> str:
    write_images(Path("data/images"), classes=3, per_class=1)
    for index in range(2):
        Path("data/images/more").mkdir(exist_ok=True)
        Image.new("L", (32, 32), index).save(f"data/images/more/{index}.png")
    return prepare()


@provokes("The monitor's probe sees 20 of 500 classes ...")
def _(request: pytest.FixtureRequest) -> str:
    for index in range(1000):
        Path(f"data/images/{index % 500}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), index % 256).save(f"data/images/{index % 500}/{index}.png")
    return prepare("evaluate.samples=1000", "study.samples=1000")


# Classes and references


@provokes("Found 'airplane' as class 0 of 2 in models/t4, expected 'cat' of 2 as in ...")
def _(request: pytest.FixtureRequest) -> str:
    write_json(paths.model("t4") / "config.json", {"classes": ["airplane", "automobile"]})
    write_json(paths.REFERENCE / "summary.json", {"classes": ["cat", "dog"]})
    return afm("export", "t4", "--format", "adm-npz", "--out", "x.npz")


@provokes("Not checked: whether the classes of ...")
def _(request: pytest.FixtureRequest) -> str:
    write_json(paths.model("t4") / "config.json", {})
    write_json(paths.REFERENCE / "summary.json", {"classes": ["cat", "dog"]})
    return afm("export", "t4", "--format", "adm-npz", "--out", "x.npz")


@provokes("Not checked: whether the real images have equal class shares")
def _(request: pytest.FixtureRequest) -> str:
    return afm("export", "t4", "--format", "adm-npz", "--out", "x.npz")


@provokes("Found reference/summary.json of images in other class shares, expected data as reference.class_shares says")
def _(request: pytest.FixtureRequest) -> str:
    params, none = load_params(SMOKE, ["reference.class_shares=data"]), None
    summary = {"classes": ["cat", "dog"], "class_counts": [20, 20], "images": 60}
    with pytest.raises(UserError) as error:
        class_counts(params, summary, none, paths.REFERENCE)  # type: ignore[arg-type]  # the counts are in the summary
    return str(error.value)


# Params


@provokes("..., a name that DVC can address ...")
def _(request: pytest.FixtureRequest) -> str:
    paths.PARAMS.write_text(SMOKE.read_text().replace("  t4-no-transport:", "  t4.v2:"))
    return afm("status")


@provokes("expected text; write it in quotes")
def _(request: pytest.FixtureRequest) -> str:
    paths.PARAMS.write_text(SMOKE.read_text().replace('"0.2": {}', "5e-4: {}"))
    return afm("status")


@provokes("this is text: write 0.001 without quotes")
def _(request: pytest.FixtureRequest) -> str:
    return train('train.lr="1e-3"')


@provokes("found seed twice, again in line 2")
def _(request: pytest.FixtureRequest) -> str:
    paths.PARAMS.write_text("seed: 1\nseed: 2\n")
    return afm("status")


@provokes("expected true or false")
def _(request: pytest.FixtureRequest) -> str:
    return train("train.qk_norm=yes")


@provokes("expected a section")
def _(request: pytest.FixtureRequest) -> str:
    return train("runs.t4=[1]")


@provokes("expected a path that DVC finds, which expands neither ~ nor $HOME")
def _(request: pytest.FixtureRequest) -> str:
    return train("imported.x={file: ~/x.pth}")


# DVC, make, and interpreters


def dvc(stage: dict[str, Any], work: Callable[[Repo], Any]) -> str:
    """Return how an operation of DVC fails, in a project of one stage."""
    Path("dvc.yaml").write_text(json.dumps({"stages": {"guide": stage}}))
    with Repo.init(no_scm=True) as repo, pytest.raises(DvcException) as error:
        work(repo)
    return str(error.value)


@provokes("python: not found")
def _(request: pytest.FixtureRequest) -> str:
    patch, said = request.getfixturevalue("monkeypatch"), request.getfixturevalue("capfd")
    patch.setenv("PATH", str(Path.cwd()))
    patch.setenv("SHELL", "/bin/sh")
    dvc({"cmd": "python stages/guide.py"}, Repo.reproduce)
    return said.readouterr().err.replace("python: command not found", "python: not found")


@provokes("failed to resolve 'stages.guide.foreach' ... got NoneType")
def _(request: pytest.FixtureRequest) -> str:
    assert "foreach: ${guided}" in (ROOT / "dvc.yaml").read_text()
    paths.PARAMS.write_text("guided:\n")
    return dvc({"foreach": "${guided}", "do": {"cmd": "python stages/guide.py ${key}"}}, Repo.status)


@provokes("without the package's dependencies (typer)")
def _(request: pytest.FixtureRequest) -> str:
    shutil.copytree(ROOT / "stages", "stages")  # where no .venv is
    bare = [getattr(sys, "_base_executable", sys.executable), "-S", "stages/prepare.py"]
    return _printed(*bare, env={"PATH": os.environ["PATH"]})


@provokes("found no git repository, which DVC needs", "found VENV=..., expected a path without spaces")
def _(request: pytest.FixtureRequest) -> str:
    if not shutil.which("make"):
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, name)
    return _printed("make", "repro") + _printed("make", "repro", "VENV=a b")


def _printed(*words: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


# Weights


def imported(held: Any) -> str:
    torch.save(held, "x.pt")
    return afm("import", "x.pt", "--name", "x")


WEIGHTS = {"x_embedder.proj.weight": torch.ones(2), "blocks.0.attn.qkv.weight": torch.ones(2)}


@provokes("Found x.pt holding model: dict, old: dict, expected one dict of named tensors, ... Choose one with --key")
def _(request: pytest.FixtureRequest) -> str:
    return imported({"model": WEIGHTS, "old": WEIGHTS})


@provokes("Found x.pt with an EMA that is not a dict of a generator's tensors")
def _(request: pytest.FixtureRequest) -> str:
    return imported({"model": WEIGHTS, "ema": {"shadow_params": [*WEIGHTS.values()]}})


@provokes("Found x.pt holding more than tensors and settings (GLOBAL NAME)")
def _(request: pytest.FixtureRequest) -> str:
    return imported({"model": WEIGHTS, "x": Popen()})


@provokes("Found x.pt with a tuple used again that holds more than 64 values")
def _(request: pytest.FixtureRequest) -> str:
    torch.save(WEIGHTS, "x.pt")
    nested = b"\x80\x02}U\x01aq\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(99)) + b"K\x01s."
    repacked(Path("x.pt"), lambda name, content: nested if name.endswith("data.pkl") else content)
    return afm("import", "x.pt", "--name", "x")


@provokes("Found model.safetensors.index.json without its file ...")
def _(request: pytest.FixtureRequest) -> str:
    Path("model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    return afm("import", "model.safetensors.index.json", "--name", "x")


# Processes


@provokes("Found RANK=0 WORLD_SIZE=2 in the environment, without MASTER_ADDR, MASTER_PORT")
def _(request: pytest.FixtureRequest) -> str:
    patch = request.getfixturevalue("monkeypatch")
    patch.setenv("RANK", "0")
    patch.setenv("WORLD_SIZE", "2")
    return afm("train", "t4")


@provokes("Ignored RANK=0 WORLD_SIZE=1 in the environment")
def _(request: pytest.FixtureRequest) -> str:
    patch = request.getfixturevalue("monkeypatch")
    patch.setenv("RANK", "0")
    patch.setenv("WORLD_SIZE", "1")
    environment._say.cache_clear()
    return afm("train", "t4")


@provokes("rank 0 waits for 1 other processes at HOST:PORT")
def _(request: pytest.FixtureRequest) -> str:
    """Join a group of two in a forked process, which nobody else joins."""
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "no.such.host", "MASTER_PORT": "29500"}
    child = os.fork()
    if child == 0:
        sys.stderr = Path("said.txt").open("w", buffering=1)  # noqa: SIM115  # the process ends
        try:
            os.environ.update(place)
            process_group.SAY_SECONDS, process_group.JOIN_SECONDS = 0.1, 0.5
            with process_group.init_distributed(torch.device("cpu")):
                pass
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return Path("said.txt").read_text()
