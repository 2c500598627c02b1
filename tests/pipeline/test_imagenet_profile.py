"""The profile of ImageNet under DVC."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_dvc_lists_every_stage_of_the_profile_without_images(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in listed.splitlines():
        if name != "dvc.lock" and (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)

    def shell(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shell("git", "init", "-q")
    shell(sys.executable, "-m", "afm_pipe", "profile", "imagenet256")
    # Without --force DVC hashes what stages depend on even in a dry run, and fails on what is not made yet (dvc#9021).
    stages = shell("dvc", "repro", "--dry", "--force")
    runs = ("b2", "m2", "l2", "xl2", "xl2-2nfe", "xl2-4nfe", "xl2-56l", "xl2-112l")
    for run in runs:
        for stage in (f"train@{run}", f"guide@{run}-guided", f"sample@{run}", f"evaluate-guided@{run}-guided"):
            assert f"'{stage}'" in stages
    for stage in ("prepare", "autoencoder", "encode", "reference", "classifier", "report"):
        assert f"'{stage}'" in stages
    assert not (tmp_path / "data").exists()
