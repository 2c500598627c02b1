"""The page's sections between the runs and their cost, in order: the paper's tables beside ours, then the study's."""

from afm_pipe.reporting import papers
from afm_pipe.reporting.benchmarks import benchmark_sections
from afm_pipe.reporting.inputs import Inputs
from afm_pipe.reporting.section import Section
from afm_pipe.reporting.study import study_sections


def sections(inputs: Inputs) -> tuple[Section, ...]:
    """Return all sections. To add one, write a function that returns a `Section` and name it here."""
    beside_ours = {"ot_gp_grid", "ot_decay"} <= {table.paper for table in inputs.params.tables.values()}
    of_paper = [
        section
        for section in papers.paper_sections(inputs)
        if not (section.anchor == "published" and beside_ours)  # the study's tables show those beside ours
    ]
    return (*of_paper, *study_sections(inputs), *benchmark_sections())
