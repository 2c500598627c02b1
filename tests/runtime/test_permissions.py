"""A denied permission is one line that names the path, the operation and the user, whichever command meets it."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from typer.testing import CliRunner

from afm_pipe.cli.app import app
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UnwritableError
from afm_pipe.runtime.files import atomic_path
from tests.conftest import SMOKE, write_images

NOBODY = 65534
EXPORT = ("export", "t4", "--format", "released", "--out", "x.pth")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Return a function that runs a command as a user without special rights, and returns what it printed."""
    project = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    project.chmod(0o755)
    monkeypatch.chdir(project)
    write_images(Path("images"), per_class=4)
    text = SMOKE.read_text().replace("source: mnist5k", "source: folder").replace("root: data/images", "root: images")
    Path("params.yaml").write_text(text.replace("min_images: 1000", "min_images: 1"))
    Path("data").mkdir()
    for words in (["prepare"], ["train", "t4", "--dry-run"], ["train", "t4"], EXPORT):
        CliRunner().invoke(app, [*words])  # import what needs the rights of this process

    def command(*words: str) -> str:
        result = CliRunner().invoke(app, [*words])
        assert result.exit_code == 1, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.output

    if os.geteuid() == 0:
        for path in (project, *project.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield command
    finally:
        os.seteuid(os.getuid())
        for path in project.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o755)
        shutil.rmtree(project, ignore_errors=True)


@pytest.mark.parametrize("place", ["images", "images/class1"])
def test_a_folder_that_may_not_be_listed_is_named(run: Callable[..., str], place: str) -> None:
    Path(place).chmod(0)
    said = run("prepare")
    assert f"error: Found {place}, which user " in said
    assert "may not list: fix its permissions" in said


def test_a_closed_image_is_named(run: Callable[..., str]) -> None:
    Path("images/class1/001.png").chmod(0)
    assert "images/class1/001.png unreadable (Permission denied)" in run("prepare")


def test_a_closed_params_file_is_named(run: Callable[..., str]) -> None:
    Path("params.yaml").chmod(0)
    assert "error: Found params.yaml, which user " in run("status")


def test_a_closed_archive_is_named(run: Callable[..., str]) -> None:
    shutil.make_archive("images", "tar", "images")
    Path("images.tar").chmod(0)
    assert "Found images.tar, which user " in run(
        "prepare", "--set", "data.root=images.tar", "--set", "data.source=tar"
    )


def test_a_folder_that_may_not_be_written_is_named(run: Callable[..., str]) -> None:
    Path("data/manifest.json").unlink()
    Path("data").chmod(0o555)
    said = run("prepare")
    assert "data/held_out.json not writable (Permission denied)" in said or "Found data, which user " in said


def test_a_closed_file_of_weights_is_named_and_not_called_damaged(run: Callable[..., str]) -> None:
    folder = Path("models/t4")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model": {"size": "t4", "channels": 4, "latent_size": 8, "num_classes": 3}}')
    for name in ("generator.safetensors", "discriminator.safetensors"):
        (folder / name).touch()
        (folder / name).chmod(0)
    assert "error: Found models/t4/generator.safetensors, which user " in run(*EXPORT)


def test_a_closed_hdf5_file_is_named_and_not_called_damaged(run: Callable[..., str]) -> None:
    Path("data/latents.h5").touch()
    Path("data/latents.h5").chmod(0)
    paths.AUTOENCODER_WEIGHTS.parent.mkdir(parents=True)
    paths.AUTOENCODER_WEIGHTS.touch()
    assert "error: Found data/latents.h5, which user " in run("train", "t4")


def test_a_denied_read_is_no_denied_write_and_no_traceback_of_a_library(run: Callable[..., str]) -> None:
    Path("secret").touch()
    Path("secret").chmod(0)
    with pytest.raises(PermissionError), atomic_path(Path("made/x")):
        Path("secret").read_text()
    Path("made").chmod(0o555)
    denied = pytest.raises(UnwritableError, match=r"made/x not writable \(Permission denied\)")
    with denied, atomic_path(Path("made/x")) as temp:
        save_file({"a": torch.ones(1)}, temp)
    with pytest.raises(UnwritableError, match=r"x not writable \(No space left on device\)"), atomic_path(Path("x")):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_closed_results_file_is_named_and_not_called_damaged(run: Callable[..., str]) -> None:
    Path("data/manifest.json").chmod(0)
    assert "Found data/manifest.json, which user " in run("train", "t4", "--dry-run")
