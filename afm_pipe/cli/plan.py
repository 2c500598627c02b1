"""The text of `afm-pipe train RUN --dry-run` and of `afm-pipe plan`."""

from typing import TYPE_CHECKING

from afm_pipe.distributed.launch import Launch
from afm_pipe.params import Params
from afm_pipe.pipeline import count_images, require_memory, run_budget
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import track

if TYPE_CHECKING:
    from afm_pipe.planning.plan import Machine
    from afm_pipe.study.trials import Trial

WORKLESS = (  # fields of a run that do not change the work of an update
    *("seed", "lr", "betas", "eps", "weight_decay", "ema", "logit_centering", "label_noise", "transport"),
    *("keep_discriminators", "schedule", "phases", "selection", "monitor"),
)
ASSUMED = " (assuming 1,000 classes; `afm-pipe prepare` counts them)"


def dry_run_text(params: Params, name: str, launch: Launch) -> str:
    """Return a run's resolved params, its number of parameters and updates, and the memory of one process.

    Raises UserError for images that a later stage cannot work with.
    """
    from afm_pipe.objectives.schedules import num_updates
    from afm_pipe.params.yaml import dump_yaml
    from afm_pipe.planning.measurable import require_measurable

    run, needs, manifest = params.model(name), run_budget(params, name, launch), count_images(params)
    lines: list[str] = []
    if manifest is not None:
        lines = require_measurable(params, manifest)
        count = num_updates(run, manifest.num_images)
        updates = f"{count} of G and of D, {run.batch_size} images each, on {manifest.num_images} images"
    else:
        updates = f"{run.phases[-1].until_epoch:g} epochs; `afm-pipe prepare` counts the images of an epoch"
    try:
        require_memory(params, name, launch, launch.torch_device())
    except UserError as error:
        lines.append(f"! {error}")
    return (
        dump_yaml({name: run.model_dump(mode="json")})
        + "".join(f"\n{network:13}  {count:,} parameters" for network, count in needs.parameters.items())
        + ("" if manifest else ASSUMED)
        + f"\nupdates        {updates}"
        + f"\nmemory         about {needs.memory_bytes / 2**30:.1f} GiB: {needs.state_bytes / 2**30:.2f} weights and "
        + f"optimizers, {needs.activation_bytes / 2**30:.2f} activations, the rest PyTorch itself{_settings(launch)}"
        + f"\ncheckpoint     {needs.checkpoint_bytes / 2**30:.2f} GiB on disk, {launch.keep_checkpoints} are kept"
        + "".join(f"\n{line}" for line in lines)
    )


def _settings(launch: Launch) -> str:
    """Return the launch settings that change memory, if not the defaults."""
    found = [f"on each of {launch.world_size} processes"] if launch.world_size > 1 else []
    if launch.micro_batch is not None:
        found.append(f"micro-batches of {launch.micro_batch}")
    found += ["activations recomputed"] * launch.checkpoint_activations + ["sharded"] * launch.shard
    return f" ({', '.join(found)})" if found else ""


def plan_text(
    params: Params, names: list[str], machine: "Machine", num_images: int | None, launch: Launch | None = None
) -> str:
    """Estimate runs on a machine for `num_images`, else for the prepared data set, else for ImageNet.

    With `launch`, the rate of the first run is measured on this machine, and all are planned with it.
    Raises UserError for a machine that cannot be planned for.
    """
    from afm_pipe.planning import plan

    plan.check_machine(machine)
    manifest = count_images(params)
    classes = len(manifest.classes) if manifest and num_images is None else 1000
    count = num_images or (manifest.num_images if manifest else plan.IMAGENET_IMAGES)
    measured = ""
    if launch is not None:
        from afm_pipe.planning.measuring import measured_flops
        from afm_pipe.training.engine import Engine

        name = (names or list(params.models))[0]
        share = -(-params.model(name).batch_size // machine.gpus)
        each, device = min(machine.micro_batch or share, share), launch.torch_device()
        engine = Engine.of(launch)._replace(checkpoint_activations=machine.checkpoint_activations, shard=False)
        engine = engine._replace(capture=launch.capture and machine.gpus == 1)
        flops = measured_flops(params, name, classes, each, device, engine)
        machine = machine._replace(utilization=flops / machine.peak, least_utilization=None)
        measured = (
            f"Measured on {device}: {name} with {each} images at {flops / 1e12:.3g} TFLOP/s, here for every run.\n"
        )
    text = measured + track("plan", plan.plan_text(params, names, machine, count, classes))
    return text if manifest else f"{text}\nEstimated{ASSUMED}."


def trials_text(params: Params, names: list[str]) -> str:
    """Return the trials of some tables, by default all, with state and work, and the cost of the missing ones."""
    from afm_pipe.data.latents_format import read_provenance
    from afm_pipe.models.model_files import run_config
    from afm_pipe.planning.counting import measure
    from afm_pipe.runtime import paths
    from afm_pipe.runtime.files import read_json
    from afm_pipe.runtime.tables import table_text
    from afm_pipe.study.runner import trial_jobs
    from afm_pipe.study.trials import Trial, Trials

    num_images = int(read_provenance(paths.LATENTS)["image_count"])
    manifest = count_images(params)

    def tflop(trial: Trial) -> tuple[int, float]:
        """Return the updates of a trial and their work, without that of guidance and probes."""
        run = trial.run.model_copy(update={field: getattr(params.train, field) for field in WORKLESS})
        config = run_config(run, params.latent_shape, len(manifest.classes) if manifest else 1000)
        updates = max(trial.probes(num_images)) - trial.first_update(num_images)
        return updates, updates * measure(run, config, run.batch_size).flops / 1e12

    trials = Trials(params, names)
    groups = [job.group for job in trial_jobs(trials.all)]
    places = {trial.measurement: f"{name}: {trial.spec.place}" for name, of in trials.by_table.items() for trial in of}
    rows, left, seconds, spent = [], 0.0, 0.0, 0.0
    for trial in trials.all:
        if trial.result.is_file():
            cost, work = read_json(trial.result)["cost"], tflop(trial)[1]
            if cost["seconds"]:
                seconds, spent = seconds + cost["seconds"], spent + work
            rows.append([places[trial.measurement], trial.training, "measured", f"{cost['updates']:,}", f"{work:.3g}"])
    for group in groups:
        updates, work = tflop(group[0])
        left += work
        for trial in group:
            what = places.get(trial.measurement) or f"base of others: {trial.spec.place}"
            rows.append([what, trial.training, _trial_state(trial), f"{updates:,}", f"{work:.3g}"])
    text = table_text(["trial", "identity", "state", "updates", "TFLOP"], rows)
    line = f"{len(groups)} training runs missing: {left:.3g} TFLOP"
    if spent:
        line += f", about {left * seconds / spent / 3600:.2g} h on one worker at the speed of the measured ones"
    return f"{text}\n{line}."


def _trial_state(trial: "Trial") -> str:
    from afm_pipe.runtime.lease import holder_of
    from afm_pipe.study.runner import TRAINED

    if holder := holder_of(trial.folder):
        return f"in training by {holder}"
    if (trial.folder / TRAINED).is_file():
        return "trained, not measured"
    if (trial.folder / "curves.csv").is_file():
        return "started"
    base = trial.base is not None and not (trial.base.folder / TRAINED).is_file()
    return "waits for its base" if base else "not begun"
