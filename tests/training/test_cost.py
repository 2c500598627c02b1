"""What a run records of its cost: the peak memory of the device that it computes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from afm_pipe import pipeline
from afm_pipe.distributed.launch import Launch
from afm_pipe.params import Params
from afm_pipe.runtime import paths
from afm_pipe.training.cost import peak_memory, run_cost
from tests.conftest import ROOT

CPU = torch.device("cpu")
SECONDS = {"training": 8.0, "data_wait": 0.4, "saving": 0.2}


def test_the_peak_of_a_cpu_is_that_of_the_process_after_memory_is_freed() -> None:
    code = (
        "import torch\nfrom afm_pipe.training.cost import peak_memory\ncpu = torch.device('cpu')\n"
        "before = peak_memory(cpu)\nlarge = torch.ones(150_000_000)\ndel large\n"
        "print(before, peak_memory(cpu) - before)"
    )
    held = torch.ones(250_000_000)  # what the process that starts another holds is not the other's
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    del held
    before, more = map(int, done.stdout.split())
    assert 400e6 < more < 620e6  # of 600 MB in float32, above the peak of the imports
    assert before < 600e6, "not that of the process that started it"


def test_the_peak_of_a_gpu_is_what_torch_reserved_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: asked.append(device) or 3 << 30)
    monkeypatch.setattr("afm_pipe.training.cost.machine_name", lambda device: "a card")
    card = torch.device("cuda", 1)
    cost = run_cost(10, 8, SECONDS, card, 2)
    assert (cost["peak_memory_gib"], cost["device"], asked) == (3.0, "cuda:1", [card])


def test_a_run_records_its_peak_memory_and_rates(
    discs: Path, discs_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(discs / "data")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "autoencoder").symlink_to(discs / "models" / "autoencoder")
    pipeline.train(discs_params, "t4", Launch(device="cpu"))
    cost = json.loads(paths.costs("t4").read_text())
    assert 0.1 < cost["peak_memory_gib"] < 1.01 * peak_memory(CPU) / 2**30
    assert cost["images_per_second"] == pytest.approx(8 * cost["updates_per_second"])
