"""Copy what a study outside this checkout needs into the wheel. Everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PROJECT_FILES = (
    *("params.yaml", "params.schema.json", "dvc.yaml", ".gitignore", ".dvc/config", ".dvc/.gitignore"),
    *("profiles/*.yaml", "stages/*.py"),
)  # afm_pipe.runtime.paths.shipped finds them


class BuildWithProjectFiles(build_py):
    """Builds the package with the project's files inside; an editable install reads the originals."""

    def run(self) -> None:
        super().run()
        for source, target in self._copies():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *(str(target) for _, target in self._copies())]

    def _copies(self) -> list[tuple[Path, Path]]:
        if self.editable_mode:
            return []
        sources = [path for pattern in PROJECT_FILES for path in sorted(Path().glob(pattern))]
        return [(path, Path(self.build_lib, "afm_pipe", "project_files", path)) for path in sources]


setup(cmdclass={"build_py": BuildWithProjectFiles})
