"""One output of a notebook's cell, drawn over; nothing where there is no notebook."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from qlora_kit.pictures import png

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Output:
    """A place in the output of a cell that holds one picture or table at a time."""

    def __init__(self) -> None:
        self._shown: Any = None

    def show(self, figure: Figure) -> None:
        """Draw a figure there, in place of what was there."""
        if in_notebook():
            from IPython.display import Image

            self._put(Image(data=png(figure), format="png"))  # type: ignore[no-untyped-call]

    def html(self, text: str) -> None:
        """Put HTML there, whose texts are escaped already."""
        if in_notebook():
            from IPython.display import HTML

            self._put(HTML(text))  # type: ignore[no-untyped-call]

    def _put(self, what: Any) -> None:
        from IPython.display import display

        if self._shown is None:
            self._shown = display(what, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._shown.update(what)


def in_notebook() -> bool:
    """Whether a kernel runs this, whose front end shows pictures, and they can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()  # type: ignore[no-untyped-call]
    return shell is not None and hasattr(shell, "kernel")
