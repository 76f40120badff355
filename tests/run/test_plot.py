"""`--plot` draws a finished run, and what cannot be drawn is refused before anything is done."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import save_checkpoint

from qlora_kit import finetune
from qlora_kit.errors import ConfigError
from qlora_kit.run.metrics import check_plot

ROWS = [{"prompt": f"w{n} w{n + 1}", "completion": f"w{n % 5} <b>"} for n in range(20)]


@pytest.mark.parametrize(("kind", "held_out"), [("png", 0.2), ("html", 0.0)])
def test_a_run_leaves_its_picture(tmp_path: Path, kind: str, held_out: float) -> None:
    save_checkpoint(tmp_path / "<base>")
    picture = tmp_path / f"run.{kind}"
    options = {"model": tmp_path / "<base>", "max_steps": 3, "eval_fraction": held_out}
    finetune(data=ROWS, output_dir=tmp_path / "out", plot=picture, **options)
    drawn = picture.read_bytes()
    if kind == "png":
        assert drawn.startswith(b"\x89PNG")
    else:
        assert b"data:image/png;base64," in drawn
        assert b"<base>" not in drawn  # names are texts of a page, not its tags
    # A second run does not take its place unless it is told to.
    again = {"data": ROWS, "output_dir": tmp_path / "other", "plot": picture, **options}
    with pytest.raises(ConfigError, match="is there already"):
        finetune(**again)
    assert picture.read_bytes() == drawn
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [("run.pdf", "neither"), ("run", "neither"), ("nowhere/run.png", "no directory")],
)
def test_what_cannot_be_drawn_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        check_plot(name, overwrite=True)
    (tmp_path / "link.png").symlink_to(tmp_path / "else.png")
    with pytest.raises(ConfigError, match="is there already"):
        check_plot("link.png", overwrite=True)
