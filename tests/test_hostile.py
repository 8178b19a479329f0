"""Random damage to specs, manifests, texts, config.json and environments: a sentence of ours, soon, in little memory.

The suite tries a few examples of each. Thousands: ``HOSTILE_EXAMPLES=3000 pytest tests/test_hostile.py``.
"""

import copy
import gzip
import hashlib
import json
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from trimaran.launchers.env.rank_env import RankEnvError, is_rank, read_env
from trimaran.models.huggingface.registry import FAMILIES
from trimaran.models.parallel.shard import ShardPiece, whole
from trimaran.runtime.checkpoint.manifest import CheckpointError
from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.checkpoint.store import save
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.prepare import prepare
from trimaran.runtime.huggingface.plan import make_plan
from trimaran.runtime.huggingface.source import ConversionError, ModelFolder
from trimaran.runtime.spec import SpecError, describe, dump_spec, load_spec
from trimaran.runtime.train.state import read_state, spec_of

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.yaml"
MOST_MIB = 500
THOUSANDS = os.environ.get("HOSTILE_EXAMPLES")
hostile = settings(
    max_examples=int(THOUSANDS or 20),
    deadline=10_000 if THOUSANDS else None,  # ms; the suite's machine may be busy
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)

WHOLE = [0, 1, 2, 3, 7, 64, 1000, 2**31 - 1, 2**31, 2**63 - 1, 2**70, 10**400, -1, -(2**70)]
NUMBERS = st.sampled_from(WHOLE) | st.floats()
WORDS_OF_VALUES = st.sampled_from(["1", "nan", "true", "/", "\0", "\ud800"])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=20) | WORDS_OF_VALUES
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@st.composite
def damaged(draw: st.DrawFn, original: Any) -> Any:
    """Return a copy of nested records and lists in which a few places have other values, names or nothing."""
    found = {"": copy.deepcopy(original)}
    for _ in range(draw(st.integers(1, 4))):
        parent: Any = found
        key: Any = ""
        while isinstance(parent[key], dict | list) and parent[key] and draw(st.integers(0, 4)):
            parent = parent[key]
            key = draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else list(range(len(parent)))))
        what = draw(st.integers(0, 3))
        if what == 0 and isinstance(parent, dict) and parent is not found:
            parent[draw(st.text(max_size=8))] = parent.pop(key)
        elif what == 1 and parent is not found:
            del parent[key]
        else:
            parent[key] = draw(VALUES)
    return found[""]


@contextmanager
def sentence_of(kind: type[Exception]) -> Iterator[None]:
    """Let one kind of error pass, and fail where the block took more memory than any of these may."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(kind):
        yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MIB << 10


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@hostile
@given(raw=damaged(yaml.safe_load(QUICKSTART.read_text())))
def test_specs(raw: Any, folder: Path) -> None:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(raw, allow_unicode=True, width=10**6))
    with sentence_of(SpecError):
        spec = load_spec(path)
        assert describe(spec)
        path.write_text(dump_spec(spec))
        assert load_spec(path) == spec


@hostile
@given(text=st.text(max_size=60), place=st.integers(0, 1500), taken=st.integers(0, 60))
def test_texts_of_specs(text: str, place: int, taken: int, folder: Path) -> None:
    original = QUICKSTART.read_text()
    (folder / "spec.yaml").write_bytes((original[:place] + text + original[place + taken :]).encode())
    with sentence_of(SpecError):
        load_spec(folder / "spec.yaml")


@cache
def stored_manifest() -> tuple[dict[str, Any], bytes]:
    """Return the manifest of a small checkpoint, without its digest, and its one shard file."""
    pieces = [
        ShardPiece("w", "weight", torch.ones(6), whole((6, 4)), (6, 4), 0),
        ShardPiece("w", "weight", torch.ones(18), whole((6, 4)), (6, 4), 6),
        ShardPiece("b", "exp_avg", torch.ones(1), whole(()), (), 0),
    ]
    spec = load_spec(QUICKSTART).model_dump(mode="json")
    state = {"step": 3, "tokens_seen": 1, "consumed_samples": 1, "data": "x", "spec": spec}
    with tempfile.TemporaryDirectory() as name:
        path = save(Path(name), 3, pieces, state)
        body = json.loads((path / "manifest.json").read_text())
        del body["manifest_sha256"]
        return body, (path / "rank-00000.safetensors").read_bytes()


@hostile
@given(data=st.data(), signed=st.integers(0, 5))
def test_manifests(data: st.DataObject, signed: int, folder: Path) -> None:
    body, shard = stored_manifest()
    body = data.draw(damaged(body))
    if signed and isinstance(body, dict):
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        body["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path = folder / "step-00000003"
    path.mkdir(exist_ok=True)
    (path / "manifest.json").write_text(json.dumps(body))
    (path / "rank-00000.safetensors").write_bytes(shard)
    reads: list[Callable[[Checkpoint], object]] = [
        lambda checkpoint: read_state(path),
        spec_of,
        lambda checkpoint: [
            checkpoint.read_global(name, key) for name in checkpoint.names() for key in checkpoint.keys(name)
        ],
    ]
    for read in reads:
        with sentence_of(CheckpointError):
            read(Checkpoint.open(path))


ODD_TEXTS = [b"\xff\xfea\0b\0", "\ud800", "[" * 2000, '{"text": "a\\ud800"}', "9" * 5000]
TEXTS = st.text() | st.binary() | st.sampled_from(ODD_TEXTS)
LINES = VALUES.map(lambda value: json.dumps({"text": value})) | VALUES.map(json.dumps) | TEXTS


@hostile
@given(
    files=st.lists(
        st.tuples(st.sampled_from(["txt", "jsonl", "txt.gz", "jsonl.gz"]), st.lists(LINES, max_size=4), st.booleans()),
        min_size=1,
        max_size=2,
    )
)
def test_data_files(files: list[tuple[str, list[str | bytes], bool]], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        for number, (suffix, lines, whole_file) in enumerate(files):
            parts = [line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass") for line in lines]
            content = b"\n".join(parts)
            if suffix.endswith("gz"):
                content = gzip.compress(content)[: None if whole_file else -3]
            Path(name, f"{number}.{suffix}").write_bytes(content)
        with sentence_of(DataError):
            prepare([name], cache_dir=Path(name, "cache"), vocab_size=260)


@hostile
@given(data=st.data(), family=st.sampled_from(FAMILIES))
def test_configs_of_models(data: st.DataObject, family: Any, folder: Path) -> None:
    original = {"model_type": family.model_types[0], **family.defaults, "num_hidden_layers": 2}
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(data.draw(damaged(original)), default=str))
    with sentence_of(ConversionError):
        make_plan(ModelFolder.open(folder))


VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PMIX_RANK",
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID",
    "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURMD_NODENAME",
)  # fmt: skip
WORDS = (
    st.integers(-1, 9).map(str)
    | st.sampled_from(
        ["", " 3", "1e3", "²", "٣", "9" * 5000, "4294967290", "2(x3)", "1(x999999999)", "3,2(x2)", "../.."]
    )
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
)


@hostile
@given(environment=st.dictionaries(st.sampled_from(VARIABLES), WORDS, max_size=len(VARIABLES)))
def test_environments(environment: dict[str, str]) -> None:
    with sentence_of(RankEnvError):
        is_rank(environment)
    with sentence_of(RankEnvError):
        assert read_env(environment).world_size > 0
