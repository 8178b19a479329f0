"""benchmarks/finetune_sft.py runs on a small model, packed and padded, without TRL; the figures are not tested."""

import json
from pathlib import Path

import pytest

from tests.launchers.forked import HUGGING_FACE
from tests.launchers.runs import run_script

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "finetune_sft.py"


def test_every_way_has_a_line(tmp_path: Path) -> None:
    from tests.runtime.huggingface.huggingface_folders import llama, saved

    model = saved(llama(), tmp_path / "model", tokenizer=True)
    records = [{"question": f"the {number}", "answer": "user " * (number % 5 + 1)} for number in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    options = ["--model", str(model), "--data", "data.jsonl", "--seq-len", "64", "--rounds", "1", "--steps", "1"]
    done = run_script(tmp_path, SCRIPT, *options, "--peer", "none", "--threads", "1", preload=HUGGING_FACE)
    assert done.code == 0, done.err
    *_, packed, padded = done.out.splitlines()
    assert packed.startswith("trimaran packed: ")
    assert padded.startswith("trimaran padded: ")
    assert float(packed.split()[2]) > 0
