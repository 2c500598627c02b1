"""Where each file of the pipeline lives, relative to the project's root: the contracts between the rooms."""

from pathlib import Path

PARAMS = Path("params.yaml")
PROFILES = Path("profiles")  # whole params files
SCHEMA = Path("params.schema.json")  # of all of them, for editors
MANIFEST = Path("data/manifest.json")  # which images there are: written by prepare
LATENTS = Path("data/latents.h5")  # their latent moments: written by encode
AUTOENCODER = Path("models/autoencoder")  # a diffusers AutoencoderKL folder
AUTOENCODER_WEIGHTS = AUTOENCODER / "diffusion_pytorch_model.safetensors"  # whose sha256 is its identity
CLASSIFIER = Path("models/classifier")  # guides G: written by classifier
REFERENCE = Path("reference")  # statistics of the real images, the default's feature network, pictures
WORK = Path("work")  # unfinished work: git-ignored and unknown to DVC
TRIALS = WORK / "trials"  # every trial of the study, by fingerprint
RESULTS = Path("results")  # all that the pipeline measured
TOY = RESULTS / "toy"  # the 1-D toy experiment: results.json, its maps as CSV, its figures
STUDY = RESULTS / "study"  # the larger study's tables, kept in git
REPORT = RESULTS / "report"  # the page
RENDERED = RESULTS / "rendered"  # the tables as CSV, Markdown and LaTeX
BENCHMARKS = Path("benchmarks/results.json")  # how fast the project is beside plain code: written by `make bench`


def model(run: str) -> Path:
    """Folder of a trained run: EMA generator, discriminator, config.json."""
    return Path("models") / run


def samples(run: str) -> Path:
    """Folder of a run's pictures: grid.png and interpolation.png by sample, nearest.png by evaluate."""
    return Path("samples") / run


def metrics(run: str) -> Path:
    """What evaluation measured of a run, with its protocol."""
    return RESULTS / "metrics" / f"{run}.json"


def curves(run: str) -> Path:
    """Training curves of a run: one row per logged update."""
    return RESULTS / "curves" / f"{run}.csv"


def events(run: str) -> Path:
    """What happened while a run was trained: one JSON object a line."""
    return RESULTS / "events" / f"{run}.jsonl"


def table(name: str) -> Path:
    """A table of the study: its trials and their results."""
    return RESULTS / "tables" / f"{name}.json"


def costs(run: str) -> Path:
    """What training a run cost on the machine it ran on."""
    return RESULTS / "costs" / f"{run}.json"
