"""Messages and progress bars."""

import io

import pytest

from common import reporting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_bar(monkeypatch, stream: io.StringIO, seconds: float) -> str:
    """A bar of 60 units, each of which takes a second of a clock that is moved by hand."""
    now = [0.0]
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(reporting, "SECONDS_BETWEEN_LINES", seconds)
    with reporting.progress(60, unit="image", description="packing") as bar:
        bar._time, bar.start_t, bar.last_print_t = lambda: now[0], 0.0, 0.0
        for number in range(60):
            now[0] += 1.0
            bar.update()
            if number == 40:
                reporting.say("a message")
    return stream.getvalue()


def test_a_log_file_gets_few_whole_lines(monkeypatch, capsys):
    """Where stderr is not a terminal: a whole line every 20 seconds here, the last one at 100 %."""
    lines = run_bar(monkeypatch, io.StringIO(), 20).splitlines()
    assert len(lines) == 3 and all(line.startswith("packing: ") for line in lines), lines
    assert [line.split()[1].split("%")[0] for line in lines] == ["33", "67", "100"]
    assert capsys.readouterr().out == "a message\n"


def test_parts_of_a_unit_make_lines_too(monkeypatch):
    """One image that takes minutes: a line for each stretch of time, though no unit is finished."""
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr("sys.stderr", stream)
    with reporting.progress(1, unit="image") as bar:
        bar._time, bar.start_t, bar.last_print_t = lambda: now[0], 0.0, 0.0
        for number in range(1, 10):
            now[0] += 10.0
            bar.n = number / 10
            bar.update(0)
    assert [line.split("%")[0].strip() for line in stream.getvalue().splitlines()] == ["30", "60", "90"]


def test_a_terminal_gets_one_moving_line(monkeypatch, capsys):
    text = run_bar(monkeypatch, Terminal(), 20)
    assert text.startswith("\r") and text.endswith("\n") and text.count("\n") == 1
    assert "100%" in text and capsys.readouterr().out == "a message\n"


@pytest.mark.parametrize(("rank", "heard"), [("0", "word\n"), ("1", "")])
def test_only_rank_0_speaks(monkeypatch, capsys, rank, heard):
    monkeypatch.setenv("RANK", rank)
    reporting.say("word")
    assert capsys.readouterr().out == heard
