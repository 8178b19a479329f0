"""benchmarks/finetune_grpo_peer.py samples, rewards and takes steps without TRL; the figures are not tested."""

from pathlib import Path

import pytest

from tests.launchers.runs import run_script

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "finetune_grpo_peer.py"


def test_answers_of_the_length_asked_for_and_a_line_for_each_way(tmp_path: Path) -> None:
    sizes = ("--layers", "1", "--hidden", "32", "--vocab", "512", "--prompts", "2", "--group", "2", "--micro", "2")
    options = ("--prompt-tokens", "8", "--new-tokens", "4", "--steps", "1", "--threads", "1", "--peer", "none")
    done = run_script(tmp_path, SCRIPT, *sizes, *options)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("answers' tokens"))
    sampled, *table = lines[first:]
    tokens = int(sampled.removeprefix("answers' tokens: trimaran ").split(",")[0])
    assert 0 < tokens <= 2 * 2 * 4 * 2, "two steps, the first of which is not measured"
    ours, _ = (line.split(" | ") for line in table[2:])
    assert ours[0] == "| trimaran"
    assert float(ours[1]) > 0
