"""Checkpoints of other codebases: the weights are found wherever they are, and nothing in the file runs."""

import argparse
import collections
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from afm_pipe.models.released import import_generator, read_tensors
from afm_pipe.params import Imported
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json
from tests.models.test_released import FORMS, state

Tensors = dict[str, Tensor]
EMA = state(FORMS["1nfe"])
RAW = {name: tensor + 1 for name, tensor in EMA.items()}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without_buffers(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != "pos_embed"}


def optimizer() -> dict[str, Any]:
    """The state of a real AdamW of two parameter groups, which share the tuple of betas."""
    layers = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    adam = torch.optim.AdamW([{"params": layer.parameters()} for layer in layers], betas=(0.9, 0.95))
    layers[1](layers[0](torch.ones(1, 2))).sum().backward()
    adam.step()
    return adam.state_dict()


ARGS = argparse.Namespace(model="DiT-XL/2", results_dir=Path("results"), lr=1e-4)
CONFIG = OmegaConf.create({"model": {"depth": 28, "patch": [2, 2]}, "lr": 1e-4})
CONTAINERS: dict[str, tuple[Callable[[], Any], str]] = {  # what is saved, and where the EMA is said to be
    "DiT, SiT": (lambda: {"model": RAW, "ema": EMA, "opt": optimizer(), "args": ARGS}, "its entry ema"),
    "REPA": (lambda: {"model": RAW, "ema": EMA, "opt": optimizer(), "args": ARGS, "steps": 400_000}, "its entry ema"),
    "LightningDiT": (
        lambda: {"model": under("module.", RAW), "ema": under("module.", EMA), "opt": optimizer(), "config": CONFIG},
        "its entry ema, without the prefix module.",
    ),
    "Lightning": (
        lambda: {
            "epoch": 3,
            "state_dict": under("net.", RAW) | under("net_ema.", EMA) | {"loss.scale": torch.ones(3)},
            "optimizer_states": [optimizer()],
            "hyper_parameters": CONFIG,
            "callbacks": {"Timer": SimpleNamespace(best=1, path=Path("x"))},
        },
        "its entry state_dict, without the prefix net_ema.",
    ),
    "ema_pytorch": (
        lambda: under("online_model.", RAW) | under("ema_model.", EMA) | {"initted": torch.tensor(True)},
        "the file itself, without the prefix ema_model.",
    ),
    "shadow": (lambda: {"model": RAW, "ema": {"decay": 0.999, "shadow": EMA}}, "its entry ema.shadow"),
    "DDP": (lambda: under("module.", EMA), "the file itself, without the prefix module."),
    "compiled": (lambda: {"model": under("_orig_mod.module.", EMA)}, "its entry model, without the prefix _orig_mod."),
    "GAN": (lambda: {"G": EMA, "D": RAW | {"dis_embed": torch.ones(1)}, "opt": optimizer()}, "its entry G"),
    "EMA of parameters": (
        lambda: {"model": RAW | {"pos_embed": EMA["pos_embed"]}, "ema": without_buffers(EMA)},
        "its entry ema, with pos_embed of model",
    ),
    "averaged prefix": (
        lambda: under("module.", RAW | {"pos_embed": EMA["pos_embed"]}) | under("ema.", without_buffers(EMA)),
        "the file itself, without the prefix ema., with pos_embed of module",
    ),
    "defaultdict": (lambda: {"ema": EMA, "log": collections.defaultdict(list, loss=[1.0])}, "its entry ema"),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_the_usual_containers_are_read_and_the_ema_is_taken_and_said(kind: str) -> None:
    make, entry = CONTAINERS[kind]
    torch.save(make(), "x.pt")
    import_generator(Imported(file="x.pt"), Path("models/x"))
    assert read_json(Path("models/x/config.json"))["provenance"]["imported"]["entry"].startswith(entry)
    found = read_tensors(Path("x.pt")).tensors
    assert found.keys() == EMA.keys() and all(torch.equal(found[name], EMA[name]) for name in EMA)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_sharded_checkpoint_is_read_by_its_index(form: str) -> None:
    names = sorted(EMA)
    parts = {f"model-0000{i}-of-00002.{form}": {name: EMA[name] for name in names[i - 1 :: 2]} for i in (1, 2)}
    for file, tensors in parts.items():
        save_file(tensors, file) if form == "safetensors" else torch.save(tensors, file)
    index = Path(f"model.{form}.index.json")
    index.write_text(json.dumps({"weight_map": {name: file for file, part in parts.items() for name in part}}))
    import_generator(Imported(file=str(index)), Path("models/x"))
    assert read_tensors(index).tensors.keys() == EMA.keys()
    Path(next(iter(parts))).unlink()
    with pytest.raises(UserError, match="without its file model-00001-of-00002"):
        read_tensors(index)
    for elsewhere in ("../secret.safetensors", "/etc/passwd", "x.txt"):
        index.write_text(json.dumps({"weight_map": {"a": elsewhere}}))
        with pytest.raises(UserError, match="not an index of weights"):
            read_tensors(index)


@pytest.mark.parametrize(
    ("key", "raw"), [("model", True), ("ema", False), ("ema.shadow", False), ("state_dict.net", True)]
)
def test_a_key_chooses(key: str, raw: bool) -> None:
    held = {"model": RAW, "ema": {"decay": 0.9, "shadow": EMA}, "state_dict": under("net.", RAW)}
    torch.save(held, "x.pt")
    found = read_tensors(Path("x.pt"), key).tensors
    assert all(torch.equal(found[name], (RAW if raw else EMA)[name]) for name in EMA)


class Popen:
    """What a hostile pickle does with another module than os."""

    def __reduce__(self) -> Any:
        return subprocess.Popen, (["touch", "exploded"],)


class Remote:
    """What a hostile pickle does with a function that is not of the standard library."""

    def __reduce__(self) -> Any:
        return torch.save, ({}, "exploded")


def deep() -> Any:
    tensors: Any = EMA
    for _ in range(9):
        tensors = {"a": tensors}
    return tensors


@pytest.mark.parametrize(
    ("held", "key", "words"),
    [
        ({"model": RAW, "old": EMA}, None, r"the weights model \(\d+ tensors\), old \(\d+ tensors\)\. Choose one with"),
        ({"model": RAW, "ema": EMA}, "net", "with the weights model .*, ema .*, expected one under the key net"),
        ({"ema_fast": RAW, "ema_slow": EMA}, None, "the weights ema_fast .*, ema_slow .* Choose one with --key"),
        ({"model": RAW, "ema": {"shadow_params": [*EMA.values()]}}, None, r"an EMA that is not a dict .* \(ema\), and"),
        ({"model": RAW, "ema": argparse.Namespace(shadow=1)}, None, r"an EMA that is not a dict"),
        ({"args": ARGS, "steps": 3}, None, "holding args: Namespace, steps: int, expected one dict"),
        (deep(), None, "holding a: dict, expected one dict"),
        ({"model": EMA, "x": Popen()}, None, "more than tensors and settings .*Popen.*Nothing in it was run"),
    ],
)
def test_a_refusal_names_what_was_found_where(held: Any, key: str | None, words: str) -> None:
    torch.save(held, "x.pt")
    with pytest.raises(UserError, match=words):
        read_tensors(Path("x.pt"), key)
    assert not os.path.exists("exploded")


@pytest.mark.parametrize(
    ("inside", "words"),
    [
        (["x.safetensors", "config.json"], r"Found the folder weights, expected a file .* one of those in it, x\.safe"),
        (["config.json"], r"Found the folder weights without weights \(\.pth"),
        ([], "Found the folder weights without weights"),
    ],
)
def test_a_folder_is_named_as_one(inside: list[str], words: str) -> None:
    Path("weights").mkdir()
    for name in inside:
        Path("weights", name).touch()
    with pytest.raises(UserError, match=words):
        import_generator(Imported(file="weights"), Path("models/x"))


def test_an_unknown_object_is_skipped_without_being_made() -> None:
    torch.save({"model": EMA, "x": Remote()}, "x.pt")
    assert read_tensors(Path("x.pt")).entry == "its entry model"
    assert not os.path.exists("exploded")


def test_a_dict_that_holds_itself_is_searched_once() -> None:
    held: dict[str, Any] = {}
    held |= {f"ema{i}": held for i in range(300)} | {"state_dict": held}
    torch.save(held, "x.pt")
    with pytest.raises(UserError, match="expected one dict of named tensors"):
        read_tensors(Path("x.pt"))
