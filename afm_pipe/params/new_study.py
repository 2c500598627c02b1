"""A new study outside the checkout: what `afm-pipe init` writes, and the stages that its dvc.yaml names."""

import re
from pathlib import Path

from afm_pipe.params.profiles import profile_text
from afm_pipe.params.versions import FILE, study_versions
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import atomic_path

GITIGNORE, DVC_CONFIG, DVC_GITIGNORE = Path(".gitignore"), Path(".dvc/config"), Path(".dvc/.gitignore")
STUDY_TABLES = paths.STUDY / "README.md"  # keeps the folder, on which the report depends, in git


def init_study(profile: str | None = None, git: bool = True) -> list[Path]:
    """Write the files of a new study into the working directory; return those written.

    `profile` is the profile that becomes params.yaml, by default the small default of this project. Without `git`, DVC
    works without a repository. Files that exist with other content are never replaced: .gitignore gets the lines it
    lacks, the settings of DVC stay, and any other raises UserError before anything is written.
    """
    here = Path.cwd()
    if git and not any((folder / ".git").exists() for folder in (here, *here.parents)):
        raise UserError(
            f"Found no git repository in {here}, which DVC needs: run `git init` first, or use `afm-pipe init "
            "--no-git` for DVC without git and experiments."
        )
    files = {
        paths.PARAMS: profile_text(profile) if profile else _shipped(paths.PARAMS),
        paths.SCHEMA: _shipped(paths.SCHEMA),
        paths.DVC_YAML: study_pipeline(),
        paths.VERSIONS: study_versions(),
        STUDY_TABLES: "Tables that `afm-pipe tables --out results/study` writes here are part of the report.\n",
    }
    others = [path for path, text in files.items() if path.exists() and path.read_bytes() != text.encode()]
    if others:
        raise UserError(
            f"Found {', '.join(map(str, others))} in {here}, expected a folder without a study: nothing was "
            "written. Use another folder; `afm-pipe profile NAME` changes the params of a study."
        )
    files[GITIGNORE] = _with_lines(GITIGNORE, _shipped(GITIGNORE))
    if not DVC_CONFIG.exists():
        files[DVC_CONFIG] = _shipped(DVC_CONFIG) + "    no_scm = true\n" * (not git)
        files[DVC_GITIGNORE] = _shipped(DVC_GITIGNORE)
    written = [path for path, text in files.items() if not path.exists() or path.read_bytes() != text.encode()]
    for path in written:
        with atomic_path(path) as temp:
            temp.write_text(files[path], encoding="utf-8")
    return written


def study_pipeline() -> str:
    """Return the dvc.yaml of a study: this project's, whose stages are commands of the installed package."""
    text = re.sub(r"\bpython stages/(\w+)\.py", r"afm-pipe stage \1", _shipped(paths.DVC_YAML))
    text = text.replace(str(Path("afm_pipe", FILE.relative_to(paths.PACKAGE))), str(paths.VERSIONS))
    return text.replace(f"      - {paths.BENCHMARKS}\n", "")  # of this project's checkout alone


def stage_script(name: str) -> Path:
    """Return the script of a stage. Raises UserError for an unknown one."""
    scripts = {path.stem: path for path in sorted(paths.shipped("stages").glob("[a-z]*.py"))}
    if name not in scripts:
        raise UserError(f"Found no stage {name!r}, expected one of {', '.join(scripts)}.")
    return scripts[name]


def _shipped(path: Path) -> str:
    return paths.shipped(path).read_text(encoding="utf-8")


def _with_lines(path: Path, text: str) -> str:
    """Return a file's text with the lines of `text` that it lacks."""
    if not path.exists():
        return text
    own = path.read_text(encoding="utf-8")
    missing = [line for line in text.splitlines() if line.strip("# ") and line not in own.splitlines()]
    rules = [line for line in missing if not line.startswith("#")]
    return own + "\n" * (not own.endswith("\n")) + "".join(f"{line}\n" for line in missing) if rules else own
