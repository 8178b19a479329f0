"""The model that the policy is kept near: the weights that the run has started from, held beside those that train."""

import json
import math
from pathlib import Path
from typing import Final

from torch import Tensor

from trimaran.models.parallel.shard import ShardSpec
from trimaran.runtime.adapters.merged import open_whole
from trimaran.runtime.checkpoint.manifest import MANIFEST_NAME, CheckpointError
from trimaran.runtime.data.files import hash_file
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.files import read_json, write_text
from trimaran.runtime.finetune.rl.recording import ForwardOnly
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.pipeline.executor import Executor
from trimaran.runtime.pipeline.passes import add_communication
from trimaran.runtime.pipeline.schedule import forward_only
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.init_from import open_weights, reader_of_weights
from trimaran.runtime.train.state import verify_together
from trimaran.runtime.train.train_context import TrainContext, build_stages_of_rank

FILE: Final = "reference.json"


def build_reference(train_context: TrainContext, tokenizer: Tokenizer) -> ForwardOnly:
    """Return the reference, whose weights take as much memory as the parameters of this rank's stages.

    They are those of checkpoint.init_from, or else those that are drawn from the seed. Collective over the world.

    Args:
        tokenizer: of the run's data: tokens that the weights don't know are as at the run's start.

    Raises:
        CheckpointError: they can't be read, or are others than at the run's start.
    """
    spec, mesh, device = train_context.spec, train_context.mesh, train_context.executor.transport.device
    plain = spec.model_copy(update={"model": spec.model.model_copy(update={"score_head": "none"})})
    placement = train_context.schedule.placement
    starts_from = spec.checkpoint.init_from
    stages = build_stages_of_rank(plain, mesh, device, draws_weights=starts_from is None, placement=placement)
    if starts_from is not None:
        checkpoint = open_whole(Path(_origin(spec, mesh, Path(starts_from))))
        verify_together(checkpoint, mesh)
        read, _ = reader_of_weights(checkpoint, spec, tokenizer)

        def local(name: str, key: str, shard: ShardSpec, shape: tuple[int, ...]) -> Tensor:
            return read(name, key, shard, shape, 0, math.prod(shape)).view(shape)

        for stage in stages.values():
            stage.load(local)
        checkpoint.close()
    for stage in stages.values():
        stage.requires_grad_(False)
    schedule = add_communication(forward_only(placement, spec.num_microbatches))
    transport = train_context.executor.transport
    executor = Executor(stages, schedule.actions[mesh.pp.rank], transport, loss_weight=1.0)
    return ForwardOnly(spec, mesh, stages, executor)


def _origin(spec: RunSpec, mesh: Mesh, source: Path) -> str:
    """Return the checkpoint folder that the run has started from, chosen once by rank 0. Collective over the world."""
    told = ""
    if mesh.rank == 0:
        try:
            told = json.dumps({"path": _recorded(Path(spec.train.output_dir) / FILE, source)})
        except CheckpointError as error:
            told = json.dumps({"error": str(error)})
    answer = json.loads(mesh.gather_text(told)[0])
    if "error" in answer:
        raise CheckpointError(answer["error"])
    return str(answer["path"])


def _recorded(record: Path, source: Path) -> str:
    if not record.exists():
        path = open_weights(source)[0].path
        record.parent.mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps({"checkpoint": str(path), "manifest_sha256": hash_file(path / MANIFEST_NAME)}))
        return str(path)
    known = read_json(record)
    path = Path(known["checkpoint"])
    if not (path / MANIFEST_NAME).is_file() or hash_file(path / MANIFEST_NAME) != known["manifest_sha256"]:
        raise CheckpointError(
            f"{path}, which the run has started from and is kept near by finetune.rl.kl, is gone or has changed; put "
            "it back there, or start a new run"
        )
    return str(path)
