"""The commands of README and docs: they parse, and (slow) they run on the smoke profile, in the order of their page."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from afm_pipe.cli.app import app
from afm_pipe.distributed.launch import Launch
from afm_pipe.params.file import load_params
from tests.conftest import ROOT
from tests.pipeline.test_pipeline import environment, make_clone, shell

PAGES = {path.name: path for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))}
PROGRAMS = ("afm-pipe", "dvc", "make", "git", "pip", "source", "torchrun", "tensorboard", "mkdir", "cp", "cd", "tar")
PROGRAMS = (*PROGRAMS, "cat", "ls", "rm", "python", "mkdocs", "jupyter", "export", "sbatch")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
BLOCK = re.compile(r"(?:^\n|\A)((?:^ {4}[^\n]*\n)+)", re.MULTILINE)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"([A-Z][A-Z0-9_]*)=.*")

# What is not run here, by what a line contains. It is parsed like every other line.
NOT_RUN = {
    "make ": "sets up an environment of 6 GB; tests/pipeline/test_stages.py runs make",
    "source ": "there is no such environment in the copy",
    "pip ": "needs the network; tests/pipeline/test_wheel.py builds and installs the wheel",
    "git clone": "needs the network",
    "cd ../clothing": "needs the photographs",
    "NPROC_PER_NODE=8": "needs eight GPUs",
    "nproc-per-node 8": "needs eight GPUs",
    "--measure": "needs a GPU",
    "MICRO_BATCH=16": "needs the latents of ImageNet",
    "CUDA_VISIBLE_DEVICES": "needs a GPU and the latents of ImageNet",
    "afm-pipe import": "needs released weights",
    "xl2-released": "needs released weights",
    "afm-pipe compare": "needs other checkouts; tests/reporting/test_across.py compares two",
    "afm-pipe autoencoder": "needs the weights of SD-VAE or TAESD",
    "photos64": "needs the photographs",
    "latent_space": "needs the photographs",
    "tensorboard": "a server that does not end",
    "AFM_WANDB": "needs an account",
    "profiles/study.yaml": "takes hours",
    "logit_drift": "needs a patch, which tests/test_extending.py applies",
    "size=s2": "needs a patch, which tests/test_extending.py applies",
    "objective=regression": "needs a patch, which tests/test_extending.py applies",
    "mkdocs serve": "a server that does not end",
    "jupyter lab": "a server that does not end",
    "report --watch": "a command that does not end",
}
# What the smoke profile has instead of the page's names, or does in less time.
SMALLER = {
    "transport_decay": "transport",
    "toy.pairs=5000": "toy.pairs=50",
    r"\bRUN\b": "t4",
    r"\bs4-guided\b": "t4",
    r"\bs4\b": "t4",
}
REFUSED = {"afm-pipe sbatch tables": "Found no missing trial"}  # the pipeline has run

AUTHOR = {f"GIT_{who}_{key}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}  # of new studies


class Line(NamedTuple):
    """A line of a block of commands."""

    page: str
    text: str

    @property
    def run(self) -> bool:
        """Whether it can run here."""
        command = re.sub(r"(^|\s)#.*", "", self.text)
        return not any(part in command for part in NOT_RUN)

    def words(self) -> Iterator[list[str]]:
        """Yield its commands as words, without redirections."""
        lexer = shlex.shlex(self.text, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        redirected = False
        for word in lexer:
            if word in ("&&", "||", ";", "|"):
                yield command
                command = []
            elif set(word) <= set("<>&"):
                redirected = True
            elif redirected:
                redirected = False
            else:
                command.append(word)
        yield command


def blocks(page: str) -> Iterator[list[Line]]:
    """Yield the blocks of a page that hold commands."""
    text = PAGES[page].read_text(encoding="utf-8")
    found = [match[2] for match in FENCE.finditer(text) if match[1] in ("bash", "sh")]
    found += [re.sub("^    ", "", match[1], flags=re.MULTILINE) for match in BLOCK.finditer(FENCE.sub("\n", text))]
    for block in found:
        lines = [Line(page, line) for line in block.replace("\\\n", " ").splitlines() if line.strip()]
        if lines and all(_is_command(line.text) for line in lines):
            yield lines


def _is_command(text: str) -> bool:
    words = [word for word in text.split() if not ASSIGNMENT.fullmatch(word)]
    return bool(words) and (Path(words[0]).name in PROGRAMS or text.startswith("#"))


LINES = [line for page in PAGES for block in blocks(page) for line in block]


def test_there_are_commands_and_each_reason_not_to_run_one_is_used() -> None:
    assert len(LINES) > 60
    assert len({line.page for line in LINES}) > 12
    unused = {part for part in NOT_RUN if not any(part in line.text for line in LINES)}
    assert unused <= {"mkdocs serve", "report --watch", "logit_drift", "size=s2", "objective=regression"}


def test_a_shell_parses_every_block() -> None:
    script = "\n".join(line.text for line in LINES)
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", sorted({line.page for line in LINES}))
def test_commands_options_launch_settings_and_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    settings = {f"AFM_{name.upper()}" for name in Launch.model_fields}
    for line in (line for line in LINES if line.page == page):
        for words in line.words():
            while words and (found := ASSIGNMENT.fullmatch(words[0])):
                assert not found[1].startswith("AFM_") or found[1] in settings, f"{page}: {found[1]}"
                words = words[1:]
            if "afm_pipe" in words:
                words = ["afm-pipe", *words[words.index("afm_pipe") + 1 :]]
            if words[:1] == ["afm-pipe"]:
                parse_afm_pipe(words[1:], f"{page}: {line.text}")
            elif words[:1] == ["make"]:
                assert {word for word in words[1:] if "=" not in word} <= targets, f"{page}: {line.text}"
            elif words[:1] == ["dvc"]:
                parse_dvc(words[1:], f"{page}: {line.text}")


def test_overrides_of_experiments_apply_to_the_default(tmp_path: Path) -> None:
    from dvc.utils.hydra import apply_overrides

    texts = [line.text for line in LINES if line.text.startswith("dvc exp run")]
    overrides = [override for text in texts for override in re.findall(r"-S '?([^\s']+)", text)]
    assert len(overrides) > 2
    for override in overrides:
        params = shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
        apply_overrides(params, [override])
        load_params(Path(params))


def parse_afm_pipe(words: list[str], where: str) -> None:
    if words in (["--help"], ["--install-completion"]):
        return
    assert words[0] in COMMANDS, where
    try:
        COMMANDS[words[0]].make_context(words[0], words[1:])
    except Exception as error:
        raise AssertionError(f"{where}: {getattr(error, 'message', error)}") from None


def parse_dvc(words: list[str], where: str) -> None:
    from dvc.cli.parser import get_main_parser

    try:
        get_main_parser().parse_args(words)
    except BaseException as error:  # argparse exits
        raise AssertionError(f"{where}: {error}") from None


@pytest.mark.parametrize("page", PAGES)
def test_commands_named_in_sentences_exist_with_their_options(page: str) -> None:
    text = FENCE.sub("", PAGES[page].read_text(encoding="utf-8"))
    for name, rest in re.findall(r"`afm-pipe ([a-z]+)([^`]*)`", text):
        assert name in COMMANDS, f"{page}: afm-pipe {name}"
        known = {flag for param in COMMANDS[name].params for flag in (*param.opts, *param.secondary_opts)}
        if name != "sbatch":  # its options may be those of the command that it wraps
            assert set(re.findall(r"--[a-z-]+", rest)) <= {*known, "--help"}, f"{page}: afm-pipe {name}{rest}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which the smoke profile has run, committed on the branch main."""
    folder = make_clone(tmp_path_factory.mktemp("docs") / "afm-pipe")
    shell(folder, "git", "checkout", "-qB", "main")
    shell(folder, "git", "add", "-A")
    shell(folder, "git", "commit", "-qm", "clone")
    shell(folder, "dvc", "repro")
    shell(folder, "git", "add", "-A")
    shell(folder, "git", "commit", "-qm", "results")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({line.page for line in LINES if line.run}))
def test_the_commands_of_a_page_run_on_the_smoke_profile(page: str, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "afm-pipe"
    shutil.copytree(finished, folder, symlinks=True)
    shutil.copytree(folder / "results", tmp_path / "other" / "results")
    for block in blocks(page):
        text = "\n".join(_refusable(line.text) for line in block if line.run)
        for names, smaller in SMALLER.items():
            text = re.sub(names, smaller, text)
        done = subprocess.run(
            ["bash", "-euxc", text],
            cwd=folder,
            env=environment(folder) | AUTHOR | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


def _refusable(text: str) -> str:
    """Return a command that may be refused, for the reason that it must give then."""
    refused = next((reason for start, reason in REFUSED.items() if text.startswith(start)), None)
    command = re.sub(r"\s+#.*", "", text)
    return text if refused is None else f"{{ {command}; }} 2> refused || grep -q '{refused}' refused"
