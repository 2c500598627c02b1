"""Measure speed and write benchmarks/results.json and results.md.

make bench                                   # all cases
python -m benchmarks small latents           # some cases; results of the others stay
python -m benchmarks --quick b2 --dry        # few repeats; writes nothing
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from afm_pipe.runtime.commands import user_command
from benchmarks.measuring import Row

CASES = ("startup", "latents", "small", "encode", "sampling", "evaluation", "b2", "ranks")


@user_command
def main(
    cases: Annotated[list[str] | None, typer.Argument(help=f"Default: all of {', '.join(CASES)}.")] = None,
    quick: Annotated[bool, typer.Option(help="Few repeats.")] = False,
    dry: Annotated[bool, typer.Option(help="Print, write nothing.")] = False,
) -> None:
    """Time the package beside plain implementations of the same work."""
    import subprocess
    import sys
    import time

    from afm_pipe.params.file import load_params
    from afm_pipe.runtime.errors import UserError
    from benchmarks.results import print_rows, write_results

    unknown = sorted(set(cases or ()) - set(CASES))
    if unknown:
        raise UserError(f"Found no case {unknown[0]!r}, expected some of {', '.join(CASES)}.")
    chosen = [case for case in CASES if not cases or case in cases]
    if len(chosen) > 1:  # one process per case, so that each starts with all memory
        options = ["--quick"] * quick + ["--dry"] * dry
        for name in chosen:
            done = subprocess.run([sys.executable, "-m", "benchmarks", name, *options], check=False)
            if done.returncode:
                raise SystemExit(done.returncode)
        return
    [name] = chosen
    started = time.monotonic()
    rows = list(_case(name)(load_params(), quick))
    print_rows(name, rows, time.monotonic() - started)
    if not dry:
        write_results(name, rows, quick)


def _case(name: str) -> Callable[[Any, bool], Iterator[Row]]:
    from benchmarks import images, reading, several, startup, training

    return {
        "startup": startup.startup,
        "latents": reading.latents,
        "small": training.small,
        "encode": images.encode,
        "sampling": images.sampling,
        "evaluation": images.evaluation,
        "b2": training.b2,
        "ranks": several.ranks,
    }[name]


if __name__ == "__main__":
    typer.run(main)
