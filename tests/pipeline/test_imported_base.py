"""Imported weights of SiT that another objective continues: from these weights, to its end, over an interruption."""

import shutil
from collections.abc import Callable, Generator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from afm_pipe import pipeline
from afm_pipe.cli.why import why
from afm_pipe.distributed.launch import Launch
from afm_pipe.models.generator import Generator as GeneratorNetwork
from afm_pipe.models.sit import to_sit
from afm_pipe.models.velocity import VelocityNetwork
from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.params.sizes import SIZES
from afm_pipe.pipeline.current import train_step
from afm_pipe.pipeline.pool import pooled_runs
from afm_pipe.planning.plan import Machine, plan_run
from afm_pipe.reporting.status import all_statuses, run_status
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import read_json, write_json
from afm_pipe.runtime.progress import Progress
from afm_pipe.runtime.signals import Stopped

LAUNCH = Launch(device="cpu", checkpoint_seconds=0)
UPDATES = 15  # two epochs of 60 images in batches of 8
SAMPLING = "{solver: euler, steps: 2, guidance_scale: 1.5, guidance_interval: [0.0, 1.0]}"
FLOW = f"flow: {{times: uniform, label_dropout: 0.1, warmup: 2, sampling: {SAMPLING}}}"
RUN = f"objective: continuous_adversarial_flow, weight_decay: 0.0, discriminator_updates: 2, {FLOW}"
IMPORTED = "imported={sit: {file: sit.pt, classes: classes.txt}}"
DECLARED = (IMPORTED, f"guided={{post: {{from: sit, until_epoch: 2, run: {{{RUN}}}}}}}", "tables={}")


def write_sit(seed: int = 0, size: str = "t4", labels: int = 4) -> None:
    """Write weights with SiT's tensors for three classes and the label of no class."""
    random = torch.Generator().manual_seed(seed)
    fresh = to_sit(VelocityNetwork(SIZES[size], 4, 8, labels).state_dict())
    weights = {name: 0.1 * torch.randn(tensor.shape, generator=random) for name, tensor in fresh.items()}
    torch.save({"ema": weights | {"pos_embed": fresh["pos_embed"]}}, "sit.pt")


@pytest.fixture(scope="module")
def imported(discs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project on the discs with imported weights."""
    project = tmp_path_factory.mktemp("sit") / "project"
    shutil.copytree(discs, project)
    with chdir(project):
        write_sit()
        Path("classes.txt").write_text("class0\nclass1\nclass2\n")
        pipeline.import_weights(load_params(overrides=DECLARED), "sit")
    return project


@pytest.fixture
def params(imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    shutil.copytree(imported, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return load_params(overrides=DECLARED)


def weights(name: str, network: str = "generator") -> dict[str, Tensor]:
    return load_file(paths.model(name) / f"{network}.safetensors")


def test_networks_begin_with_the_imported_weights(params: Params) -> None:
    # Steps too small to change a float32: what the run writes is what it began with.
    pipeline.guide(load_params(overrides=[*DECLARED, "guided.post.run.lr=1.0e-30"]), "post", LAUNCH)
    sit, generator, discriminator = weights("sit"), weights("post"), weights("post", "discriminator")
    assert all(torch.equal(generator[name], tensor) for name, tensor in sit.items())
    shared = discriminator.keys() & sit.keys()
    assert len(shared) == len(discriminator) - 2, "all but the token and the head"
    assert all(torch.equal(discriminator[name], sit[name]) for name in shared)


def test_it_trains_from_update_0_is_sampled_and_counts_as_finished(params: Params) -> None:
    assert run_status(params, "post").state == "not begun"
    pipeline.guide(params, "post", LAUNCH)
    config = read_json(paths.model("post") / "config.json")
    assert (config["updates"], read_json(paths.costs("post"))["updates"]) == (UPDATES, UPDATES)
    assert len(config["provenance"]["generator"]) == 64 and "discriminator" not in config["provenance"]
    before, after = weights("sit"), weights("post")
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert len(moved) > 30 and all(tensor.isfinite().all() for tensor in after.values())
    pipeline.sample(params, "post", LAUNCH)
    assert (paths.samples("post") / "grid.png").is_file()
    assert run_status(params, "post").state == "finished" and why(params, "post")[1] == 0
    assert train_step(params, "post").is_current


def test_other_weights_are_another_run(params: Params) -> None:
    pipeline.guide(params, "post", LAUNCH)
    write_sit(seed=1)
    pipeline.import_weights(params, "sit")
    assert run_status(params, "post").state == "outdated"
    before = weights("post")
    pipeline.guide(params, "post", LAUNCH)
    assert not torch.equal(weights("post")["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])


def test_an_interrupted_run_resumes_to_the_same_bits(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.guide(params, "post", LAUNCH)
    expected = {name: path.read_bytes() for name, path in outputs()}
    for path in (paths.model("post"), paths.WORK):
        shutil.rmtree(path)

    def stop(_: str, work: Generator[Progress, None, Any]) -> None:
        while next(work).done < 10:
            pass
        work.throw(Stopped(15))

    with monkeypatch.context() as patch:
        patch.setattr("afm_pipe.pipeline.training.track", stop)
        with pytest.raises(Stopped):
            pipeline.guide(params, "post", LAUNCH)
    assert run_status(params, "post").state == "stopped"
    pipeline.guide(params, "post", LAUNCH)
    assert {name: path.read_bytes() for name, path in outputs()} == expected


def outputs() -> list[tuple[str, Path]]:
    return [(path.name, path) for path in sorted(paths.model("post").glob("*.safetensors"))]


def test_flow_matching_continues_imported_weights_too(params: Params) -> None:
    pipeline.guide(load_params(overrides=[*DECLARED, "guided.post.run.objective=flow_matching"]), "post", LAUNCH)
    assert not (paths.model("post") / "discriminator.safetensors").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["guided.post.run.size=t2"], "Found models/sit with size t4, expected t2 .* set size in guided.post.run"),
        (["guided.post.run.qk_norm=true"], "Found models/sit with qk_norm False, expected True"),
        (
            ["guided.post.run.flow.label_dropout=0.0", "guided.post.run.flow.sampling.guidance_scale=1.0"],
            "Found models/sit with labels 4, expected 3 .*: set flow.label_dropout above 0",
        ),
    ],
)
def test_settings_of_another_network_are_refused_before_training(
    params: Params, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.guide(load_params(overrides=[*DECLARED, *overrides]), "post", LAUNCH)
    assert not paths.WORK.joinpath("post").exists()


def edit_config(**changes: Any) -> None:
    path = paths.model("sit") / "config.json"
    described = read_json(path)
    write_json(path, described | changes | {"model": described["model"] | changes.get("model", {})})


def import_one_step_generator() -> None:
    torch.save(GeneratorNetwork(SIZES["t4"], 4, 8, 3, times="none").state_dict(), "sit.pt")
    pipeline.import_weights(load_params(overrides=DECLARED), "sit")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: shutil.rmtree(paths.model("sit")), "Found no models/sit/config.json"),
        (lambda: edit_config(scaling_factor=0.18215), "scaling factor 0.18215, expected .* the autoencoder of these"),
        (lambda: edit_config(model={"latent_size": 32}), r"latents \(4, 32, 32\), expected \(4, 8, 8\)"),
        (lambda: edit_config(classes=["class0", "class2", "class1"]), "the same names in another order"),
        (
            import_one_step_generator,
            "1 step, direct form.*expected the velocity of an ODE for guided.post, such as SiT",
        ),
    ],
    ids=["no import", "scaling factor", "latents", "classes", "one-step generator"],
)
def test_other_weights_than_params_describe_are_refused_before_training(
    params: Params, change: Callable[[], None], message: str
) -> None:
    change()
    with pytest.raises(UserError, match=message):
        pipeline.guide(params, "post", LAUNCH)
    assert not paths.WORK.joinpath("post").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["guided.post={from: sit, until_epoch: 2}"], "since sit is imported and has no discriminator .* found none"),
        (["guided.post.run.objective=adversarial_flow"], r"guided.post.run.objective: .* found adversarial_flow"),
        (["guided.post.run.objective=[]"], "guided.post.run.objective: expected continuous_adversarial_flow or flow"),
        (["guided.post.reload_discriminator=1.0"], "expected reload_discriminator to be an epoch before"),
        (["guided.post.guidance={scale: 0.1, t: [0.0, 0.1]}"], "expected no guidance or augment"),
        (["guided.post.run.flow=null"], "expected a section `flow`"),
        (["guided.post.run.size=t3"], "guided.post.run: size"),
        (["guided.post.from=sut"], r"expected a run or imported model \(t4, .*, sit\), found sut"),
        (
            ["tables={x: {title: X, question: X, paper: null, base: {}, columns: null, seeds: [0], checks: [], "
             "rows: {title: Run, settings: {post: {run: post}}}}}"],
            r"expected one of t4, .*, found 'post'; of guided runs, those that continue the last weights",
        ),
    ],
)  # fmt: skip
def test_params_that_imported_weights_cannot_follow_are_refused(
    params: Params, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_params(overrides=[*DECLARED, *overrides])


def test_status_plan_and_pool_know_that_it_waits_for_the_import(params: Params) -> None:
    assert plan_run(params, "post", 60, 3, Machine("h100", 1, 0.4, "tf32")).updates == UPDATES
    assert "post" not in pooled_runs(params) and "t4" in pooled_runs(params)
    shutil.rmtree(paths.model("sit"))
    status = {each.name: each for each in all_statuses(params)}["post"]
    assert (status.state, status.note) == ("waiting", "for sit, which is not imported")
    assert "dvc repro guide@post" in why(params, "post")[0]
