"""Weights from outside: a file of tensors is recognised as a generator and becomes a model folder like a trained run's.

Size, latents, classes and time embeddings show in the tensors. What does not show is asked for: generators of two or
four steps and generators whose blocks run two or four times (paper section 3) have the very same tensors. A file's
name is quoted as a hint and never believed. Nothing in the file is run: only plain tensors are read.
"""

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

from afm_pipe.models.model_files import ModelConfig, build_generator, count_parameters, misfits, save_tensors
from afm_pipe.models.tensor_files import ASIDE, check_file, check_pickled, check_plain, check_safetensors
from afm_pipe.params import Imported
from afm_pipe.params.sizes import SIZES
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path, read_text, sha256_file, write_json

PICKLED, SAFE = (".pth", ".pt", ".bin", ".ckpt"), ".safetensors"
LARGEST_NAMES = 16 << 20  # bytes of a file of class names
METADATA = "afm_pipe"  # key of a safetensors file's metadata, written by exports
SD_VAE_LATENT, SD_VAE_FACTOR = (4, 32, 32), 0.18215  # every released generator lives on SD-VAE's latents
PROBES = {"x_embedder.proj.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2}  # name -> dimensions
OTHERS = {"dis_embed": "a discriminator", "cls_embed": "a classifier"}


class Contents(NamedTuple):
    """What a file holds: its tensors, where in it they were, and what it says of itself (safetensors alone)."""

    tensors: dict[str, Tensor]
    entry: str
    said: dict[str, Any]


class Traits(NamedTuple):
    """What the tensors leave open: steps, form, and how often the blocks run."""

    nfe: int | Literal["any"]
    form: Literal["direct", "residual"]
    repeats: int


def import_generator(settings: Imported, folder: Path) -> ModelConfig:
    """Write the model folder of a generator from outside, its moving average being all there is; return what it is.

    Raises UserError for a file that holds anything but tensors, for tensors that are not those of a generator (named),
    and where the tensors leave open what `settings` does not say.
    """
    path = Path(settings.file).expanduser()
    if not path.is_file():
        raise UserError(f"Found no file {path}, expected weights ({', '.join((*PICKLED, SAFE))}): check the path.")
    check_file(path)
    sha256 = sha256_file(path)
    if settings.sha256 not in (None, sha256):
        raise UserError(f"Found {path} with sha256 {sha256}, expected {settings.sha256}: take the right file.")
    contents = read_tensors(path)
    config = recognise(contents, path, settings)
    _check_values(contents.tensors, path)
    factor = SD_VAE_FACTOR if config.latent_shape == SD_VAE_LATENT else contents.said.get("scaling_factor")
    told = {name: value for name in Traits._fields if (value := getattr(settings, name)) is not None}
    with torch.device("meta"):
        parameters = count_parameters(build_generator(config))
    description = {
        "model": config.model_dump(),
        "name": folder.name,
        "classes": _class_names(settings, contents, config),
        "scaling_factor": factor,
        "provenance": {"imported": {"file": path.name, "sha256": sha256, "entry": contents.entry, "told": told}},
        "updates": None,
        "images_seen": None,
        "generator_parameters": parameters,
    }
    with atomic_path(folder) as aside:
        aside.mkdir()
        save_tensors(aside / "generator.safetensors", {k: tensor.float() for k, tensor in contents.tensors.items()})
        write_json(aside / "config.json", description)
    return config


def read_tensors(path: Path) -> Contents:
    """Read a file of named tensors without running anything in it.

    A pickled file may hold them directly or one level down ({"ema": ...}); of several, the entry called ema is taken.
    Raises UserError when it holds code, is damaged, or holds something else.
    """
    if path.suffix == SAFE:
        return _read_safetensors(path)
    if path.suffix not in PICKLED:
        raise UserError(f"Found {path}, expected a file ending in {', '.join((*PICKLED, SAFE))}.")
    check_pickled(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"Found {path} holding more than tensors ({_reason(error)}), expected named tensors alone. {ASIDE}"
        ) from None
    except Exception as error:  # whatever the unpickler makes of damaged or hostile bytes
        raise UserError(f"Found {path} unreadable as a file of tensors ({_reason(error)}): fetch it again.") from None
    tensors, entry = _unwrapped(held, path)
    check_plain(tensors, path)
    return Contents(tensors, entry, said={})


def recognise(contents: Contents, path: Path, settings: Imported) -> ModelConfig:
    """Return what generator the tensors are, the open questions answered by `settings` or by what the file says.

    Raises UserError naming tensors that are missing, too many, of another shape or not numbers of the right kind, the
    question that the tensors leave open, or the answer they contradict.
    """
    tensors = contents.tensors
    shapes = _probes(tensors, path)
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    size = _size(tensors, width, patch, path)
    side = math.isqrt(shapes["pos_embed"][1])
    if side**2 != shapes["pos_embed"][1]:
        raise UserError(f"Found {path} with pos_embed of {shapes['pos_embed'][1]} places, expected a square number.")
    traits = _traits(tensors, path, settings, contents.said, size)
    described = {
        "size": size,
        "channels": channels,
        "latent_size": side * patch,
        "num_classes": shapes["y_embedder.embedding_table.weight"][0],
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
    }
    try:
        config = ModelConfig.model_validate(described | traits._asdict())
    except ValidationError:
        raise UserError(
            f"Found {path} with metadata that makes no sense ({contents.said}): say nfe or repeats."
        ) from None
    with torch.device("meta"):
        problems = misfits(build_generator(config), tensors)
    if problems:
        raise UserError(
            f"Found {path}, which looks like a generator of size {size} but is not: {'; '.join(problems[:8])}"
            f"{f' and {len(problems) - 8} more' if len(problems) > 8 else ''}. Take a whole generator's state dict."
        )
    return config


def describe(config: ModelConfig) -> str:
    """Say in a line what a generator is."""
    steps = "any number of steps" if config.nfe == "any" else f"{config.nfe} step{'s' * (config.nfe != 1)}"
    depth = SIZES[config.size].depth
    runs = f", {depth} blocks run {config.repeats} times ({depth * config.repeats} layers)" * (config.repeats > 1)
    latent = " x ".join(map(str, config.latent_shape))
    return f"{config.size}, {steps}, {config.form} form{runs}, {config.num_classes:,} classes, latents {latent}"


def _read_safetensors(path: Path) -> Contents:
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            return Contents(tensors, "the file itself", said if isinstance(said, dict) else {})
    except Exception as error:  # an unknown dtype is a KeyError, deep metadata a RecursionError
        raise UserError(f"Found {path} unreadable as safetensors ({_reason(error)}): fetch it again.") from None


def _unwrapped(held: Any, path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the named tensors in what a pickled file held, and where in it they were."""
    if _is_state(held):
        return dict(held), "the file itself"
    inner = {name: value for name, value in held.items() if _is_state(value)} if isinstance(held, dict) else {}
    name = "ema" if "ema" in inner else next(iter(inner), None)
    if name is None or (len(inner) > 1 and name != "ema"):
        kinds = (
            {str(k)[:40]: type(v).__name__ for k, v in held.items()} if isinstance(held, dict) else type(held).__name__
        )
        shown = ", ".join(f"{k}: {v}" for k, v in list(kinds.items())[:6]) if isinstance(kinds, dict) else kinds
        raise UserError(
            f"Found {path} holding {shown or 'nothing'}, expected one dict of named tensors, or an entry ema that is: "
            "save the generator's state dict by itself."
        )
    return dict(inner[name]), f"its entry {name}"


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict) and bool(value) and all(isinstance(k, str) and torch.is_tensor(value[k]) for k in value)
    )


def _probes(tensors: dict[str, Tensor], path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that tell what the others should be."""
    wrong = [f"no {name}" for name in PROBES if name not in tensors]
    wrong += [
        f"{name} of shape {tuple(tensors[name].shape)}"
        for name, dimensions in PROBES.items()
        if name in tensors and (tensors[name].dim() != dimensions or 0 in tensors[name].shape)
    ]
    other = next((kind for name, kind in OTHERS.items() if name in tensors), "")
    if other or wrong:
        looks = f"which looks like {other}" if other else f"with {', '.join(wrong)}"
        raise UserError(
            f"Found {path} {looks}, expected a generator with the released names; its {len(tensors)} tensors begin "
            f"with {', '.join(sorted(tensors)[:4])}."
        )
    return {name: tuple(tensors[name].shape) for name in PROBES}


def _size(tensors: dict[str, Tensor], width: int, patch: int, path: Path) -> str:
    """Return the size of that width and patch whose depth is nearest, so that blocks missing or too many are named."""
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


def _traits(tensors: dict[str, Tensor], path: Path, settings: Imported, said: dict[str, Any], size: str) -> Traits:
    """Return what is told, else said by the file, else the one thing the time embeddings leave possible."""
    told = {name: value for name in Traits._fields if (value := getattr(settings, name)) is not None}
    model = said.get("model")
    known = {name: model.get(name) for name in Traits._fields} if isinstance(model, dict) else {}
    known = known if set(told) <= {"form"} else {}  # an answer replaces all the file says, since they go together
    nfe, form, repeats = (told.get(name, known.get(name)) for name in Traits._fields)
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
            raise UserError(_open(path, size, nfe, repeats))
    if not possible:
        answers = ", ".join(f"{name} {value}" for name, value in told.items()) or "its own metadata"
        raise UserError(
            f"Found {path} with {shown} time embedding{'s' * (shown != 'one')}, which is a generator of {kind}, but "
            f"{answers} was said: leave that out."
        )
    nfe = nfe or 1
    return Traits(nfe, form or ("direct" if nfe == 1 else "residual"), repeats or 1)


def _open(path: Path, size: str, nfe: Any, repeats: Any) -> str:
    """Say what the tensors show, what they leave open, and what the file's name would suggest."""
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
        f"Found {path} with one time embedding, a generator of size {size}; several steps and blocks run several "
        f"times have the same tensors, so these leave open which it is. Say one of {', '.join(answers)}; in params, "
        f"nfe or repeats.{f' The name of the file suggests {hint}, which proves nothing.' if hint else ''}"
    )


def _check_values(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise UserError naming tensors that are not of floating point or not finite."""
    kinds = [
        f"{name} of {str(t.dtype).removeprefix('torch.')}" for name, t in tensors.items() if not t.is_floating_point()
    ]
    if kinds:
        raise UserError(f"Found {path} with {', '.join(kinds[:5])}, expected floating point: take other weights.")
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"Found {path} with values that are not finite in {', '.join(broken[:5])}: take other weights.")


def _class_names(settings: Imported, contents: Contents, config: ModelConfig) -> list[str]:
    """Return the names of the classes: as told, as the file says, ImageNet's for 1,000 of them, else their numbers."""
    if settings.classes is not None:
        path = Path(settings.classes).expanduser()
        try:
            names = [line.strip() for line in read_text(path, LARGEST_NAMES).splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Found no way to read {path} ({_reason(error)}), expected a class name a line.") from None
        if len(names) != config.num_classes:
            raise UserError(f"Found {len(names)} names in {path}, expected {config.num_classes}: one class a line.")
        return names
    said = contents.said.get("classes")
    if isinstance(said, list) and len(said) == config.num_classes:
        return [str(name) for name in said]
    if config.num_classes == 1000 and config.latent_shape == SD_VAE_LATENT:
        from torchvision.models import ResNet50_Weights

        return list(ResNet50_Weights.IMAGENET1K_V2.meta["categories"])
    return [str(label) for label in range(config.num_classes)]


def _reason(error: BaseException) -> str:
    """Return the sentence of an error that says most: torch buries what a pickle asked for."""
    text = " ".join(str(error).split())
    found = re.search(r"Unsupported (?:global|operand|class)[^.]*?\s[\w.]+|GLOBAL [\w.]+", text)
    return (found[0] if found else text.split(". ")[0])[:200] or type(error).__name__
