"""A spec and a checkpoint of an earlier version load and the run goes on; renamed fields are read by a table.

The folder `golden` was made by version 0.1.0 (commit be5701d, `trimaran train run.yaml`, one CPU rank): the spec has
every section, the checkpoint is that of step 2 of 4. `golden_former_names` was made by commit 08c12b6 (two dp ranks,
float64) from a spec with every field that was renamed after it. They are never made anew: they stand for the runs that
people have.
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

from tests.runtime.spec.test_spec import BASE
from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.data.prepare import prepare_data
from trimaran.runtime.mesh import build_mesh
from trimaran.runtime.spec import SpecError, diff_specs, load_spec, parse_spec
from trimaran.runtime.spec.names import RENAMED, known_paths, nearest_path
from trimaran.runtime.spec.yaml_text import read_yaml
from trimaran.runtime.train.loop import train
from trimaran.runtime.train.metrics import read_metrics
from trimaran.runtime.train.signals import StopRequest
from trimaran.runtime.train.state import read_state, spec_of

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "checkpoints" / "step-00000002"
MIN_FREE = "slurm.preflight_min_free_gib"
# sha256 over name and bytes of every tensor, in the order of their names.
DIGESTS = {
    "weight": "320a3304dbc9086d974a2f8ab13ad5c915e5184b1e6079311203378864b6d603",
    "exp_avg": "0e3f4351b8371f4de9159893819de3ba1547dc74393e3703acef31a82a5d056a",
    "exp_avg_sq": "49a32a36ab180eb7fe052a9b7cd0ac6074fa3207e20744dbefe47049dda9359f",
}
FORMER_NAMES = Path(__file__).parent / "golden_former_names"
# Of the runs without a stop: steps 3 and 4, and the evaluation at the end, which had the z-loss too: 4.820923566818237.
LOSSES = [5.065428018569946, 4.966746807098389, 4.817814350128174]
LOSSES_OF_FORMER_NAMES = [5.504855907373487, 5.481952864478072, 5.459972902368087]


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
            if f"{section}.{name}" in RENAMED:
                continue
            found = loaded[section][name]
            assert (found if not isinstance(value, dict) else {key: found[key] for key in value}) == value, name
    assert loaded["optimizer"]["betas"] == [0.8, 0.9]
    assert loaded["launcher"]["nodes"] == 1


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


def test_a_spec_and_a_checkpoint_with_former_names_are_read_with_the_names_of_today() -> None:
    written = read_yaml((FORMER_NAMES / "run.yaml").read_text(encoding="utf-8"), "run.yaml").value
    assert isinstance(written, dict)
    assert {path for path in RENAMED if path.partition(".")[2] in written[path.partition(".")[0]]} == RENAMED.keys()
    spec = load_spec(FORMER_NAMES / "run.yaml")
    found = (spec.optimizer.betas, spec.launcher.nodes, spec.slurm.preflight_min_free_gib)
    assert found == ([0.8, 0.9], 2, None)
    checkpoint = Checkpoint.open(FORMER_NAMES / "checkpoints" / CHECKPOINT.name)
    assert {"beta1", "beta2"} <= checkpoint.state["spec"]["optimizer"].keys()
    assert diff_specs(spec_of(checkpoint), spec) == []
    checkpoint.close()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("golden", "changes", "losses", "tolerance"),
    [
        (GOLDEN, [], LOSSES, 1e-5),  # float32 on another CPU: sums of a few hundred terms in another order
        (FORMER_NAMES, ["parallel.dp=1", "launcher.nodes=1"], LOSSES_OF_FORMER_NAMES, 1e-12),
    ],
)
def test_the_run_goes_on_from_the_checkpoint(
    golden: Path,
    changes: list[str],
    losses: list[float],
    tolerance: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(GOLDEN / "corpus.jsonl", tmp_path)
    shutil.copytree(golden / "checkpoints", tmp_path / "run" / "checkpoints")
    monkeypatch.chdir(tmp_path)
    spec = load_spec(golden / "run.yaml", changes)
    assert read_state(tmp_path / "run" / "checkpoints" / CHECKPOINT.name).step == 2
    seen: list[tuple[int, bool]] = []
    mesh = build_mesh(**spec.axis_sizes, timeout_s=60.0)
    with StopRequest() as stop:
        state = train(spec, mesh, torch.device("cpu"), prepare_data(spec), stop, lambda *step: seen.append(step))
    assert (state.step, state.tokens_seen) == (4, 256)
    assert seen[-2:] == [(4, True), (4, False)], "a rank whose launcher has ended waits for the end of its save alone"
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    found = [row[name] for name in ("loss", "held_out_loss") for row in rows if name in row]
    assert found == pytest.approx(losses, rel=tolerance)


# --- renamed fields


def rename(monkeypatch: pytest.MonkeyPatch, names: dict[str, str]) -> None:
    monkeypatch.setattr("trimaran.runtime.spec.names.RENAMED", MappingProxyType({**RENAMED, **names}))


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
    given_too = r"train\.sequence: is a former name of train\.seq_len, which is given too; remove train\.sequence"
    with pytest.raises(SpecError, match=given_too):
        parse_spec(raw)


def test_the_table_leads_from_names_that_are_gone_to_fields_of_today() -> None:
    known = set(known_paths())
    assert not {old: new for old, new in RENAMED.items() if old in known or new not in known}


@pytest.mark.parametrize(
    ("sections", "path", "value"),
    [
        ({"optimizer": {"beta1": 0.5}}, "optimizer.betas", [0.5, 0.95]),
        ({"optimizer": {"beta2": 0.5}}, "optimizer.betas", [0.9, 0.5]),
        ({"optimizer": {"beta2": 0.5, "betas": [0.9, 0.5]}}, "optimizer.betas", None),
        ({"slurm": {"nodes": 2}}, "launcher.nodes", 2),
        ({"slurm": {"nodes": 2}, "launcher": {"nodes": 1}}, "launcher.nodes", 2),
        ({"slurm": {"nodes": 1}, "launcher": {"nodes": 2}}, "launcher.nodes", 2),
        ({"slurm": {"nodes": 4}, "launcher": {"nodes": 2}}, "launcher.nodes", None),
        ({"slurm": {"preflight": True}}, MIN_FREE, 1.0),
        ({"slurm": {"preflight": True, "preflight_min_free_gib": 3}}, MIN_FREE, 3.0),
        ({"slurm": {"preflight": False, "preflight_min_free_gib": 3}}, MIN_FREE, "null"),
        ({"slurm": {"preflight": True, "preflight_min_free_gib": None}}, MIN_FREE, None),
        ({"slurm": {"preflight": "yes"}}, MIN_FREE, None),
    ],
)
def test_former_fields_become_one_unless_they_contradict_each_other(
    sections: dict[str, dict[str, Any]], path: str, value: object
) -> None:
    """A value of None stands for an error that has the name of today."""
    raw = {name: {**BASE.get(name, {}), **sections.get(name, {})} for name in {*BASE, *sections}}
    raw |= {"parallel": {"dp": 4}}
    if value is None:
        remedy = f"(; write {path} instead|, which is given too; remove )"
        with pytest.raises(SpecError, match=f": is a former name of {path}{remedy}"):
            parse_spec(raw)
    else:
        section, _, name = path.partition(".")
        found = parse_spec(raw).model_dump()[section][name]
        assert found == (None if value == "null" else value)


def test_an_override_is_above_former_names_in_the_file_and_needs_the_name_of_today() -> None:
    path = FORMER_NAMES / "run.yaml"
    changed = load_spec(path, ["optimizer.betas=[0.1, 0.2]", "launcher.nodes=1", "slurm.preflight_min_free_gib=4"])
    found = (changed.optimizer.betas, changed.launcher.nodes, changed.slurm.preflight_min_free_gib)
    assert found == ([0.1, 0.2], 1, 4.0)
    with pytest.raises(SpecError) as caught:
        load_spec(path, [f"{name}=1" for name in RENAMED])
    wanted = [f"{old}: is a former name of {new}; write {new} instead: " for old, new in RENAMED.items()]
    assert [str(error)[: len(words)] for error, words in zip(caught.value.errors, wanted, strict=True)] == wanted


@pytest.mark.parametrize(
    ("path", "meant"),
    [("optimizer.beta1", "optimizer.betas"), ("beta2", "optimizer.betas"), ("launcher.preflight", MIN_FREE)],
)
def test_a_former_name_in_another_section_leads_to_the_field_of_today(path: str, meant: str) -> None:
    assert nearest_path(path) == meant
