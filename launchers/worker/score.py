"""`trimaran score` on the ranks: all compute the scores, rank 0 prints them."""

import torch

from trimaran.launchers.terminal import say
from trimaran.launchers.worker.generate import Output
from trimaran.launchers.worker.tasks import ScoreTask
from trimaran.runtime.evaluate.engine.weights import load_stages
from trimaran.runtime.files import read_json
from trimaran.runtime.finetune.criteria.reward import document_scores
from trimaran.runtime.finetune.data.store import ExampleSet
from trimaran.runtime.finetune.documents import Documents
from trimaran.runtime.finetune.forward import ForwardPass, document_values
from trimaran.runtime.finetune.scoring import score_records, tally_of
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.spec import RunSpec

MANIFEST = "manifest.json"
SPLIT = "scored"


def run_score(task: ScoreTask, spec: RunSpec, mesh: Mesh, device: torch.device) -> int:
    """Print the scores on rank 0; return the exit code. Collective over the world."""
    manifest = read_json(task.examples / MANIFEST)
    examples = ExampleSet(task.examples, SPLIT, manifest["record"], manifest["dtype"], manifest["files"])
    stages = load_stages(task.checkpoint, spec, mesh, device)
    documents = Documents(examples.document_lengths, examples.document)
    scores = document_values(ForwardPass.build(spec, mesh, stages), documents, document_scores)
    if mesh.rank == 0:
        output, records = Output(is_open=True), list(score_records(examples, scores))
        for record in records:
            output.write_json(record)
        output.report()
        tally = tally_of(records)
        if tally is not None:
            say(str(tally))
    return 0
