"""The checks of one GPU start with nothing but what training needs, and on a machine without one skip by name."""

import json
import os
import subprocess
import sys

from afm_pipe.params.file import load_params
from tests.conftest import ROOT

MISSING = "dvc typer h5py psutil pydantic_settings ruamel rich PIL scipy yaml diffusers torchvision matplotlib dvclive"
WITHOUT = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING.split()!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import pytest
from benchmarks.gpu.__main__ import main
code = pytest.main(["benchmarks/gpu", "-m", "gpu", "-p", "no:cacheprovider"])
sys.exit(main([]) or code)
"""


def test_without_a_gpu_every_check_skips_and_says_what_it_needs() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for number in range(1, 13):
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"test_{number:02}_")]
        assert lines and all("skipped" in line and "needs a CUDA device" in line for line in lines)
    assert "make bench-gpu: skipped, needs a CUDA device, found none" in done.stdout


def test_settings_of_the_checks_are_the_papers() -> None:
    run = load_params(ROOT / "profiles" / "imagenet256.yaml").runs["xl2"]
    assert json.loads((ROOT / "benchmarks" / "gpu" / "run.json").read_text()) == run.model_dump(mode="json")
