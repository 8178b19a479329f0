"""A run of a tiny model with random weights and a chat template, which several files talk to."""

import json
import shutil
from pathlib import Path

from tests.launchers.drawn_run import drawn_run, tokenizer_of_words
from tests.runtime.infer.test_infer_dialogue import CHATML
from tests.session import made_once, session_folder

CONTEXT = 256


def chat_run(folder: Path, *, has_template: bool = True) -> Path:
    """Return a copy of the run in a folder, with or without its chat template."""
    run = folder / ("talker" if has_template else "writer")
    shutil.copytree(made_once(_make), run)
    if not has_template:
        (run / "chat_template.jinja").unlink()
    return run


def _make() -> Path:
    run = drawn_run(session_folder() / "talker", tokenizer_of_words("<|im_start|>", "<|im_end|>"), CONTEXT)
    (run / "chat_template.jinja").write_text(CHATML)
    (run / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return run
