"""Launch settings: flags, then the environment, then launch.toml, then defaults; mistakes name their place."""

from pathlib import Path

import pytest
import torch

from afm_pipe.distributed.launch import load_launch
from afm_pipe.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("project")


def test_flags_precede_the_environment_and_that_the_file_and_that_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("launch.toml").write_text("workers = 2\nnproc_per_node = 2\nmicro_batch = 2\n")
    monkeypatch.setenv("AFM_NPROC_PER_NODE", "3")
    monkeypatch.setenv("AFM_MICRO_BATCH", "3")
    launch = load_launch(micro_batch=4, nproc_per_node=None)
    assert (launch.keep_checkpoints, launch.workers, launch.nproc_per_node, launch.micro_batch) == (2, 2, 3, 4)
    assert launch.world_size == 3


@pytest.mark.parametrize(
    ("variable", "file", "flags", "words"),
    [
        ("many", "", {}, "workers = 'many': .* Fix the environment variable AFM_WORKERS"),
        ("", "workers = 0", {}, "workers = '': .* Fix the environment variable AFM_WORKERS"),
        (None, "workers = 0", {}, r"workers = 0: .* Fix launch\.toml"),
        (None, "wrokers = 1", {}, r"wrokers = 1: .* Fix launch\.toml"),
        (None, "workers", {}, r"Found launch\.toml, which is not TOML"),
        ("1", "workers = 1", {"workers": 0}, r"workers = 0: .* Fix --workers"),
        (None, "nnodes = 2", {}, r"expected rendezvous \(HOST:PORT\) with nnodes 2"),
        (None, "shard = true\ncompile = true", {}, "expected either shard or compile, found both"),
    ],
)
def test_a_wrong_setting_is_named_with_its_place(
    variable: str | None, file: str, flags: dict[str, int], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("AFM_WORKERS", variable)
    Path("launch.toml").write_text(file)
    with pytest.raises(UserError, match=words):
        load_launch(**flags)


def test_variables_of_other_programs_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFM_WEIGHTS", "/weights")
    monkeypatch.setenv("DEVICE", "warp")
    assert load_launch().device == "auto"


def test_a_process_takes_its_own_gpu_before_it_uses_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 and NCCL use the current device, which is the first GPU otherwise; no GPU is needed to see the order."""
    calls = []
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in {"LOCAL_RANK": "3", "RANK": "3", "WORLD_SIZE": "4", **address}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set", device)))
    monkeypatch.setattr(torch, "empty", lambda *_, device: calls.append(("use", device)))
    device = load_launch(device="cuda").torch_device()
    assert calls == [("set", device), ("use", device)]
    assert device == torch.device("cuda", 3)


def test_a_folder_in_the_place_of_launch_toml_is_refused() -> None:
    Path("launch.toml").mkdir()
    with pytest.raises(UserError, match=r"Found .*launch\.toml, which is a folder, expected a file"):
        load_launch()
