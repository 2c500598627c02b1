"""Export of a generator as a .pth file with the released key names, a safetensors file, or a diffusers folder.

The diffusers folder contains the code of its pipeline and does not need this package: the modules of the generator are
merged into one file.
"""

import ast
import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from afm_pipe.models.model_files import ModelConfig, build_generator, load_config, load_tensors, require_match
from afm_pipe.models.released import METADATA, describe
from afm_pipe.models.sit import to_sit
from afm_pipe.params.sizes import SIZES
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path, read_json, sha256_file, write_json

PACKAGE = Path(__file__).parent.parent
EXPORTED = (  # the modules of the generator, imported ones first
    *("runtime/errors.py", "params/sizes.py", "models/dit.py", "models/generator.py", "models/flow.py"),
    "models/diffusers_transformer.py",
)
TRANSFORMER = "afm_transformer"  # the module that diffusers loads from transformer/
TINY = "AutoencoderTiny"
DECODERS = {
    "AutoencoderKL": "AutoencoderKL, under the terms of its origin",
    TINY: "AutoencoderTiny (TAESD), MIT License: vae/LICENSE",
}
VAES = tuple(DECODERS)
TAESD_LICENSE = (PACKAGE / "models" / "taesd_license.txt").read_text(encoding="utf-8")
SUFFIXES = {"released": (".pth", ".pt"), "safetensors": (".safetensors",), "diffusers": ("",)}


def export(model_dir: Path, autoencoder_dir: Path, kind: str, out: Path, card: str = "") -> None:
    """Write the generator of `model_dir` to `out`, atomically.

    released: a .pth of plain tensors with the released names (of a velocity: SiT's tensors); safetensors: the model's
    own tensors, with the config in the metadata; diffusers: a folder for DiffusionPipeline.from_pretrained, with
    autoencoder, code, and a model card that ends with `card`.
    Raises UserError if the model does not match its config or `out` does not suit the kind.
    """
    _check_out(kind, out)
    config, described = load_config(model_dir), read_json(model_dir / "config.json")
    if kind == "diffusers" and config.velocity is not None:
        raise UserError(
            f"Found {model_dir}, the velocity of an ODE, expected an adversarial flow model for --format diffusers: "
            "export it as safetensors, or as released, which gives SiT's tensors."
        )
    if kind == "released" and config.velocity is not None and config.channels > SIZES[config.size].width:
        raise UserError(
            f"Found {model_dir} with the wide final layer of {config.channels} channels, which SiT's code lacks, "
            "expected at most as many as the width of the model: export it as safetensors."
        )
    if kind == "diffusers":
        vae = _vae_class(autoencoder_dir / "config.json")
    path = model_dir / "generator.safetensors"
    tensors = load_tensors(path)
    with torch.device("meta"):
        require_match(build_generator(config), tensors, path)
    metadata = {
        "model": config.model_dump(),
        "classes": described.get("classes"),
        "scaling_factor": described.get("scaling_factor"),
    }
    with atomic_path(out) as temp:
        if kind == "released":
            with temp.open("wb") as file:  # given a path, torch.save would store its name in the archive
                torch.save(tensors if config.velocity is None else to_sit(tensors), file)
        elif kind == "safetensors":
            save_file(tensors, temp, {"format": "pt", METADATA: json.dumps(metadata, sort_keys=True)})
        else:
            _write_diffusers(temp, Vae(autoencoder_dir, vae), config, described, tensors, sha256_file(path), card)


class Vae(NamedTuple):
    """The autoencoder that an exported pipeline decodes with."""

    folder: Path
    name: str
    """Its class in diffusers."""


def _vae_class(path: Path) -> str:
    """Return the class of the autoencoder. Raises UserError unless the exported pipeline can decode with it."""
    found = read_json(path).get("_class_name")
    if found not in VAES:
        raise UserError(f"Found {path} of {found}, expected {' or '.join(VAES)}: export as safetensors or released.")
    return str(found)


def exported_source() -> str:
    """Return the source of a single module with all code of the generator."""
    plain, named = set[str](), dict[str, set[str]]()  # imports of modules, and of names from modules
    bodies = []
    for part in EXPORTED:
        text = (PACKAGE / part).read_text(encoding="utf-8")
        lines, (docstring, *nodes) = text.splitlines(), ast.parse(text).body
        imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in imports:
            if isinstance(node, ast.Import):
                plain.add(ast.unparse(node))
            elif not str(node.module).startswith("afm_pipe"):
                named.setdefault(str(node.module), set()).update(ast.unparse(alias) for alias in node.names)
        for removed in (docstring, *imports):
            for number in range(removed.lineno - 1, removed.end_lineno or removed.lineno):
                lines[number] = ""
        bodies.append(f"# From afm_pipe/{part}\n\n\n" + "\n".join(lines).strip())
    head = '"""The generator of an adversarial flow model (arXiv 2511.22475), in one file; MIT License."""'
    imported = sorted(plain) + [f"from {module} import {', '.join(sorted(named[module]))}" for module in sorted(named)]
    return "\n\n\n".join([head + "\n\n" + "\n".join(imported), *bodies]) + "\n"


def _check_out(kind: str, out: Path) -> None:
    if kind not in SUFFIXES:
        raise UserError(f"Found --format {kind}, expected one of {', '.join(SUFFIXES)}, adm-npz.")
    if kind != "diffusers":
        if out.suffix not in SUFFIXES[kind] or out.is_dir():
            raise UserError(f"Found --out {out}, expected a file name that ends in {SUFFIXES[kind][0]}.")
    elif out.exists() and not (out / "model_index.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(
            f"Found --out {out} with other files in it, expected a new or empty folder or an earlier export."
        )


def _write_diffusers(
    folder: Path,
    vae: Vae,
    config: ModelConfig,
    described: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    sha256: str,
    card: str,
) -> None:
    version = importlib.metadata.version("diffusers")
    names = described.get("classes") or [str(label) for label in range(config.num_classes)]
    shape = SIZES[config.size]._asdict() | config.model_dump(exclude={"size"}) | {"times": config.times}
    folder.mkdir()
    write_json(
        folder / "model_index.json",
        {
            "_class_name": ["pipeline", "AFMPipeline"],
            "_diffusers_version": version,
            "transformer": [TRANSFORMER, "AFMTransformer"],
            "vae": ["diffusers", vae.name],
            "id2label": {str(label): name for label, name in enumerate(names)},
        },
    )
    shutil.copyfile(PACKAGE / "models" / "diffusers_pipeline.py", folder / "pipeline.py")
    (folder / "transformer").mkdir()
    write_json(
        folder / "transformer" / "config.json",
        {"_class_name": "AFMTransformer", "_diffusers_version": version} | shape,
    )
    (folder / "transformer" / f"{TRANSFORMER}.py").write_text(exported_source(), encoding="utf-8")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({f"network.{name}": tensor for name, tensor in tensors.items()}, weights, {"format": "pt"})
    (folder / "vae").mkdir()
    for name in ("config.json", weights.name):
        shutil.copyfile(vae.folder / name, folder / "vae" / name)
    if vae.name == TINY:
        (folder / "vae" / "LICENSE").write_text(TAESD_LICENSE, encoding="utf-8")
    (folder / "README.md").write_text(_card(vae, config, described, names, sha256, card), encoding="utf-8")


def _card(vae: Vae, config: ModelConfig, described: dict[str, Any], names: list[str], sha256: str, more: str) -> str:
    seen = described.get("images_seen")
    origin = (
        f"trained by afm-pipe on {seen:,} images" if seen else "imported by afm-pipe from weights trained elsewhere"
    )
    labels = [names[0], names[len(names) // 2]]

    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [adversarial-flow-models, class-conditional]
---

# {described.get("name", "Adversarial flow model")}

A class-conditional [adversarial flow model](https://arxiv.org/abs/2511.22475), {origin}.

```python
from diffusers import DiffusionPipeline

folder = "."  # the folder of this file
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = pipe({labels!r}, seed=0).images  # names, or numbers from 0 to {config.num_classes - 1}
```

The code behind `trust_remote_code` is in this folder: `pipeline.py` and `transformer/{TRANSFORMER}.py`, MIT License.
Image i depends only on seed + i and its class.

| | |
| --- | --- |
| generator | {describe(config)} |
| sha256 of generator.safetensors | {sha256} |
| scaling factor of latents | {described.get("scaling_factor")} |
| decoder | {DECODERS[vae.name]} |

{more}"""
