"""The command line as a person meets it."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import typer
from typer.testing import CliRunner

from afm_pipe.cli.app import app
from afm_pipe.params.file import load_params
from afm_pipe.params.profiles import undeclared_note
from afm_pipe.runtime import paths
from afm_pipe.runtime.files import write_json
from tests.conftest import ROOT, SMOKE

COMMANDS = {name: each for name, each in typer.main.get_command(app).commands.items() if not each.hidden}  # type: ignore[attr-defined]
HEAVY = {"torch", "diffusers", "dvc", "matplotlib", "h5py", "numpy", "scipy", "PIL", "cleanfid"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    return lambda *words, **settings: runner.invoke(app, list(words), **settings)


def test_help_imports_nothing_heavy() -> None:
    times = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "afm_pipe", "--help"], capture_output=True, text=True, check=True
    ).stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in times.splitlines()}
    assert "typer" in imported
    assert not imported & HEAVY


def test_help_groups_the_commands(run) -> None:
    text = run("--help").output
    assert all(
        group in text for group in ("Pipeline: data", "Pipeline: runs", "Inspect", "Models", "Params", "Machine")
    )


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_help_of_a_command_has_an_example_that_parses_on_a_line_of_its_own(command: str, run) -> None:
    lines = [line.strip() for line in run(command, "--help").output.splitlines()]
    (example,) = [line.removeprefix("Example: ") for line in lines if line.startswith("Example: ")]
    assert lines[lines.index(f"Example: {example}") - 1] == lines[lines.index(f"Example: {example}") + 1] == ""
    words = shlex.split(example.partition(" > ")[0])
    assert words[:2] == ["afm-pipe", command]
    COMMANDS[command].make_context(command, words[2:], resilient_parsing=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian", "Found no command 'trian', did you mean train? Otherwise see `afm-pipe --help`."),
        (
            "train --sise t4",
            "Found the option --sise, which `afm-pipe train` does not have, did you mean --size? Otherwise see ",
        ),
        ("guide", "Found no RUN, which `afm-pipe guide` needs: see `afm-pipe guide --help`."),
        ("export t4", "Found no --format, which `afm-pipe export` needs: see `afm-pipe export --help`."),
        ("status x", "Found 'x', which `afm-pipe status` does not take: see `afm-pipe status --help`."),
        ("train t4 --set", "Found --set without a value: see `afm-pipe"),
        ("train t4 --dry-run=3", "Found --dry-run with a value, which it does not take: see `afm-pipe"),
        ("sample t4 --count x", "Found a wrong --count: "),
        ("plan t4 --images -5", "Found a wrong --images: "),
        ("plan t4 --micro-batch 0", "Found a wrong --micro-batch: "),
        ("train t4 --micro-batch -3", "Found a wrong --micro-batch: "),
    ],
)
def test_a_wrong_command_line_is_one_line_that_says_what_to_do(words: str, said: str, run) -> None:
    result = run(*words.split(), prog_name="afm-pipe")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {said}") and result.stderr.count("\n") == 1
    assert result.stderr.endswith("--help`.\n")


def test_without_a_command_the_commands_are_shown(run) -> None:
    assert "Pipeline: data" in run().output


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("afm-pipe pro", ["profile"]),
        ("afm-pipe train t4-n", ["t4-no-transport"]),
        ("afm-pipe train --size s", ["s4"]),
        ("afm-pipe tables tr", ["transport"]),
        ("afm-pipe export t4 --format s", ["safetensors"]),
        ("afm-pipe stage", []),  # hidden
    ],
)
def test_completion_offers_commands_and_the_names_in_params(line: str, offered: list[str], run) -> None:
    shutil.copy(SMOKE, "params.yaml")
    env = {"_AFM_PIPE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    assert run(env=env, prog_name="afm-pipe").output.split() == offered


def test_completion_is_installed_and_is_silent_where_params_are_broken(run, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path("home").absolute()
    home.mkdir()
    env = os.environ | {"HOME": str(home), "SHELL": "/bin/bash", "PYTHONPATH": str(ROOT)}
    script = [
        "/bin/bash",
        "-c",
        f"'{sys.executable}' -m afm_pipe --install-completion bash; exit $?",
    ]  # bash stays its parent
    done = subprocess.run(script, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "completion installed" in done.stdout, done.stderr
    assert (home / ".bash_completions" / "afm-pipe.sh").is_file()
    Path("params.yaml").write_text("runs: [")
    asked = {"_AFM_PIPE_COMPLETE": "complete_bash", "COMP_WORDS": "afm-pipe train ", "COMP_CWORD": "2"}
    assert run(env=asked, prog_name="afm-pipe").output.strip() == ""


def test_a_mistake_is_one_line_without_a_stack_trace(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "afm_pipe", "train", "t4"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    expected = f"error: Found no params.yaml in {tmp_path}: run this in the project root, or begin a study here with "
    assert done.stderr == f"{expected}`afm-pipe init`.\n"


def test_dry_run_prints_params_counts_updates_and_memory(run) -> None:
    text = run("train", "--size", "t4", "--dry-run", "--set", "train.batch_size=32", "--params", str(SMOKE)).output
    for part in (
        "batch_size: 32",
        "generator      1,365,440 parameters\n",
        "parameters (assuming 1,000 classes; `afm-pipe prepare` counts them)",
        "updates        0.5 epochs",
        "memory         about 0.",
    ):
        assert part in text


def test_dry_run_counts_the_memory_of_one_process_under_launch_settings(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(*flags: str) -> tuple[float, str]:
        text = run("train", "t4", "--dry-run", "--params", str(SMOKE), *flags).output
        (line,) = [each for each in text.splitlines() if each.startswith("memory")]
        return float(line.split(" weights and optimizers, ")[1].split()[0]), line

    whole, shared = memory(), memory("--nproc-per-node", "2", "--micro-batch", "8")
    assert "processes" not in whole[1]
    assert "(on each of 2 processes, micro-batches of 8)" in shared[1]
    assert shared[0] < 0.5 * whole[0]
    monkeypatch.setenv("AFM_CHECKPOINT_ACTIVATIONS", "1")
    assert memory()[0] < whole[0] and "activations recomputed" in memory()[1]


def test_a_size_without_a_run_goes_through_every_stage_like_a_run(discs: Path, tmp_path: Path, run) -> None:
    shutil.copytree(discs, tmp_path, dirs_exist_ok=True)
    short = ["--size", "t2", "--set", "train.phases=[{until_epoch: 1}]", "--set", "train.batch_size=16"]
    dry = run("train", *short, "--dry-run")
    assert "size: t2" in dry.output and "patch" not in dry.stderr
    assert not Path("work/t2").exists()
    assert "  t2" not in run("status").output
    done = run("train", *short)
    assert done.exit_code == 0, done.output
    assert "t2: not declared in params, a run with the settings of `train`." in done.stderr
    assert re.search(r"^ *t2 +outdated .* trained with other params", run("status").output, re.MULTILINE)
    assert run("sample", "t2", "--count", "2", "--grid", "grid.png").exit_code == 0 and Path("grid.png").is_file()
    assert run("reference").exit_code == 0
    measured = run("evaluate", "t2")
    assert measured.exit_code == 0 and paths.metrics("t2").is_file(), measured.output


def test_a_size_without_a_run_names_runs_of_that_size_and_the_profile_of_the_papers() -> None:
    params = load_params(SMOKE, ["runs.large={size: b2}"])
    assert undeclared_note(params, "b2", ROOT / "profiles").endswith(
        "(declared runs of that size: large). The paper's run of that size is b2 of "
        f"{ROOT / 'profiles' / 'imagenet256.yaml'}: afm-pipe profile imagenet256."
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--size", "xl3"], "runs.xl3.size: found 'xl3', expected 't4', 's4', 't2', 'b2'"),
        (["train", "--size", "t2", "--set", "runs.t2={size: t4}"], "Found the run t2 of size t4: name it as RUN"),
        (["train"], "neither RUN nor --size"),
        (["train", "t4", "--size", "t4"], "both RUN and --size"),
        (["train", "t5", "--dry-run"], "Found no run 't5' in params, expected one of t4, t4-no-transport"),
        (["train", "t4", "--set", "train.lrr=1"], "train.lrr: found an unknown field, did you mean lr?"),
        (["encode"], "Found no models/autoencoder"),
        (["report"], "dvc repro"),
        (["sample", "t4"], "Found no models/t4/config.json"),
    ],
)
def test_mistakes_are_explained(run, words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    result = run(*words, "--params", str(SMOKE))
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_launch_setting_that_is_wrong_is_named(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFM_DEVICE", "warp")
    result = run("train", "t4", "--params", str(SMOKE))
    assert result.exit_code == 1
    assert "Found the device 'warp', which is not usable here" in result.stderr
    Path("launch.toml").write_text("devize = 'cpu'")
    assert "Found launch setting devize" in run("train", "t4", "--params", str(SMOKE)).stderr


def test_a_wrong_flag_is_named_as_one_and_a_wrong_setting_as_one(run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Fix --nproc-per-node." in run("train", "t4", "--nproc-per-node", "0", "--params", str(SMOKE)).stderr
    assert run("plan", "t4", "--images", "-5", "--params", str(SMOKE)).exit_code == 2
    monkeypatch.setenv("AFM_WORKERS", "x")
    assert "FIX  launch settings: Found launch setting workers = 'x'" in run("doctor", "--params", str(SMOKE)).output


def test_doctor_names_what_is_missing_and_the_remedy(run) -> None:
    result = run("doctor", "--params", str(SMOKE))
    assert result.exit_code == 0
    assert result.output.count("ok  ") == len(result.output.splitlines())
    text = SMOKE.read_text().replace("features: [classifier]", "features: [inception_clean]")
    Path("params.yaml").write_text(text.replace("source: mnist5k", "source: folder"))
    result = run("doctor")
    assert result.exit_code == 1
    assert "FIX  data: data/images is missing" in result.output
    assert "FIX  Inception: missing or another file" in result.output
    assert "inception-2015-12-05.pt" in result.output


def test_doctor_compares_the_manifest_with_the_disk(run, discs: Path) -> None:
    shutil.copytree(discs / "data" / "images", "data/images")
    shutil.copy(discs / "data" / "manifest.json", "data/manifest.json")
    shutil.copy(discs / "params.yaml", "params.yaml")
    assert "ok   data: data/manifest.json lists the 60 images" in run("doctor").output
    Path("data/manifest.json").rename("data/whole.json")
    Path("data/manifest.json").write_text("{")
    assert "FIX  data: data/manifest.json does not fit params or the images" in run("doctor").output
    Path("data/whole.json").rename("data/manifest.json")
    shutil.rmtree("data/images")
    result = run("doctor")
    assert result.exit_code == 1
    assert "FIX  data: data/manifest.json does not fit params or the images" in result.output
    assert "60 of 60 images missing under data/images" in " ".join(result.output.split())


def test_doctor_compares_latents_and_reference_with_the_images_and_params(run, discs: Path) -> None:
    shutil.copytree(discs, ".", dirs_exist_ok=True)
    digest = json.loads(Path("data/manifest.json").read_text())["digest"]
    for other, verdict in ((digest, "ok   reference: reference is of the images in"), ("other", "FIX  reference: ")):
        write_json(Path("reference/summary.json"), {"manifest": other})
        assert verdict in run("doctor").output
    assert "ok   latents: data/latents.h5 is of the images in data/manifest.json" in run("doctor").output
    with h5py.File("data/latents.h5", "r+") as file:
        file.attrs["manifest_digest"] = "other"
    assert "FIX  latents: data/latents.h5 is of other images than those in data/manifest.json" in run("doctor").output
    Path("data/latents.h5").write_bytes(b"cut")
    assert "FIX  latents: data/latents.h5 does not fit params" in run("doctor").output
    shutil.rmtree("models")
    assert "Found no models/autoencoder" in run("doctor").output


def test_doctor_tells_which_weights_of_the_evaluation_are_there(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFM_WEIGHTS", ".")
    text = SMOKE.read_text().replace("features: [classifier]", "features: [inception_legacy_tensorflow, dinov2]")
    text = text.replace("adm_reference: null", "adm_reference: {file: adm.npz, sha256: null}")
    Path("params.yaml").write_text(text)
    missing = run("doctor").output
    assert "FIX  ADM's statistics: missing or another file" in missing and "Found no adm.npz" in missing
    assert "FIX  DINOv2: missing or another file" in missing and "Found no dinov2_vitl14.safetensors" in missing
    Path("adm.npz").write_bytes(b"statistics")
    Path("dinov2_vitl14.safetensors").write_bytes(b"weights")
    unknown, sha256 = run("doctor").output, hashlib.sha256(b"weights").hexdigest()
    assert "ok   ADM's statistics: adm.npz" in unknown
    assert "FIX  DINOv2" in unknown and sha256 in unknown
    Path("params.yaml").write_text(text.replace("dinov2_sha256: null", f"dinov2_sha256: {sha256}"))
    assert "ok   DINOv2: dinov2_vitl14.safetensors" in run("doctor").output
