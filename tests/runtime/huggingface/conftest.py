"""What tests of several files here start from."""

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A LLaMA of Hugging Face in one file, with a tokenizer."""
    from tests.runtime.huggingface.huggingface_folders import llama, saved  # transformers, which other files do without

    return saved(llama(), tmp_path / "model", tokenizer=True)
