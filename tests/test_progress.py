"""A long wait says now and then how far it is, also where no terminal is there for a bar."""

import logging

import pytest

from finepoint import progress


@pytest.mark.parametrize(("pause", "said"), [(0.0, ["scores: 2 of 5", "scores: 4 of 5"]), (1000.0, [])])
def test_without_a_terminal_a_line_stands_for_the_bar(pause, said, monkeypatch, caplog):
    monkeypatch.setattr(progress, "PAUSE", pause)
    monkeypatch.setattr(progress.console, "_force_terminal", False)
    monkeypatch.setattr(logging.getLogger("finepoint"), "propagate", True)
    with caplog.at_level("INFO", "finepoint"), progress.progress("scores", 5) as advance:
        for done in (2, 2, 1):
            advance(done)
    assert caplog.messages == said
