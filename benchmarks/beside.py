"""Works in a process of their own, beside this one: what one does to its memory or its threads leaves others alone."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing import get_context
from types import TracebackType
from typing import Any

Works = dict[str, Callable[[], Any]]


class Beside:
    """A process with works made by `make(*arguments)`, a context manager that gives them by name."""

    def __init__(self, make: Callable[..., AbstractContextManager[Works]], *arguments: Any) -> None:
        context = get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
        self.process.start()
        there.close()

    def begin(self, work: str) -> None:
        """Have a work done; `end` waits for it."""
        self.pipe.send(work)

    def end(self) -> Any:
        """Wait for the work that was begun, and return what it returns."""
        return self.pipe.recv()

    def do(self, work: str) -> Any:
        """Have a work done and wait for it."""
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
