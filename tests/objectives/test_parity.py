"""Production's update equals the released trainer's: single steps and a whole trajectory."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.parity import Released, check, read

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["step_1nfe", "step_2nfe", "traj_1nfe", "traj_augmented", "cafm"])
def test_update_equals_the_released_trainers(name: str) -> None:
    found = check(GOLDEN / f"{name}.npz")
    assert found.passed, str(found)


def test_sizes_form_and_steps_are_read_from_the_tensors() -> None:
    one, two = (
        Released(name, read(GOLDEN / f"{name}.npz"), "weights_gen/", "weights_dis/")
        for name in ("step_1nfe", "step_2nfe")
    )
    assert (one.size.width, one.size.depth, one.size.heads, one.size.patch, one.side) == (32, 2, 4, 2, 8)
    assert (one.config.form, one.config.nfe) == ("direct", 1)
    assert (two.config.form, two.config.nfe) == ("residual", 2)


def test_a_file_of_another_trainer_is_a_miss_and_the_exit_code(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "step_1nfe.npz", tmp_path / "step_right.npz")
    with np.load(GOLDEN / "step_1nfe.npz") as file:
        arrays = dict(file)
    arrays["gen/grad/x_embedder.proj.weight"] = 1.0001 * arrays["gen/grad/x_embedder.proj.weight"]
    np.savez(tmp_path / "step_wrong.npz", **arrays)
    done = subprocess.run([sys.executable, "-m", "tests.parity", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith("equal  step_right")
    assert lines[1].startswith("MISS   step_wrong")
    assert "gen/grad/x_embedder.proj.weight" in lines[1]


def test_an_empty_folder_is_no_pass(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-m", "tests.parity", str(tmp_path)], capture_output=True).returncode == 2
