"""The page's sections between the runs and their cost, in order: the paper's tables, each beside ours."""

from afm_pipe.reporting import papers
from afm_pipe.reporting.inputs import Inputs
from afm_pipe.reporting.section import Section


def sections(inputs: Inputs) -> tuple[Section, ...]:
    """Return all sections. To add one, write a function that returns a `Section` and name it here."""
    return papers.paper_sections(inputs)
