"""The text of `afm-pipe train RUN --dry-run` and of `afm-pipe plan`."""

from typing import TYPE_CHECKING

from afm_pipe.distributed.launch import Launch
from afm_pipe.params import Params
from afm_pipe.pipeline import count_images, require_memory, run_budget
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import track

if TYPE_CHECKING:
    from afm_pipe.planning.plan import Machine

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
    """
    from afm_pipe.planning import plan

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
        flops = measured_flops(params, name, classes, each, device, engine)
        machine = machine._replace(utilization=flops / machine.peak, least_utilization=None)
        measured = (
            f"Measured on {device}: {name} with {each} images at {flops / 1e12:.3g} TFLOP/s, here for every run.\n"
        )
    text = measured + track("plan", plan.plan_text(params, names, machine, count, classes))
    return text if manifest else f"{text}\nEstimated{ASSUMED}."
