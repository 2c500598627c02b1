"""What a person asks without running a stage: the last results, and what a run or a study would need."""

from typing import TYPE_CHECKING

from afm_pipe.distributed.launch import Launch
from afm_pipe.params import Params
from afm_pipe.pipeline import count_images, named_run, run_budget
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.progress import track

if TYPE_CHECKING:
    from afm_pipe.planning.plan import Machine

IMAGENET_IMAGES = 1_281_167  # of its training set
DAY = 86_400  # seconds
AS_FOR = " (as for 1,000 classes; `afm-pipe prepare` counts those there are)"


def summary(params: Params) -> str:
    """Return the run table of what was measured, for a terminal: without the settings, which the report has."""
    from afm_pipe.reporting.inputs import read_inputs
    from afm_pipe.reporting.tables import run_table
    from afm_pipe.runtime.tables import table_text

    inputs = read_inputs(params)
    table = run_table(inputs)
    shown = {"run", "seconds"}.union(*(record.metrics for record in inputs.runs))
    chosen = [index for index, column in enumerate(table.columns) if column.key in shown]
    rows = [*table.rows, *([table.footer] if table.footer else [])]
    header = [table.columns[index].title for index in chosen]
    return table_text(header, [[row[index].text for index in chosen] for row in rows])


def plan(params: Params, name: str, launch: Launch) -> str:
    """Return what a run would be: its resolved params, its parameters, updates and a rank's memory."""
    import yaml

    from afm_pipe.objectives.schedules import num_updates

    run, needs, manifest = named_run(params, name), run_budget(params, name, launch), count_images(params)
    if manifest is not None:
        count = num_updates(run, manifest.num_images)
        updates = f"{count} of G and of D, {run.batch_size} images each, on {manifest.num_images} images"
    else:
        updates = f"{run.phases[-1].until_epoch:g} epochs; `afm-pipe prepare` counts the images of one"
    return (
        yaml.safe_dump({name: run.model_dump(mode="json")}, sort_keys=False)
        + f"\ngenerator      {needs.generator_parameters:,} parameters{'' if manifest else AS_FOR}"
        + f"\ndiscriminator  {needs.discriminator_parameters:,} parameters"
        + f"\nupdates        {updates}"
        + f"\nmemory         about {needs.memory_bytes / 2**30:.1f} GiB: {needs.state_bytes / 2**30:.2f} weights and "
        + f"optimizers, {needs.activation_bytes / 2**30:.2f} activations, the rest torch itself{_settings(launch)}"
        + f"\ncheckpoint     {needs.checkpoint_bytes / 2**30:.2f} GiB on disk, {launch.keep_checkpoints} are kept"
    )


def _settings(launch: Launch) -> str:
    """Name the launch settings that memory depends on, where they are not those of one process."""
    found = [f"on each of {launch.ranks} ranks"] if launch.ranks > 1 else []
    if launch.micro_batch is not None:
        found.append(f"{launch.micro_batch} images at a time")
    found += ["activations computed again"] * launch.checkpoint_activations + ["sharded"] * launch.shard
    return f" ({', '.join(found)})" if found else ""


def plan_study(params: Params, names: list[str], machine: "Machine", num_images: int | None) -> str:
    """Return what models need on a machine, of so many images; else of those there are, else of ImageNet's."""
    from afm_pipe.planning.plan import plan_text

    manifest = count_images(params)
    classes = len(manifest.classes) if manifest and num_images is None else 1000
    count = num_images or (manifest.num_images if manifest else IMAGENET_IMAGES)
    return track("plan", plan_text(params, names, machine, count, classes)) + ("" if manifest else f"\nIt is{AS_FOR}.")


def watch(params: Params, seconds: float) -> None:
    """Write a page of what is training now, again and again, until Ctrl-C."""
    from afm_pipe.reporting.watch import PAGE, watch

    if not 1 <= seconds <= DAY:
        raise UserError(f"Found --every {seconds:g}, expected 1 to {DAY:,} seconds.")
    print(f"Open {PAGE.resolve()} in a browser; Ctrl-C ends.", flush=True)
    try:
        watch(params, seconds)
    except KeyboardInterrupt:
        print("Watching ended; training was not touched.")
