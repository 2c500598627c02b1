"""Work in another process, so that its memory and threads do not affect this one."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing import get_context
from types import TracebackType
from typing import Any

Works = dict[str, Callable[[], Any]]


class Beside:
    """A process with the works that the context manager `make(*arguments)` yields by name."""

    def __init__(self, make: Callable[..., AbstractContextManager[Works]], *arguments: Any) -> None:
        context = get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
        self.process.start()
        there.close()

    def begin(self, work: str) -> None:
        """Start a work; `end` waits for it."""
        self.pipe.send(work)

    def end(self) -> Any:
        """Wait for the started work and return its result."""
        return self.pipe.recv()

    def do(self, work: str) -> Any:
        """Run a work and return its result."""
        self.begin(work)
        return self.end()

    def __enter__(self) -> "Beside":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.pipe.close()
        self.process.join()


def _serve(pipe: Any, make: Callable[..., AbstractContextManager[Works]], arguments: tuple[Any, ...]) -> None:
    with make(*arguments) as works:
        while True:
            try:
                work = pipe.recv()
            except EOFError:
                return
            pipe.send(works[work]())
