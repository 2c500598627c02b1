"""Profiles: complete params files that can replace params.yaml."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from afm_pipe.params import Params
from afm_pipe.params.file import load_params
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path

SCHEMA = re.compile(r"\A(# yaml-language-server: \$schema=)\S*", re.ASCII)


class Profile(NamedTuple):
    """A params file under profiles/; its first comment is the description."""

    name: str
    path: Path
    description: str


class Switch(NamedTuple):
    """Result of activating a profile."""

    changed: bool
    backup: Path | None  # copy of the old params.yaml


def list_profiles(folder: Path | None = None) -> list[Profile]:
    """Return the profiles of a folder, sorted by name.

    By default those that come with afm-pipe and those under profiles/, of which the latter win where names are equal.
    """
    folders = [paths.shipped(paths.PROFILES), paths.PROFILES] if folder is None else [folder]
    found = {path.stem: path for each in folders for path in each.glob("*.yaml")}
    return [Profile(name, found[name], _first_comment(found[name])) for name in sorted(found)]


def undeclared_note(params: Params, size: str, folder: Path | None = None) -> str:
    """Say what an undeclared run of a size is: which declared runs have that size, and which profile has its run."""
    same = [name for name, run in params.runs.items() if run.size == size and name != size]
    note = f"{size}: not declared in params, a run with the settings of `train`"
    note += f" (declared runs of that size: {', '.join(same)})." if same else "."
    for profile in list_profiles(folder):
        run = load_params(profile.path).runs.get(size)
        if run is not None and run.size == size:
            note += f" The paper's run of that size is {size} of {profile.path}: afm-pipe profile {profile.name}."
    return note


def profile_text(name: str, folder: Path | None = None) -> str:
    """Return the text of a profile, as it reads in place of params.yaml, whose schema lies beside it.

    Raises UserError for an unknown or invalid profile.
    """
    profiles = {profile.name: profile for profile in list_profiles(folder)}
    if name not in profiles:
        where = folder or "profiles/ and among those of afm-pipe"
        raise UserError(f"Found no profile {name!r} in {where}, expected one of {', '.join(profiles) or 'none'}.")
    load_params(profiles[name].path)
    return SCHEMA.sub(rf"\g<1>{paths.SCHEMA}", profiles[name].path.read_text())


def activate(name: str, folder: Path | None = None, active: Path = paths.PARAMS) -> Switch:
    """Replace the active params file with a profile, and keep a copy of the old file beside it.

    Does nothing if the profile is active already. Raises UserError for an unknown or invalid profile.
    """
    text = profile_text(name, folder)
    if active.is_file() and active.read_text() == text:
        return Switch(False, None)
    kept = keep_copy(active, name) if active.exists() else None
    with atomic_path(active) as temp:
        temp.write_text(text)
    return Switch(True, kept)


def keep_copy(path: Path, reason: str) -> Path:
    """Copy a file to NAME.before-REASON.yaml beside it, with a number if that exists; return the copy's path."""
    copy, number = path.with_name(f"{path.stem}.before-{reason}.yaml"), 1
    while copy.exists():
        number += 1
        copy = path.with_name(f"{path.stem}.before-{reason}.{number}.yaml")
    with atomic_path(copy) as temp:
        shutil.copyfile(path, temp)
    return copy


def _first_comment(path: Path) -> str:
    comments = (line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("yaml-language-server:")), "")
