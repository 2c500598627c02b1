"""Import of released or other weights: a file of tensors becomes a model folder like that of a trained run.

The tensors determine size, latent shape, number of classes and time embeddings. They do not distinguish a generator of
two or four steps from one whose blocks run two or four times (paper section 3); the user says which, and the file name
only serves as a hint. No code in the file runs: only plain tensors are read.
"""

import hashlib
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from afm_pipe.data.classes import imagenet_names
from afm_pipe.data.listing import first_of
from afm_pipe.models.containers import find_weights
from afm_pipe.models.model_files import (
    ModelConfig,
    VelocityConfig,
    build_generator,
    count_parameters,
    mismatches,
    save_tensors,
)
from afm_pipe.models.sit import from_sit, is_sit
from afm_pipe.models.tensor_files import (
    ADVICE,
    check_file,
    check_pickled,
    check_plain,
    check_safetensors,
    inert_classes,
)
from afm_pipe.params import Imported
from afm_pipe.params.sizes import SIZES
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path, read_text, sha256_file, write_json

PICKLED, SAFE, INDEX = (".pth", ".pt", ".bin", ".ckpt"), ".safetensors", ".json"
MAX_NAMES_BYTES = 16 << 20  # of a file of class names, or of an index
METADATA = "afm_pipe"  # key in the metadata of an exported safetensors file
SD_VAE_LATENT, SD_VAE_FACTOR = (4, 32, 32), 0.18215  # the latents of all released generators
SIT_SAMPLING = {  # of official weights, if params do not say; guidance needs sampling.guidance_scale
    "solver": "euler",
    "steps": 250,
    "guidance_scale": 1.0,
    "guidance_interval": [0.0, 1.0],
    "unconditional": True,
}
KEY_TENSORS = {"x_embedder.proj.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2}  # name: dimensions
OTHER_NETWORKS = {"dis_embed": "a discriminator", "cls_embed": "a classifier"}


class WeightsFile(NamedTuple):
    """Tensors of a file, the entry they come from, and metadata (safetensors only)."""

    tensors: dict[str, Tensor]
    entry: str
    metadata: dict[str, Any]


class Traits(NamedTuple):
    """Properties that tensors do not determine: number of steps, form, and repeats of the blocks."""

    nfe: int | Literal["any"]
    form: Literal["direct", "residual"]
    repeats: int


def import_generator(settings: Imported, folder: Path) -> ModelConfig:
    """Write the model folder of an imported generator and return its config.

    Raises UserError if the file holds more than tensors, if the tensors are not those of a generator, or if they are
    ambiguous and `settings` do not resolve that.
    """
    path = paths.local(settings.file)
    if path.is_dir():
        inside = sorted(each.name for each in path.iterdir() if each.suffix in (*PICKLED, SAFE))
        raise UserError(
            f"Found the folder {path}, expected a file of weights: name one of those in it, {first_of(inside)}."
            if inside
            else f"Found the folder {path} without weights ({', '.join((*PICKLED, SAFE))}), expected a file of them."
        )
    if not path.is_file():
        raise UserError(f"Found no file {path}, expected weights ({', '.join((*PICKLED, SAFE))}): check the path.")
    check_file(path)
    sha256 = _hash(path)
    if settings.sha256 not in (None, sha256):
        raise UserError(f"Found {path} with sha256 {sha256}, expected {settings.sha256}: use the right file.")
    contents = read_tensors(path, settings.key)
    config = infer_config(contents, path, settings)
    if is_sit(contents.tensors):
        contents = contents._replace(tensors=from_sit(contents.tensors))
    _check_values(contents.tensors, path)
    factor = SD_VAE_FACTOR if config.latent_shape == SD_VAE_LATENT else contents.metadata.get("scaling_factor")
    names, named_by = _class_names(settings, contents, config)
    with torch.device("meta"):
        parameters = count_parameters(build_generator(config))
    description = {
        "model": config.model_dump(),
        "name": folder.name,
        "classes": names,
        "scaling_factor": factor,
        "provenance": {
            "imported": {"file": path.name, "sha256": sha256, "entry": contents.entry, "told": _given_traits(settings)}
            | {"classes_named_by": named_by}
        },
        "updates": None,
        "images_seen": None,
        "generator_parameters": parameters,
    }
    with atomic_path(folder) as temp:
        temp.mkdir()
        save_tensors(temp / "generator.safetensors", {k: tensor.float() for k, tensor in contents.tensors.items()})
        write_json(temp / "config.json", description)
    return config


def read_tensors(path: Path, key: str | None = None) -> WeightsFile:
    """Read the generator's tensors in a file without running code in it.

    Those under `key`, else the EMA, else the only ones (see `containers`). The path of a sharded file is its index.
    Raises UserError if the file is damaged, or holds something that could run or no single generator.
    """
    if path.suffix == SAFE:
        held, metadata = _read_safetensors(path)
    elif path.suffix == INDEX:
        metadata, held = {}, {}
        for shard in shards(path):
            held |= _read_safetensors(shard)[0] if shard.suffix == SAFE else _read_pickled(shard)
    else:
        metadata, held = {}, _read_pickled(path)
    found = find_weights(held, path, key)
    check_plain(found.tensors, path)
    return WeightsFile(found.tensors, str(found), metadata)


def infer_config(contents: WeightsFile, path: Path, settings: Imported) -> ModelConfig:
    """Infer the config of a generator from its tensors, completed by `settings` or the file's metadata.

    Raises UserError naming missing, unexpected or misshapen tensors, a setting that is missing, or one that the tensors
    contradict.
    """
    tensors, sit = contents.tensors, is_sit(contents.tensors)
    tensors = from_sit(tensors) if sit else tensors
    shapes = _key_shapes(tensors, path)
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    size = _size(tensors, width, patch, path)
    side = math.isqrt(shapes["pos_embed"][1])
    if side**2 != shapes["pos_embed"][1]:
        raise UserError(f"Found {path} with pos_embed of {shapes['pos_embed'][1]} positions, expected a square number.")
    labels = shapes["y_embedder.embedding_table.weight"][0]
    described = {
        "size": size,
        "channels": channels,
        "latent_size": side * patch,
        "num_classes": labels,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
    }
    velocity = _velocity(settings, contents.metadata, sit)
    if velocity is None:
        described |= _traits(tensors, path, settings, contents.metadata, size)._asdict()
    else:
        described |= {"num_classes": labels - velocity.unconditional, "velocity": velocity, "nfe": velocity.passes()}
    try:
        config = ModelConfig.model_validate(described)
    except ValidationError:
        raise UserError(f"Found {path} with invalid metadata ({contents.metadata}): give nfe or repeats.") from None
    with torch.device("meta"):
        problems = mismatches(build_generator(config), tensors)
    if problems:
        raise UserError(
            f"Found {path}, which resembles a generator of size {size} but differs: {'; '.join(problems[:8])}"
            f"{f' and {len(problems) - 8} more' if len(problems) > 8 else ''}. Use a complete generator's state dict."
        )
    return config


def describe(config: ModelConfig) -> str:
    """Return a one-line description of a generator."""
    steps = "any number of steps" if config.nfe == "any" else f"{config.nfe} step{'s' * (config.nfe != 1)}"
    form = f"{config.form} form"
    if config.velocity is not None:
        steps, form = (
            f"{config.velocity.steps} {config.velocity.solver.capitalize()} steps by default",
            "velocity of an ODE",
        )
    depth = SIZES[config.size].depth
    runs = f", {depth} blocks run {config.repeats} times ({depth * config.repeats} layers)" * (config.repeats > 1)
    latent = " x ".join(map(str, config.latent_shape))
    return f"{config.size}, {steps}, {form}{runs}, {config.num_classes:,} classes, latents {latent}"


def shards(path: Path) -> list[Path]:
    """Return the files of an index, sorted. Raises UserError for an index that names none, or files elsewhere."""
    try:
        names = sorted(set(json.loads(read_text(path, MAX_NAMES_BYTES))["weight_map"].values()))
        sound = bool(names) and all(re.fullmatch(r"\w[\w.-]*\.(safetensors|bin)", name) for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names, sound = [], False
    missing = [name for name in names if sound and not (path.parent / name).is_file()]
    if missing or not sound:
        what = f"without its file {missing[0]}" if missing else "which is not an index of weights"
        raise UserError(f"Found {path} {what}, expected a weight_map to .safetensors or .bin files beside it.")
    return [path.parent / name for name in names]


def _read_pickled(path: Path) -> Any:
    if path.suffix not in PICKLED:
        raise UserError(f"Found {path}, expected a file ending in {', '.join((*PICKLED, SAFE, INDEX))}.")
    check_pickled(path)
    try:
        with torch.serialization.safe_globals([*inert_classes(path)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"Found {path} holding more than tensors and settings ({_reason(error)}), expected only these. {ADVICE}"
        ) from None
    except Exception as error:  # the unpickler raises almost anything for damaged or hostile bytes
        raise UserError(f"Found {path} unreadable as a tensor file ({_reason(error)}): download it again.") from None


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and this package's metadata."""
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            return tensors, metadata if isinstance(metadata, dict) else {}
    except Exception as error:  # an unknown dtype is a KeyError, deep metadata a RecursionError
        raise UserError(f"Found {path} unreadable as safetensors ({_reason(error)}): download it again.") from None


def _key_shapes(tensors: dict[str, Tensor], path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that determine all other shapes."""
    wrong = [f"no {name}" for name in KEY_TENSORS if name not in tensors]
    wrong += [
        f"{name} of shape {tuple(tensors[name].shape)}"
        for name, dimensions in KEY_TENSORS.items()
        if name in tensors and (tensors[name].dim() != dimensions or 0 in tensors[name].shape)
    ]
    other = next((kind for name, kind in OTHER_NETWORKS.items() if name in tensors), "")
    if other or wrong:
        looks = f"which looks like {other}" if other else f"with {', '.join(wrong)}"
        raise UserError(
            f"Found {path} {looks}, expected a generator with the released names; its first tensors of {len(tensors)} "
            f"are {', '.join(sorted(tensors)[:4])}."
        )
    return {name: tuple(tensors[name].shape) for name in KEY_TENSORS}


def _size(tensors: dict[str, Tensor], width: int, patch: int, path: Path) -> str:
    """Return the size with this width and patch and the nearest depth; missing and extra blocks are reported later."""
    blocks = {int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d{1,4})\.", name))}
    depth = max(blocks, default=-1) + 1
    fitting = [name for name, size in SIZES.items() if (size.width, size.patch) == (width, patch)]
    if not fitting:
        known = ", ".join(f"{name} ({size.depth}, {size.width}, {size.patch})" for name, size in SIZES.items())
        raise UserError(
            f"Found {path} with {depth} blocks of width {width} and patch {patch}, expected a known size (blocks, "
            f"width, patch): {known}."
        )
    return min(fitting, key=lambda name: (abs(SIZES[name].depth - depth), -SIZES[name].depth))


def _given_traits(settings: Imported) -> dict[str, Any]:
    return {name: value for name in Traits._fields if (value := getattr(settings, name)) is not None}


def _traits(tensors: dict[str, Tensor], path: Path, settings: Imported, metadata: dict[str, Any], size: str) -> Traits:
    """Return the traits from `settings`, else from the file's metadata, else from the number of time embeddings."""
    given, model = _given_traits(settings), metadata.get("model")
    known = {name: model.get(name) for name in Traits._fields} if isinstance(model, dict) else {}
    known = known if set(given) <= {"form"} else {}  # nfe or repeats replace all the metadata, as they belong together
    nfe, form, repeats = (given.get(name, known.get(name)) for name in Traits._fields)
    if "t_embedder.mlp.0.weight" not in tensors:
        shown, kind, possible = "no", "1 step with blocks run once", nfe in (None, 1) and repeats in (None, 1)
        nfe = 1
    elif "t_tgt_embedder.mlp.0.weight" in tensors:
        shown, kind, possible = "two", "any number of steps (nfe any)", nfe in (None, "any")
        nfe = "any"
    else:
        shown, kind, possible = "one", "several steps, or blocks run several times", nfe != "any"
        possible &= (nfe, repeats) != (1, 1)
        if possible and nfe in (None, 1) and repeats in (None, 1):
            raise UserError(_ambiguous(path, size, nfe, repeats))
    if not possible:
        answers = ", ".join(f"{name} {value}" for name, value in given.items()) or "its own metadata"
        raise UserError(
            f"Found {path} with {shown} time embedding{'s' * (shown != 'one')}, which is a generator of {kind}, but "
            f"{answers} was given: omit it."
        )
    nfe = nfe or 1
    return Traits(nfe, form or ("direct" if nfe == 1 else "residual"), repeats or 1)


def _velocity(settings: Imported, metadata: dict[str, Any], sit: bool) -> VelocityConfig | None:
    """Return how the network samples if it is a velocity: SiT's, or one that the metadata describe."""
    model = metadata.get("model")
    known = model.get("velocity") if isinstance(model, dict) else None
    if not sit and known is None:
        return None
    try:
        velocity = VelocityConfig.model_validate(known or SIT_SAMPLING)
        return velocity.model_copy(update=settings.sampling.model_dump()) if settings.sampling else velocity
    except ValidationError:
        raise UserError(
            f"Found invalid metadata of a velocity ({known}), expected its sampling: export again."
        ) from None


def _ambiguous(path: Path, size: str, nfe: Any, repeats: Any) -> str:
    """Return the error message for tensors that match several generators, with a hint from the file name."""
    depth = SIZES[size].depth
    answers = [f"--nfe {n} ({n} steps)" for n in (2, 4) if nfe is None]
    answers += [f"--repeats {r} ({depth * r} layers)" for r in (2, 4) if repeats is None]
    layers, steps = re.search(r"(\d+)layer", path.name), re.search(r"(\d+)nfe", path.name)
    hint = ""
    if layers and int(layers[1]) in (2 * depth, 4 * depth) and repeats is None:
        hint = f"--repeats {int(layers[1]) // depth}"
    elif steps and int(steps[1]) > 1 and nfe is None:
        hint = f"--nfe {steps[1]}"
    return (
        f"Found {path} with one time embedding, a generator of size {size}, either of several steps or with blocks run "
        f"several times, which have the same tensors. Give one of {', '.join(answers)}; in params, nfe or repeats."
        f"{f' The file name suggests {hint}.' if hint else ''}"
    )


def _check_values(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise UserError naming tensors that are not floating point or not finite."""
    kinds = [
        f"{name} of {str(t.dtype).removeprefix('torch.')}" for name, t in tensors.items() if not t.is_floating_point()
    ]
    if kinds:
        raise UserError(f"Found {path} with {', '.join(kinds[:5])}, expected floating point: use other weights.")
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"Found {path} with non-finite values in {', '.join(broken[:5])}: use other weights.")


def _class_names(settings: Imported, contents: WeightsFile, config: ModelConfig) -> tuple[list[str], str]:
    """Return the class names and what gives them: `settings`, the file, ImageNet for 1,000 classes, or numbers."""
    if settings.classes is not None:
        path = paths.local(settings.classes)
        try:
            names = [line.strip() for line in read_text(path, MAX_NAMES_BYTES).splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Found {path} unreadable ({_reason(error)}), expected one class name per line.") from None
        if len(names) != config.num_classes:
            raise UserError(f"Found {len(names)} names in {path}, expected {config.num_classes}: one class per line.")
        return names, "settings"
    classes = contents.metadata.get("classes")
    if isinstance(classes, list) and len(classes) == config.num_classes:
        return [str(name) for name in classes], "file"
    if config.num_classes == 1000 and config.latent_shape == SD_VAE_LATENT:
        return imagenet_names(), "imagenet"
    return [str(label) for label in range(config.num_classes)], "numbers"


def _hash(path: Path) -> str:
    """Return the sha256 of a file; of an index, that over its own and those of its files."""
    if path.suffix != INDEX:
        return sha256_file(path)
    for shard in shards(path):
        check_file(shard)
    return hashlib.sha256("".join(map(sha256_file, [path, *shards(path)])).encode()).hexdigest()


def _reason(error: BaseException) -> str:
    """Return the informative part of an error; PyTorch's message is long where a pickle tries to load code."""
    text = " ".join(str(error).split())
    found = re.search(r"GLOBAL [\w.]+|Unsupported (?:operand|class)[^.]*?\s[\w.]+", text)
    return (found[0] if found else text.split(". ")[0])[:200] or type(error).__name__
