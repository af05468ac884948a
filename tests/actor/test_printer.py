import io
import logging
import os

import treepo_async.actor.printer
from treepo_async.actor.printer import CLEAR, LogLines, Printer


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_progress_is_one_line_and_other_lines_stay_above_it():
    stream = Terminal()
    printer = Printer(stream)
    printer.progress("1/3")
    printer.progress("2/3")
    printer.plain("engine restarted")
    printer.progress("3/3")
    assert stream.getvalue() == f"{CLEAR}1/3{CLEAR}2/3{CLEAR}engine restarted\n{CLEAR}3/3"


def test_a_long_line_does_not_wrap_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    Printer(stream).progress("x" * 99)
    assert stream.getvalue() == CLEAR + "x" * 19


def test_in_a_log_progress_is_a_line_now_and_then(monkeypatch):
    stream = io.StringIO()
    printer = Printer(stream)
    printer.progress("1/3")
    monkeypatch.setattr(treepo_async.actor.printer, "PERIOD_S", 0.0)
    printer.progress("2/3")
    assert [line[11:] for line in stream.getvalue().splitlines()] == ["2/3"]


def test_warnings_are_lines_among_the_others():
    stream = io.StringIO()
    log = logging.getLogger("tests.printer")
    log.propagate = False
    log.addHandler(LogLines(Printer(stream)))
    log.warning("skipped %s", "p-3")
    log.info("not told")
    assert [line[11:] for line in stream.getvalue().splitlines()] == ["warning: skipped p-3"]


def test_half_a_character_is_told_and_raises_nothing():
    content = io.BytesIO()
    stream = io.TextIOWrapper(content, encoding="utf-8")
    Printer(stream).plain("no \udcff, but é")
    assert content.getvalue().decode() == "no \\udcff, but é\n"


def test_a_stream_that_nobody_reads_any_more_ends_the_lines_and_nothing_else():
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w")
    printer = Printer(stream)
    os.close(reading)
    for _ in range(2):
        printer.plain("a line")
        printer.progress("1/3")
    stream.close()  # raises where something is left that cannot be written


def test_a_closed_stream_is_no_terminal_and_takes_no_line():
    stream = io.StringIO()
    stream.close()
    Printer(stream).plain("a line")
