"""What every later stage needs of the images, checked before the first of them runs."""

import numpy as np

from afm_pipe.data.manifest import Manifest
from afm_pipe.objectives.schedules import num_updates
from afm_pipe.params import Params
from afm_pipe.runtime.errors import UserError

LEAST = 4  # images, and samples: precision and recall look at third nearest neighbors
FEW = 10  # images of a class, below which its measures are rough
FEW_UPDATES = 200  # a choice: 20 updates of the default's s4 draw blobs, its 563 digits


def require_measurable(params: Params, manifest: Manifest, held_out: Manifest | None = None) -> list[str]:
    """Return a line for each thing that few images, or few held-out ones, leave unmeasured, or measure roughly.

    Raises UserError naming everything without which the reference, evaluations or tables would fail later.
    """
    num_classes, shares = len(manifest.classes), params.reference.class_shares
    counts = np.bincount(manifest.labels, minlength=num_classes)
    least = int(counts.min())
    distinct = np.bincount([label for label, _ in {*zip(manifest.labels.tolist(), manifest.sha256, strict=True)}])
    in_statistics = num_classes * least if shares == "equal" else manifest.num_images
    missing = []
    if manifest.num_images < LEAST:
        missing.append(f"{manifest.num_images} images, expected at least {LEAST}: add images")
    if distinct.max() < 2:
        missing.append(
            f"no class with two different images among {manifest.num_images} images of {num_classes} classes, without "
            "which no variance within a class is known: add images to a class, or merge classes"
        )
    elif shares == "equal" and (least < 2 or in_statistics < LEAST):
        smallest = manifest.classes[int(counts.argmin())]
        missing.append(
            f"{least} images of class {smallest!r}, and so of each class in statistics of equal shares, expected at "
            "least 2: add images to it, or set reference.class_shares to data"
        )
    needs = [("evaluate.samples", params.evaluate.samples, 2 * num_classes)]
    needs += [("study.samples", params.study.samples, 2 * num_classes)] if params.tables else []
    needs += [("reference.thumbnails", params.reference.thumbnails, max(num_classes + 1, 3))]
    missing += [
        f"{key} {found} for {num_classes} classes, expected at least {expected}: raise it"
        for key, found, expected in needs
        if found < expected
    ]
    if missing:
        raise UserError("Found what later stages cannot work with:\n  " + "\n  ".join(f"{each}." for each in missing))
    lines = []
    single, few = int((counts == 1).sum()), int((counts < FEW).sum())
    if single:
        lines.append(f"Not measured: accuracy on held-out images and variance of {single} classes of one image.")
    if few > single:
        lines.append(f"Measured roughly: variance and accuracy of {few - single} classes of fewer than {FEW} images.")
    if in_statistics < manifest.num_images / 2:
        lines.append(f"Statistics in equal class shares are of {in_statistics} of {manifest.num_images} images.")
    if held_out is not None:
        # As labels_in_shares, which needs torch: the class with the fewest held-out images for its share ends it.
        shares_of = counts if shares == "data" else np.ones(num_classes)
        kept = np.bincount(held_out.labels, minlength=num_classes) / (shares_of / shares_of.sum())
        reached = int(kept.min())
        if reached < params.evaluate.samples:
            lines.append(
                f"Held-out images reach for about {reached} samples in the reference's class shares, fewer than "
                f"evaluate.samples {params.evaluate.samples}: samples are compared with them at that number."
            )
    probed = params.train.monitor.probe.samples
    seen = max(probed // max(probed // num_classes, 2), 1)
    if seen < num_classes and params.train.monitor.policy != "off":
        lines.append(
            f"The monitor's probe sees {seen} of {num_classes} classes (train.monitor.probe.samples {probed})."
        )
    updates = {name: num_updates(run, manifest.num_images) for name, run in params.runs.items()}
    if few_of := ", ".join(f"{count} of {name}" for name, count in updates.items() if count < FEW_UPDATES):
        lines.append(
            f"Few updates: {few_of}, since an epoch has {manifest.num_images} images. To see more than blobs, raise "
            "until_epoch of the phases, and transport.decay_epochs with them."
        )
    return lines
