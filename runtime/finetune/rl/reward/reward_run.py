"""Reward runs among finetune.rl.rewards: their models score prompts with answers, at the layout of the run."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.evaluate.engine.weights import at_layout, load_stages
from trimaran.runtime.finetune.criteria.reward import document_scores
from trimaran.runtime.finetune.data.examples import Document
from trimaran.runtime.finetune.documents import Documents
from trimaran.runtime.finetune.forward import ForwardPass, document_values
from trimaran.runtime.finetune.rl.reward.rewards import RewardError, RewardItem
from trimaran.runtime.finetune.scoring import check_scores
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.init_from import TOKENIZER, open_weights
from trimaran.runtime.train.state import spec_of


def spec_of_reward_run(item: RewardItem, spec: RunSpec, tokenizer: Tokenizer) -> tuple[Path, RunSpec]:
    """Return the checkpoint of a reward run, and the spec of its model at the layout and row length of `spec`.

    Raises:
        RewardError: it has another tokenizer, or too short a context.
        ValueError: it has no checkpoint or no score head, or can't be cut like that.
    """
    checkpoint, folder = open_weights(Path(item.argument))
    theirs, parallel = spec_of(checkpoint), spec.parallel
    check_scores(theirs, Path(item.argument))
    if Tokenizer.load(folder / TOKENIZER).definition != tokenizer.definition:
        raise RewardError(
            f"the reward run {item.text} has another tokenizer than the answers, whose tokens it would misread; train "
            "it from the same model, with the same finetune.chat_template"
        )
    longest = theirs.transformer.max_seq_len
    if spec.train.seq_len > longest:
        raise RewardError(
            f"train.seq_len ({spec.train.seq_len}) is more than the context of the reward run {item.text} "
            f"({longest}); lower it, or take another reward run"
        )
    laid_out = at_layout(theirs, tp=parallel.tp, pp=parallel.pp, dp=parallel.dp, shared_memory=parallel.shared_memory)
    train = laid_out.train.model_copy(update={"seq_len": spec.train.seq_len})
    return checkpoint.path, laid_out.model_copy(update={"train": train})


class RewardModels:
    """The models of the reward runs, beside the one that is trained. Collective over the world.

    Args:
        items: those of other kinds are left out.
        tokenizer: of the answers.

    Raises:
        RewardError, ValueError: as `spec_of_reward_run`.
        CheckpointError: the weights can't be read.
    """

    def __init__(
        self, items: Sequence[RewardItem], spec: RunSpec, tokenizer: Tokenizer, mesh: Mesh, device: torch.device
    ) -> None:
        self._models: dict[str, ForwardPass] = {}
        for item in items:
            if item.kind == "run":
                origin, own = spec_of_reward_run(item, spec, tokenizer)
                self._models[item.text] = ForwardPass.build(own, mesh, load_stages(origin, own, mesh, device))

    def rewards(self, texts: Sequence[Sequence[int]]) -> dict[str, list[float]]:
        """Return the scores of texts by the name of each item, the same on all ranks. Collective over the world.

        Args:
            texts: tokens of prompts with their answers.

        Raises:
            RewardError: a score is not finite.
        """
        documents = Documents.of([Document.of(tokens, [False] * len(tokens)) for tokens in texts])
        found = {
            name: document_values(model, documents, document_scores).tolist() for name, model in self._models.items()
        }
        wrong = next((name for name, scores in found.items() if not all(map(math.isfinite, scores))), None)
        if wrong is not None:
            raise RewardError(f"the reward run {wrong} gives a score that is not finite; its weights have diverged")
        return found
