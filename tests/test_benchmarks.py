"""What the benchmarks compare: that the plain side computes the same, and that results become tables and the page."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from afm_pipe.params.file import load_params
from afm_pipe.reporting.benchmarks import benchmark_sections, read_benchmarks, results_markdown
from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import write_json
from benchmarks.inputs import latents_file
from benchmarks.measuring import Row, in_turns, speed_row
from benchmarks.repro import Times, page, timed
from benchmarks.training import PlainTraining, one_update, trainer_of

ROOT = Path(__file__).parents[1]


def test_the_straightforward_update_has_the_same_result(tmp_path: Path) -> None:
    run = load_params(ROOT / "params.yaml").runs["s4"].model_copy(update={"size": "s4", "batch_size": 8})
    latents = latents_file(tmp_path / "latents.h5", 64, (4, 8, 8))
    trainer, plain = trainer_of(run, latents), PlainTraining(run, latents)
    assert torch.equal(vector(plain.step.generator), vector(trainer.state.networks["generator"]))
    first = {name: vector(getattr(plain.step, name)) for name in ("generator", "discriminator", "ema")}
    for _ in range(3):
        plain.update()
        one_update(trainer)
    for name, before in first.items():
        own, theirs = vector(trainer.state.modules[name]), vector(getattr(plain.step, name))
        moved, apart = (own - before).norm(), (own - theirs).norm()
        assert apart < 0.01 * moved, name  # Adam amplifies the rounding of gradients that are nearly zero


def vector(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in module.parameters()]).clone()


def test_works_are_timed_in_turns_and_the_first_rounds_do_not_count() -> None:
    order: list[str] = []
    seconds = in_turns(2, warm=1, a=lambda: order.append("a"), b=lambda: order.append("b"))
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_a_speed_is_the_median_of_ratios_of_neighbours() -> None:
    seconds = {"ours": [1.0, 10.0, 2.0], "plain": [2.0, 20.0, 3.0]}  # the machine was slow in the second round
    row = speed_row("small", "x", seconds, "ours", "plain", "y", per=4, bar=">= 1.8")
    assert (row.ours, row.against, row.ratio, row.met) == (2.0, 4 / 3, 2.0, True)
    assert row._replace(bar=">= 2.1").met is False
    assert row._replace(bar="").met is None


def test_results_become_a_section_of_the_page_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert benchmark_sections() == ()
    rows = [
        Row("small", "t4, fp32", 8.0, 4.0, "updates/s", "plain update", 2.0, ">= 1.1", "why | so"),
        Row("small", "t4: drawing a batch", 5.0, 100.0, "ms", "the update", 0.05, "<= 0.02"),
        Row("small: where", "aten::mm", 48.0, 200.0, "ms", "one update of t4", 0.24, note="62 calls"),
    ]
    case = {"machine": "m", "threads": 2, "torch": "2.6", "load": 0.1, "quick": False}
    write_json(paths.BENCHMARKS, {"cases": {"small": case | {"rows": [row.record() for row in rows]}}})
    (section,) = benchmark_sections()
    assert section.verdict == "1 of 2 targets are met on this machine."
    assert [len(table.rows) for table in section.tables] == [2, 1]
    assert section.tables[0].rows[0][5].value == 2.0 and section.tables[0].rows[0][5].key == "cases.small.rows[0].ratio"
    text = results_markdown(read_benchmarks())
    assert "| 0.0500 | ≤ 0.02 | no |" in text and "why \\| so" in text and "| aten::mm | 48.0 | 24.0 % |" in text
    write_json(paths.BENCHMARKS, {"cases": {"small": {}}})
    with pytest.raises(UserError, match="no result of `make bench`"):
        read_benchmarks()


def test_help_imports_nothing_that_commands_need() -> None:
    code = "import sys; from afm_pipe.cli import main\ntry: main()\nexcept SystemExit: pass\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    modules = done.stdout.splitlines()[-1].split()
    assert "afm_pipe.cli" in modules and "Pipeline: data" in done.stdout
    assert {"pydantic", "torch", "ruamel.yaml", "yaml", "rich.progress"} & set(modules) == set()


def test_the_parts_of_a_repro_add_up_and_its_lines_are_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["== dvc repro\n", "Running stage 'prepare':\n", "Running stage 'train@a':\n", "Running stage 'train@b':\n"]
    found = timed(lines, "a")
    assert capsys.readouterr().out == "".join(lines)
    assert list(found.stages) == ["start", "prepare", "train"] and found.first_picture is None
    assert sum(found.stages.values()) == pytest.approx(found.total)
    written = page(Times({"pool": 100.0, "report": 2.0}, 90.0, 102.0), 150.0, "abc")
    assert "after 90 s" in written and "| pool | 100 |" in written and "| **all** | **102** |" in written
