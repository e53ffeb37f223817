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


def test_a_full_gpu_ends_with_what_to_do(capsys):
    """Torch's explanation of its allocator is cut; another RuntimeError keeps its traceback."""

    class OutOfMemoryError(RuntimeError):
        """As torch names it."""

    def fill() -> None:
        raise OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.5 GiB"
        )

    with pytest.raises(SystemExit) as end:
        reporting.run(fill, "use --micro-batch auto")
    (line,) = capsys.readouterr().err.splitlines()
    expected = "(CUDA out of memory. Tried to allocate 20.00 MiB): use --micro-batch auto"
    assert end.value.code == 2 and line == f"error: the GPU's memory does not suffice {expected}"

    def fail() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        reporting.run(fail)
