"""What learning from rewards reads of prepared examples: prompts with the fields of their records."""

from pathlib import Path

from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.files import parse_json
from trimaran.runtime.finetune.data.prepare import PreparedExamples
from trimaran.runtime.finetune.data.records import Prompt
from trimaran.runtime.finetune.data.store import ExampleSet
from trimaran.runtime.finetune.rl.loop import Inputs
from trimaran.runtime.finetune.rl.prompts import PromptSet, check_lengths
from trimaran.runtime.finetune.rl.reward.reward_run import spec_of_reward_run
from trimaran.runtime.finetune.rl.reward.rewards import check_fields, parse_rewards
from trimaran.runtime.infer.prompts import RunText
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.samples import TrainingData
from trimaran.runtime.train.state import fingerprint


def prompts_of(examples: ExampleSet) -> PromptSet:
    """Return the prompts of a split with their records, whose turns are in the fields alone."""
    records = [
        Prompt((), examples.origin(number), parse_json(examples.fields(number) or "{}"))
        for number in range(examples.num_examples)
    ]
    tokens = [examples.document(examples.documents_of(number)[0]).tokens.tolist() for number in range(len(records))]
    return PromptSet(records, tokens)


def check_prompts(spec: RunSpec, data: TrainingData) -> None:
    """Raise where the prompts lack what the run needs of them. For the time before any rank starts.

    Raises:
        DataError: a prompt leaves no room for its answer, or there is none.
        RewardError: a record lacks a field that a reward reads.
    """
    assert isinstance(data, PreparedExamples), "finetuning prepares examples"
    assert spec.finetune is not None, "a run of method rl"
    assert spec.finetune.rl is not None, "a rule of the spec"
    if data.held_out.num_examples and not data.train.num_examples:
        raise DataError("data.held_out_fraction leaves no prompt to train on; set it to 0")
    prompts = prompts_of(data.train)
    check_lengths(prompts, spec.train.seq_len, spec.finetune.rl.max_new_tokens)
    check_fields(parse_rewards(spec.finetune.rl.rewards), prompts.records)
    check_reward_runs(spec, data.tokenizer)


def check_reward_runs(spec: RunSpec, tokenizer: Tokenizer) -> None:
    """Raise where a reward run can't score the answers of `spec`; errors as of `spec_of_reward_run`.

    Args:
        tokenizer: of the answers.
    """
    rl = None if spec.finetune is None else spec.finetune.rl
    for item in () if rl is None else parse_rewards(rl.rewards):
        if item.kind == "run":
            spec_of_reward_run(item, spec, tokenizer)


def inputs_of(spec: RunSpec, data: TrainingData) -> Inputs:
    """Return what the loop reads: the prompts, and the tokens that end an answer by the files of the run folder."""
    assert isinstance(data, PreparedExamples), "finetuning prepares examples"
    stops = {data.end_of_turn, *RunText.open(Path(spec.train.output_dir)).stop_tokens}
    return Inputs(prompts_of(data.train), data.tokenizer, tuple(sorted(stops)), fingerprint(data))
