"""A spec and a checkpoint of an earlier version load and the run goes on; renamed fields are read by a table.

The folder `golden` was made by version 0.1.0 (commit be5701d, `trimaran train run.yaml`, one CPU rank): the spec has
every section, the checkpoint is that of step 2 of 4. It is never made anew: it stands for the runs that people have.
"""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.data.prepare import prepare_data
from trimaran.runtime.mesh import build_mesh
from trimaran.runtime.spec import SpecError, load_spec, parse_spec
from trimaran.runtime.spec.names import RENAMED, known_paths
from trimaran.runtime.spec.yaml_text import read_yaml
from trimaran.runtime.train.loop import train
from trimaran.runtime.train.metrics import read_metrics
from trimaran.runtime.train.signals import StopRequest
from trimaran.runtime.train.state import read_state, spec_of

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "checkpoints" / "step-00000002"
# sha256 over name and bytes of every tensor, in the order of their names.
DIGESTS = {
    "weight": "320a3304dbc9086d974a2f8ab13ad5c915e5184b1e6079311203378864b6d603",
    "exp_avg": "0e3f4351b8371f4de9159893819de3ba1547dc74393e3703acef31a82a5d056a",
    "exp_avg_sq": "49a32a36ab180eb7fe052a9b7cd0ac6074fa3207e20744dbefe47049dda9359f",
}
# Of the run without a stop: steps 3 and 4, and the evaluation at the end.
LOSSES = [5.065428018569946, 4.966746807098389]
HELD_OUT_LOSS = 4.820923566818237


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_spec_loads_with_every_value_that_it_gives() -> None:
    written = read_yaml((GOLDEN / "run.yaml").read_text(encoding="utf-8"), "run.yaml").value
    assert isinstance(written, dict)
    assert len(written) == 14, "it has every section of version 0.1.0, and the seed"
    loaded = load_spec(GOLDEN / "run.yaml").model_dump(mode="json")
    for section, fields in written.items():
        for name, value in fields.items() if isinstance(fields, dict) else ():
            path = RENAMED.get(f"{section}.{name}", f"{section}.{name}")
            found = loaded[path.partition(".")[0]][path.partition(".")[2]]
            assert (found if not isinstance(value, dict) else {key: found[key] for key in value}) == value, path


def test_the_checkpoint_has_its_parameters_and_moments_bit_for_bit() -> None:
    checkpoint = Checkpoint.open(CHECKPOINT)
    digests = {key: hashlib.sha256() for key in DIGESTS}
    for name in checkpoint.names():
        for key, digest in digests.items():
            digest.update(name.encode() + checkpoint.read_global(name, key).numpy().tobytes())
    assert {key: digest.hexdigest() for key, digest in digests.items()} == DIGESTS
    defaults_of_then = ["launcher.start_timeout_s=30"]
    assert spec_of(checkpoint) == load_spec(GOLDEN / "run.yaml", ["train.output_dir=run", *defaults_of_then])
    checkpoint.close()


@pytest.mark.usefixtures("one_rank")
def test_the_run_goes_on_from_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(GOLDEN / "corpus.jsonl", tmp_path)
    shutil.copytree(GOLDEN / "checkpoints", tmp_path / "run" / "checkpoints")
    monkeypatch.chdir(tmp_path)
    spec = load_spec(GOLDEN / "run.yaml")
    assert read_state(tmp_path / "run" / "checkpoints" / CHECKPOINT.name).step == 2
    with StopRequest() as stop:
        state = train(
            spec, build_mesh(**spec.axis_sizes, timeout_s=60.0), torch.device("cpu"), prepare_data(spec), stop
        )
    assert (state.step, state.tokens_seen) == (4, 256)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # float32 on another CPU: sums of a few hundred terms in another order.
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(LOSSES, rel=1e-5)
    assert [row["held_out_loss"] for row in rows if "held_out_loss" in row] == pytest.approx([HELD_OUT_LOSS], rel=1e-5)


# --- renamed fields


def rename(monkeypatch: pytest.MonkeyPatch, names: dict[str, str]) -> None:
    monkeypatch.setattr("trimaran.runtime.spec.names.RENAMED", MappingProxyType(names))


def test_a_renamed_field_is_read_from_specs_overrides_and_checkpoints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rename(monkeypatch, {"train.sequence": "train.seq_len", "weights.depth": "model.num_layers"})
    text = (GOLDEN / "run.yaml").read_text(encoding="utf-8")
    old = tmp_path / "run.yaml"
    old.write_text(text.replace(" seq_len:", " sequence:").replace("  num_layers: 2\n", "") + "weights: {depth: 2}\n")
    assert load_spec(old) == load_spec(GOLDEN / "run.yaml")
    assert load_spec(GOLDEN / "run.yaml", ["seed=8"]) == load_spec(old, ["seed=8"])
    checkpoint = Checkpoint.open(CHECKPOINT)
    stored = checkpoint.state["spec"]
    stored["train"]["sequence"] = stored["train"].pop("seq_len")
    assert spec_of(checkpoint).train.seq_len == 16
    checkpoint.close()


def test_an_error_about_a_renamed_field_has_its_name_of_today_and_its_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rename(monkeypatch, {"train.sequence": "train.seq_len"})
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  num_steps: 4\n  sequence: 0\n")
    with pytest.raises(SpecError, match=r"train\.seq_len \(line 3\): must be at least 1, got 0"):
        load_spec(path)


def test_a_field_under_both_names_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rename(monkeypatch, {"train.sequence": "train.seq_len"})
    raw: dict[str, Any] = {"train": {"sequence": 8, "seq_len": 8}}
    with pytest.raises(SpecError, match=r"train\.sequence: unknown field; did you mean train\.seq_len\?"):
        parse_spec(raw)


def test_the_table_leads_from_names_that_are_gone_to_fields_of_today() -> None:
    known = set(known_paths())
    assert not {old: new for old, new in RENAMED.items() if old in known or new not in known}
