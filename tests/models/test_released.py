"""Weights in and out: recognised by their tensors, refused with the tensor's name, loadable by others."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL

from afm_pipe import pipeline
from afm_pipe.autoencoders.kl import KLAutoencoder
from afm_pipe.models.exports import export
from afm_pipe.models.model_files import (
    ModelConfig,
    build_discriminator,
    build_generator,
    load_generator,
    save_model,
)
from afm_pipe.models.released import WeightsFile, import_generator, infer_config, read_tensors
from afm_pipe.params import Imported
from afm_pipe.params.file import load_params
from afm_pipe.reporting.page import write_report
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json
from afm_pipe.sampling.sampler import Sampler, balanced_labels
from tests.conftest import ROOT, SMOKE
from tests.reporting.report_inputs import make_params, write, write_inputs, write_picture

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"size": "t4", "channels": 4, "latent_size": 8, "num_classes": 10}
FORMS = {
    "1nfe": ModelConfig(**SMALL),
    "2nfe": ModelConfig(**SMALL, nfe=2, form="residual"),
    "4nfe": ModelConfig(**SMALL, nfe=4, form="residual"),
    "any": ModelConfig(**SMALL, nfe="any", form="residual"),
    "deep2": ModelConfig(**SMALL, repeats=2),
    "deep4": ModelConfig(**SMALL, repeats=4),
    "qk": ModelConfig(**SMALL, qk_norm=True),
}
ANSWERS: dict[str, dict[str, int]] = {
    "2nfe": {"nfe": 2},
    "4nfe": {"nfe": 4},
    "deep2": {"repeats": 2},
    "deep4": {"repeats": 4},
}
RELEASED = {  # every published checkpoint: size, and the answer where its tensors leave it open
    **{f"{size}_1nfe_{kind}": (size, {}) for size in ("b2", "m2", "l2", "xl2") for kind in ("guided", "noguide")},
    "xl2_2nfe_guided": ("xl2", {"nfe": 2}),
    "xl2_2nfe_noguide": ("xl2", {"nfe": 2}),
    "xl2_4nfe_guided": ("xl2", {"nfe": 4}),
    "xl2_56layer_1nfe_guided": ("xl2", {"repeats": 2}),
    "xl2_112layer_1nfe_guided": ("xl2", {"repeats": 4}),
}


def state(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return a generator's weights with every one of them saying something: a fresh generator gives zeros."""
    network = build_generator(config)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.1, generator=random)
    return network.state_dict()


def told(file: Path | str, **answers: Any) -> Imported:
    return Imported(file=str(file), **answers)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project with the smoke params and an untrained autoencoder."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(SMOKE.read_text())
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae: Any = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8, 16, 32), norm_num_groups=8, **blocks)
    vae.register_to_config(scaling_factor=0.5)
    KLAutoencoder(vae, 32).save(paths.AUTOENCODER)
    return tmp_path


def trained(name: str, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Write a model folder as training does; return the generator's weights."""
    generator = build_generator(config)
    generator.load_state_dict(state(config))
    described = {"model": config.model_dump(), "name": name, "classes": [f"digit {i}" for i in range(10)]}
    described |= {"scaling_factor": 0.5, "provenance": {"fingerprint": "0"}, "updates": 3, "images_seen": 24}
    save_model(paths.model(name), {"generator": generator, "discriminator": build_discriminator(config)}, described)
    return generator.state_dict()


def latents(model: Path, steps: int | None = None) -> torch.Tensor:
    generator, indices = load_generator(model, CPU), range(5)
    return Sampler(generator, None, (4, 8, 8), (), 5).latents(indices, balanced_labels(indices, 10), 3, steps)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["released", "safetensors"])
def test_what_is_exported_is_recognized_and_samples_the_same(project: Path, form: str, kind: str) -> None:
    weights = trained("t4", FORMS[form])
    out = Path("out.pth" if kind == "released" else "out.safetensors")
    export(paths.model("t4"), paths.AUTOENCODER, kind, out)
    answers = ANSWERS.get(form, {}) if kind == "released" else {}  # safetensors says it itself
    assert import_generator(told(out, **answers), paths.model("back")) == FORMS[form]
    assert torch.equal(latents(paths.model("back")), latents(paths.model("t4")))
    assert read_tensors(out).tensors.keys() == weights.keys()


@pytest.mark.parametrize("name", RELEASED)
def test_every_published_generator_is_recognized_whatever_its_file_is_called(name: str) -> None:
    size, answers = RELEASED[name]
    expected = ModelConfig(
        size=size,
        channels=4,
        latent_size=32,
        num_classes=1000,
        nfe=answers.get("nfe", 1),
        form="residual" if "nfe" in answers else "direct",
        repeats=answers.get("repeats", 1),
    )
    with torch.device("meta"):
        contents = WeightsFile(build_generator(expected).state_dict(), "the file itself", {})
    assert infer_config(contents, Path("renamed.pth"), told("", **answers)) == expected
    if answers:
        with pytest.raises(UserError, match=r"--nfe 2 .*--nfe 4 .*--repeats 2 \(56 layers\), --repeats 4") as error:
            infer_config(contents, Path(f"{name}_FID2.00.pth"), told(""))
        (key, value), *_ = answers.items()
        assert f"The file name suggests --{key} {value}." in str(error.value)


@pytest.mark.parametrize(
    ("form", "answers", "words"),
    [
        ("1nfe", {"nfe": 2}, "no time embeddings, which is a generator of 1 step with blocks run once, but nfe 2"),
        ("1nfe", {"repeats": 2}, "but repeats 2 was given"),
        ("any", {"nfe": 2}, r"two time embeddings, which is a generator of any number of steps \(nfe any\), but nfe 2"),
        ("2nfe", {"nfe": 1, "repeats": 1}, "one time embedding, which is a generator of several steps, or blocks"),
        ("2nfe", {"nfe": "any"}, "one time embedding"),
        ("2nfe", {"nfe": 1}, r"Give one of --repeats 2 \(8 layers\), --repeats 4 \(16 layers\); in params"),
        ("2nfe", {"repeats": 1}, r"Give one of --nfe 2 \(2 steps\), --nfe 4 \(4 steps\); in params"),
    ],
)
def test_an_answer_that_the_tensors_contradict_is_refused(form: str, answers: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        infer_config(WeightsFile(state(FORMS[form]), "", {}), Path("x.pth"), told("", **answers))


class Bomb:
    """What a hostile pickle does: it runs something when it is loaded."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "blocks.1.mlp.fc1.bias"}, "missing blocks.1.mlp.fc1.bias"),
        (lambda t: {k: v for k, v in t.items() if "blocks.3." not in k}, "missing blocks.3.adaLN_modulation.1.bias"),
        (lambda t: t | {"extra.weight": torch.ones(1)}, "unexpected extra.weight"),
        (
            lambda t: t | {"final_layer.linear.weight": torch.ones(128, 128)},
            r"final_layer.linear.weight of shape \(128, 128\), expected \(64, 128\)",
        ),
        (lambda t: t | {"pos_embed": torch.ones(1, 3, 128)}, "pos_embed of 3 positions, expected a square number"),
        (lambda t: t | {"pos_embed": torch.ones(4, 128)}, r"pos_embed of shape \(4, 128\)"),
        (lambda t: t | {"x_embedder.proj.weight": torch.ones(96, 4, 4, 4)}, "width 96 and patch 4, expected a known"),
        (lambda t: {"conv_in.weight": torch.ones(8, 4, 3, 3)}, "no x_embedder.proj.weight, no pos_embed"),
        (lambda t: t | {"x_embedder.proj.bias": torch.ones(128).int()}, "x_embedder.proj.bias of int32"),
        (
            lambda t: t | {"x_embedder.proj.bias": torch.full((128,), torch.nan)},
            "non-finite values in x_embedder",
        ),
        (lambda t: {"model": t, "old": t}, "holding model: dict, old: dict"),
        (lambda t: t | {"epoch": 3}, "expected one dict of named tensors"),
        (lambda t: {"weights": [1, 2]}, "holding weights: list"),
        (lambda t: t | {"bomb": Bomb()}, "holding more than tensors .*mkdir.*Nothing in it was run"),
        (lambda t: dict(build_discriminator(FORMS["1nfe"]).state_dict()), "looks like a discriminator"),
    ],
)
def test_a_file_that_is_no_generator_is_refused_by_what_is_wrong(project: Path, change: Any, words: str) -> None:
    torch.save(change(dict(state(FORMS["1nfe"]))), "x.pth")
    with pytest.raises(UserError, match=words):
        import_generator(told("x.pth"), paths.model("x"))
    assert not Path("exploded").exists()
    assert not paths.model("x").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bare_pickle_with_code_is_refused_unrun(project: Path) -> None:
    Path("x.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="Nothing in it was run"):
        import_generator(told("x.pt"), paths.model("x"))
    assert not Path("exploded").exists()


def test_damaged_missing_and_wrong_files_are_named(project: Path) -> None:
    torch.save(state(FORMS["1nfe"]), "whole.pth")
    Path("cut.pth").write_bytes(Path("whole.pth").read_bytes()[:5000])
    Path("cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    Path("text.txt").write_text("")
    for file, words in [
        ("cut.pth", "Found cut.pth unreadable"),
        ("cut.safetensors", "unreadable as safetensors"),
        ("text.txt", "expected a file ending in .pth"),
        ("absent.pth", "Found no file absent.pth"),
    ]:
        with pytest.raises(UserError, match=words):
            import_generator(told(file), paths.model("x"))
    with pytest.raises(UserError, match="Found whole.pth with sha256 .*, expected 0000"):
        import_generator(told("whole.pth", sha256="0" * 64), paths.model("x"))


def test_the_moving_average_inside_a_checkpoint_is_taken_and_half_precision_widened(project: Path) -> None:
    weights = state(FORMS["1nfe"])
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    torch.save({"model": {k: torch.zeros_like(v) for k, v in weights.items()}, "ema": half, "steps": 7}, "x.pt")
    import_generator(told("x.pt"), paths.model("x"))
    described = read_json(paths.model("x") / "config.json")
    assert described["provenance"]["imported"]["entry"] == "its entry ema"
    made = load_generator(paths.model("x"), CPU).network.state_dict()["blocks.0.mlp.fc1.weight"]
    assert made.dtype == torch.float32
    assert torch.equal(made, half["blocks.0.mlp.fc1.weight"].float())


def test_an_imported_model_has_what_a_trained_one_has_but_a_discriminator(project: Path) -> None:
    torch.save(state(FORMS["1nfe"]), "x.pth")
    names = "\n".join(f"class {i}" for i in range(10))
    Path("names.txt").write_text(names)
    import_generator(told("x.pth", classes="names.txt"), paths.model("x"))
    described = read_json(paths.model("x") / "config.json")
    assert {path.name for path in paths.model("x").iterdir()} == {"generator.safetensors", "config.json"}
    assert described["classes"][3] == "class 3"
    assert described["images_seen"] is described["updates"] is None
    assert described["generator_parameters"] == sum(tensor.numel() for tensor in state(FORMS["1nfe"]).values())
    Path("names.txt").write_bytes(b"\xef\xbb\xbf" + names.replace("\n", "\r\n").encode() + b"\r\n\r\n")
    import_generator(told("x.pth", classes="names.txt"), paths.model("x"))
    assert read_json(paths.model("x") / "config.json")["classes"] == described["classes"], "as Notepad writes it"
    Path("names.txt").write_text("one\ntwo")
    with pytest.raises(UserError, match="Found 2 names in names.txt, expected 10"):
        import_generator(told("x.pth", classes="names.txt"), paths.model("x"))


def test_weights_of_sd_vae_latents_get_its_factor_and_the_names_of_imagenet(project: Path) -> None:
    config = ModelConfig(size="t2", channels=4, latent_size=32, num_classes=1000)
    torch.save(state(config), "x.pth")
    import_generator(told("x.pth"), paths.model("x"))
    described = read_json(paths.model("x") / "config.json")
    assert described["scaling_factor"] == 0.18215
    assert described["provenance"]["imported"]["classes_named_by"] == "imagenet"
    assert described["classes"][207] == "golden retriever"
    with pytest.raises(UserError, match="scaling factor 0.5, expected 4 and 0.18215"):
        pipeline.load_sampler(load_params(), "x", CPU)


def test_an_import_never_replaces_a_trained_model(project: Path) -> None:
    params = load_params()
    torch.save(state(FORMS["1nfe"]), "x.pth")
    trained("precious", FORMS["1nfe"])
    for name, words in [
        ("t4", "which is taken"),
        ("../x", "lowercase letters"),
        ("precious", "not imported"),
    ]:
        with pytest.raises(UserError, match=words):
            pipeline.import_weights(params, name, told("x.pth"))
    for _ in range(2):
        pipeline.import_weights(params, "mine", told("x.pth"))
    assert (paths.model("precious") / "discriminator.safetensors").exists()


def test_released_weights_are_plain_tensors_and_the_same_bytes_each_time(project: Path) -> None:
    weights = trained("t4", FORMS["1nfe"])
    for out in (Path("a.pth"), Path("b.pth")):
        export(paths.model("t4"), paths.AUTOENCODER, "released", out)
    assert Path("a.pth").read_bytes() == Path("b.pth").read_bytes()
    loaded = torch.load("a.pth", weights_only=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("kind", "out", "words"),
    [
        ("onnx", "x.onnx", "Found --format onnx, expected one of released"),
        ("released", "x.safetensors", "ends in .pth"),
        ("diffusers", "models", "with other files in it"),
    ],
)
def test_an_export_to_the_wrong_place_is_refused(project: Path, kind: str, out: str, words: str) -> None:
    trained("t4", FORMS["1nfe"])
    with pytest.raises(UserError, match=words):
        export(paths.model("t4"), paths.AUTOENCODER, kind, Path(out))


LOADER = """
import json, sys
sys.modules["afm_pipe"] = None  # importing it would fail
import torch
from diffusers import DiffusionPipeline
out = {}
for folder, steps in json.loads(sys.argv[1]).items():
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    made = pipe(["digit 0", 1, 2, 3, 4], seed=3, num_inference_steps=steps, output_type="latent").images
    picture = pipe([5], seed=0).images[0]
    assert (picture.size, picture.mode) == ((32, 32), "L")
    out[folder] = made.flatten().double().tolist()
json.dump(out, open("latents.json", "w"))
"""


def test_diffusers_loads_an_export_without_this_package_and_draws_the_same_latents(project: Path) -> None:
    for name, config in FORMS.items():
        trained(name, config)
        export(paths.model(name), paths.AUTOENCODER, "diffusers", Path(f"out-{name}"))
    exports = {f"out-{name}": 3 if name == "any" else None for name in FORMS}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(project / "hub"), "HF_MODULES_CACHE": str(project / "code")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOADER, json.dumps(exports)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(Path("latents.json").read_text())
    for name, (folder, steps) in zip(FORMS, exports.items(), strict=True):
        expected = latents(paths.model(name), steps).flatten().double()
        assert (torch.tensor(loaded[folder], dtype=torch.float64) - expected).abs().max() < 1e-5, name


def test_imported_models_are_rows_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    params = make_params()
    write_inputs(params)
    params = params.model_copy(update={"imported": {"outside": told("weights.pth")}})
    write(paths.metrics("outside"), {"fd_classifier_5k": 2.5, "class_accuracy": 0.99, "protocol": {"samples": 5000}})
    config = {"generator_parameters": 7_000_000, "model": FORMS["1nfe"].model_dump() | {"size": "b2"}}
    write(paths.model("outside") / "config.json", config)
    for number, name in enumerate(("grid.png", "interpolation.png", "nearest.png")):
        write_picture(paths.samples("outside") / name, number)
    write_report(params, paths.REPORT, paths.RENDERED)
    rows = (tmp_path / "results" / "rendered" / "runs.md").read_text()
    (row,) = (row for row in rows.splitlines() if row.startswith("| outside |"))
    assert "| b2 |" in row and "| imported |" in row
    assert "outside" in (tmp_path / "results" / "rendered" / "costs.csv").read_text()
    assert "outside" not in (tmp_path / "results" / "report" / "curves.svg").read_text()
    (paths.samples("outside") / "grid.png").unlink()
    with pytest.raises(UserError, match="dvc repro sample-imported@outside"):
        write_report(params, paths.REPORT, paths.RENDERED)


@pytest.mark.parametrize("name", ["t4", "classifier"])
def test_an_imported_models_name_must_be_free(name: str) -> None:
    with pytest.raises(UserError, match=f"expected another name than {name}"):
        load_params(SMOKE, [f"imported.{name}.file=x.pth"])


def test_dvc_has_an_import_a_sample_and_an_evaluate_stage_for_each(tmp_path: Path) -> None:
    raw = yaml.safe_load(SMOKE.read_text()) | {"imported": {"outside": {"file": "weights/x.pth"}}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=tmp_path, check=True)
    listed = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert {"import@outside", "sample-imported@outside", "evaluate-imported@outside"} <= set(listed)


@pytest.mark.slow
def test_a_real_size_makes_the_round(project: Path) -> None:
    config = ModelConfig(size="b2", channels=4, latent_size=32, num_classes=1000)
    torch.save(build_generator(config).state_dict(), "b2.pth")
    assert import_generator(told("b2.pth"), paths.model("b2")) == config
    assert read_json(paths.model("b2") / "config.json")["generator_parameters"] == pytest.approx(130e6, rel=0.01)
