"""The log of a run's output: bounded, the newest lines in it, without what only a terminal understands."""

import io
from pathlib import Path

from trimaran.launchers.cli.common.local_output import print_output
from trimaran.runtime.kept_output import OUTPUT_FILE, START, KeptOutput, OutputLog, newest_start, older_part


def test_a_full_log_is_put_aside_and_the_newest_line_is_always_in_the_log(tmp_path: Path) -> None:
    path, most = tmp_path / OUTPUT_FILE, 100
    writers = [OutputLog(path, most), OutputLog(path, most)]  # the launcher and rank 0
    lines = [f"line {number:03}\n" for number in range(60)]
    for number, line in enumerate(lines):
        assert writers[number % 2].write(line) == len(line)
        kept = path.read_text()
        assert kept.endswith(line)
        assert len(kept) <= most + len(line)
    both = older_part(path).read_text() + path.read_text()
    assert "".join(lines).endswith(both)
    assert most < len(both) <= 2 * (most + len(lines[0]))


def test_a_log_waits_for_its_folder_and_no_disk_ends_a_run(tmp_path: Path) -> None:
    log = OutputLog(tmp_path / "logs" / OUTPUT_FILE)
    log.write("first\n")
    assert not (tmp_path / "logs").exists()
    (tmp_path / "logs").mkdir()
    log.write("second\n")
    assert (tmp_path / "logs" / OUTPUT_FILE).read_text() == "first\nsecond\n"
    (tmp_path / "taken").mkdir()
    assert OutputLog(tmp_path / "taken").write("a folder is there\n") == 18


def test_the_log_gets_whole_lines_as_they_were_last_drawn_without_colours(tmp_path: Path) -> None:
    terminal, path = io.StringIO(), tmp_path / OUTPUT_FILE
    stream = KeptOutput(terminal, OutputLog(path))
    drawn = "\x1b[1;36mgreen\x1b[0m ışık\r\nstep 1\rstep 2\rstep 3\n\x1b]0;title\x07plain\nnot ended"
    stream.write(drawn)
    assert terminal.getvalue() == drawn
    assert path.read_text(encoding="utf-8") == "green ışık\nstep 3\nplain\n"
    stream.write(" yet\n")
    assert path.read_text(encoding="utf-8").endswith("plain\nnot ended yet\n")


def test_logs_of_a_start_that_has_filled_its_log_begin_with_its_first_line(tmp_path: Path) -> None:
    assert [newest_start(text) for text in (b"", b"step\n", b"--- a\n", b"x\n--- a\n--- b\n")] == [None, None, 0, 8]
    path = tmp_path / "logs" / OUTPUT_FILE
    path.parent.mkdir()
    log = OutputLog(path, 100)
    log.write(f"{START}an earlier start\nits line\n")
    lines = [f"{START}this start\n", *(f"line {number:03}\n" for number in range(12))]
    for line in lines:
        log.write(line)
    assert older_part(path).exists()
    shown = io.BytesIO()
    print_output(tmp_path, shown, following=False)
    assert shown.getvalue().decode() == "".join(lines)
