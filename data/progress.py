"""How far long work is, and how long it will take, on stderr."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_SECONDS_BETWEEN_LINES, _SECONDS_BETWEEN_FRAMES = 10.0, 0.25


class Progress:
    """Tells on stderr how far the work is: live on a terminal, elsewhere every ten seconds."""

    def __init__(self) -> None:
        import rich.console
        import rich.progress

        console = rich.console.Console(stderr=True)
        self._is_live = console.is_terminal
        self._seconds = _SECONDS_BETWEEN_FRAMES if self._is_live else _SECONDS_BETWEEN_LINES
        self._live = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=10),
            rich.progress.TextColumn("{task.description}"),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> "Progress":
        if self._is_live:
            self._live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._is_live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if self._is_live:
            self._live.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def track(
        self, items: Iterable[T], doing: str, total: int, unit: str = "images"
    ) -> Iterator[T]:
        """Yields ``items``, and tells how many are done; nothing if all are done at once."""
        began = shown = time.monotonic()
        task = self._live.add_task(doing, total=total)
        done = 0
        for item in items:
            yield item
            done, now = done + 1, time.monotonic()
            if now - shown >= self._seconds:
                shown, rate = now, done / (now - began)
                left = _clock((total - done) / rate)
                line = f"{doing}  {done:,}/{total:,} {unit}  {rate:,.0f}/s  {left} left"
                self._show(task, done, line)
        self._live.remove_task(task)
        took = time.monotonic() - began
        if took >= self._seconds:
            self.say(f"{doing}  {done:,}/{total:,} {unit}  done in {_clock(took)}")

    def _show(self, task: Any, done: int, line: str) -> None:
        if self._is_live:
            self._live.update(task, completed=done, description=line)
        else:
            self.say(line)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
