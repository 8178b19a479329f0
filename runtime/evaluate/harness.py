"""lm-eval's harness over a model of ours: its requests in token ids to a scorer, its results back. Rank 0 alone."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from trimaran.models.fields import counted
from trimaran.runtime.data.files import DataError
from trimaran.runtime.evaluate.answers import Answers
from trimaran.runtime.evaluate.engine.requests import Continuation, Likelihood, LikelihoodScore, ScorerProtocol, ignore
from trimaran.runtime.evaluate.generation import MAX_NEW_TOKENS, SAMPLING, check_settings
from trimaran.runtime.evaluate.quiet import quiet
from trimaran.runtime.evaluate.tasks.catalog import means_of
from trimaran.runtime.evaluate.tasks.load import TaskSet, plain
from trimaran.runtime.evaluate.tasks.offline import PROMPT_ERRORS, OfflineTask, offline, reason_of
from trimaran.runtime.evaluate.text_codes import TextCodes, cut, moved
from trimaran.runtime.infer.chat import ChatError
from trimaran.runtime.infer.sample_group import NotFiniteError
from trimaran.runtime.infer.sampling_params import SamplingParams

BOOTSTRAPS: Final = 1000
"""Draws for the standard error of a metric that is no mean, such as LAMBADA's perplexity."""


@dataclass(frozen=True)
class ChatOptions:
    """How prompts become conversations.

    Args:
        apply: whether the model's chat template is applied; few-shot examples are turns then.
        system: the system message, with or without a template.
    """

    apply: bool = False
    system: str | None = None
    examples_as_turns: bool = True


@dataclass
class Told:
    """What the user must be told.

    Args:
        truncated: task -> requests whose context was cut off on the left.
    """

    truncated: Counter[str] = field(default_factory=Counter)

    def sentences(self, max_seq_len: int) -> list[str]:
        """Return a sentence for each."""
        return [
            f"{task}: {counted(number, 'request')} longer than the model's context of {max_seq_len} tokens "
            "(model.max_seq_len): the beginning was cut off, as lm-eval does"
            for task, number in sorted(self.truncated.items())
            if number
        ]


class HarnessModel(LM):  # type: ignore[misc]
    """lm-eval's model: asks a scorer what the journal does not know.

    Args:
        seed: of draws, where a task asks for sampling.
        progress: called with (requests answered, of how many).

    Attributes:
        is_asking: whether the scorer is at work, or has failed.
    """

    def __init__(
        self,
        scorer: ScorerProtocol,
        codes: TextCodes,
        max_seq_len: int,
        answers: Answers,
        *,
        seed: int = 0,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        super().__init__()
        self._scorer, self._codes, self._max, self._answers = scorer, codes, max_seq_len, answers
        self._seed, self._progress = seed, progress
        self.told = Told()
        self.is_asking = False

    @property
    def tokenizer_name(self) -> str:
        """The folder of the tokenizer."""
        return str(self._codes.text.folder)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the text of the template."""
        template = self._codes.text.template
        return template.source if template is not None and chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation; where the template refuses a system message, of the other messages.

        Args:
            add_generation_prompt: False where the last message is the beginning of the answer.
        """
        template = self._codes.text.template
        if template is None:
            raise ChatError(f"{self.tokenizer_name} has no chat template; leave out --apply-chat-template")
        try:
            return _rendered(template.render, chat_history, add_generation_prompt)
        except ChatError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            return _rendered(template.render, others, add_generation_prompt)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one."""
        pairs = self._codes.pairs([(str(request.args[0]), str(request.args[1])) for request in requests])
        asked = []
        for (context, continuation), request in zip(pairs, requests, strict=True):
            self._check_continuation(continuation, request)
            likelihood, is_cut = cut(context, continuation, self._max)
            self.told.truncated[str(request.task_name)] += is_cut
            asked.append(likelihood)
        scores = self._likelihoods(asked, requests)
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihood of each text, in windows of the whole context with one token before each."""
        texts = [str(request.args[0]) for request in requests]
        ids = self._codes.encode(texts)
        windows: list[Likelihood] = []
        owners: list[int] = []
        for index, text in enumerate(texts):
            parts = get_rolling_token_windows(list(ids[text]), self._codes.prefix, self._max, 1)
            found = [Likelihood(tuple(a), tuple(b)) for a, b in map(make_disjoint_window, parts)]
            windows += found
            owners += [index] * len(found)
        sums = [0.0] * len(requests)
        scores = self._likelihoods(windows, [requests[index] for index in owners])
        for index, score in zip(owners, scores, strict=True):
            sums[index] += score.log_likelihood
        return sums

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the continuation of each context, which ends before the first stop string or at the end of text."""
        ids = self._codes.encode(str(request.args[0]) for request in requests)
        asked, stops = [], []
        for number, request in enumerate(requests):
            sampling, until = self._sampling(request, number)
            context = ids[str(request.args[0])] or (self._codes.prefix,)
            room = self._max - sampling.max_new_tokens
            self.told.truncated[str(request.task_name)] += len(context) > room
            asked.append(Continuation(context[-room:], tuple(until), sampling))
            stops.append(until)
        texts = self._ask(asked, requests, self._scorer.continuations)
        return [self._codes.without_special(_before(text, until)) for text, until in zip(texts, stops, strict=True)]

    def check(self, requests: Sequence[Instance]) -> None:
        """Raise DataError for what no weights are needed to see: no continuation, or a wrong setting of generation."""
        for request in requests:
            if request.request_type == "loglikelihood" and not moved(*request.args[:2])[1]:
                raise _nothing_to_score(request)
            if request.request_type == "generate_until":
                self._sampling(request, 0)

    def _check_continuation(self, continuation: Sequence[int], request: Instance) -> None:
        if not continuation:
            raise _nothing_to_score(request)
        if len(continuation) > self._max:
            raise DataError(
                f"{_place(request)}: the continuation has {len(continuation)} tokens, more than the model's context of "
                f"{self._max} (model.max_seq_len); leave the document out"
            )

    def _sampling(self, request: Instance, number: int) -> tuple[SamplingParams, list[str]]:
        place = _place(request)
        options: dict[str, Any] = dict(normalize_gen_kwargs(check_settings(request.args[1], place), MAX_NEW_TOKENS))
        until = [stop for stop in handle_stop_sequences(options["until"], eos=self._codes.end) if stop]
        new_tokens = options["max_gen_toks"]
        if not 0 < new_tokens < self._max:
            raise DataError(
                f"{place} generates {new_tokens} tokens, and the model's context has {self._max} "
                f"(model.max_seq_len); give --gen max_gen_toks=N with N from 1 to {self._max - 1}"
            )
        settings: dict[str, Any] = {"temperature": 0.0}
        if options["do_sample"]:
            settings = {name: options[name] for name in SAMPLING if name in options} | {"seed": self._seed + number}
        try:
            sampling = SamplingParams(new_tokens, stop_tokens=self._codes.stops, context="stop", **settings)
        except ValueError as error:
            raise DataError(f"{place}: {error}") from error
        return sampling, until

    def _likelihoods(self, asked: Sequence[Likelihood], owners: Sequence[Instance]) -> list[LikelihoodScore]:
        return self._ask(asked, owners, self._scorer.likelihoods)

    def _ask(self, asked: Sequence[Any], owners: Sequence[Instance], score: Callable[..., Any]) -> list[Any]:
        """Return the answers; equal requests are asked once, and those in the journal not at all."""
        keys = [self._answers.key(request) for request in asked]
        first: dict[str, int] = {}
        for index, key in enumerate(keys):
            first.setdefault(key, index)
        open_keys = [key for key in first if self._answers.get(key) is None]
        done = len(first) - len(open_keys)

        def take(number: int, answer: Any) -> None:
            nonlocal done
            key = open_keys[number]
            if isinstance(answer, LikelihoodScore) and math.isnan(answer.log_likelihood):
                raise _not_finite(owners[first[key]])
            self._answers.put(key, answer)
            done += 1
            self._progress(done, len(first))

        self._progress(done, len(first))
        if open_keys:
            self.is_asking = True
            try:
                score([asked[first[key]] for key in open_keys], take)
                self.is_asking = False
            except NotFiniteError as error:
                if error.request is None:
                    raise
                raise _not_finite(owners[first[open_keys[error.request]]]) from error
            finally:
                self._answers.write()
        return [self._answers.get(key) for key in keys]


def _rendered(render: Callable[..., str], messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    text = render(messages, add_generation_prompt=add_generation_prompt)
    if add_generation_prompt:
        return text
    # The last message goes on: what the template writes after it is taken off.
    last = messages[-1]["content"].strip()
    return text[: text.rindex(last) + len(last)]


def _place(request: Instance) -> str:
    return f"task {request.task_name}, document {request.doc_id}"


def _nothing_to_score(request: Instance) -> DataError:
    return DataError(
        f"{_place(request)}: the continuation {request.args[1]!r} has no tokens after its context, so there is "
        "nothing to score; correct the document, or the task's target_delimiter"
    )


def _not_finite(request: Instance) -> NotFiniteError:
    return NotFiniteError(
        f"{_place(request)}: the logits are infinite or NaN, so its score would mean nothing; take an earlier "
        "checkpoint of the run, from before it diverged"
    )


def _before(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


def run_tasks(
    tasks: TaskSet,
    scorer: ScorerProtocol,
    codes: TextCodes,
    max_seq_len: int,
    answers: Answers,
    *,
    chat: ChatOptions | None = None,
    seed: int = 0,
    bootstraps: int = BOOTSTRAPS,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Return lm-eval's results of the tasks, with `samples` and `notes`, sentences for the user.

    Args:
        codes: of the model's tokenizer.
        max_seq_len: the model's context.
        seed: of draws, where a task asks for sampling.
        bootstraps: draws for standard errors of metrics that are no means; 0 for no standard error.
        progress: called with (requests answered, of how many), for each kind of request.

    Raises:
        DataError: a request can't be made; names task and document.
        ChatError: there is no chat template, or it rejects the prompts.
        NotFiniteError: the logits of a request are not finite; names task and document.
    """
    chat = chat or ChatOptions()
    check_requests(tasks, codes, max_seq_len, chat)
    model = HarnessModel(scorer, codes, max_seq_len, answers, seed=seed, progress=progress)
    try:
        with offline(), quiet():
            found = evaluate(
                lm=model,
                task_dict={"tasks": dict(tasks.tasks), "groups": dict(tasks.groups)},
                limit=tasks.limit,
                bootstrap_iters=bootstraps,
                system_instruction=chat.system,
                apply_chat_template=chat.apply,
                fewshot_as_multiturn=chat.apply and chat.examples_as_turns,
                confirm_run_unsafe_code=True,  # `load_tasks` has looked
            )
    except Exception as error:  # code of a task, which may raise anything
        if model.is_asking or type(error).__module__.startswith("trimaran."):
            raise
        raise DataError(f"the answers to {', '.join(tasks.names)} can't be judged: {reason_of(error)}") from error
    assert found is not None
    results: dict[str, Any] = dict(found)
    results["configs"] = plain(results["configs"])
    means = means_of(tasks.names, results["results"])
    results["results"] = {**results["results"], **means}
    if means:
        results["groups"] = {**results.get("groups", {}), **means}
        results["higher_is_better"] = {**results["higher_is_better"], **{name: {"mean": True} for name in means}}
    results["notes"] = model.told.sentences(max_seq_len)
    return results


def check_requests(tasks: TaskSet, codes: TextCodes, max_seq_len: int, chat: ChatOptions | None = None) -> None:
    """Make the prompts of all documents, which `run_tasks` then takes; needs no weights.

    Raises:
        DataError: a prompt can't be made, there is nothing to score, or a setting of generation is wrong; names the
            task, and the document where it is known.
        ChatError: there is no chat template, or it rejects a prompt.
    """
    chat = chat or ChatOptions()
    if chat.apply and codes.text.template is None:
        raise ChatError(f"{codes.text.folder} has no chat template; leave out --apply-chat-template")
    model = HarnessModel(_Nobody(), codes, max_seq_len, Answers(None, ""))
    for name, task in tasks.tasks.items():
        task.set_fewshot_seed(seed=tasks.seed)
        if not isinstance(task, OfflineTask):
            continue
        try:
            with offline(), quiet():
                task.build_all_requests(
                    limit=get_sample_size(task, tasks.limit),
                    system_instruction=chat.system,
                    apply_chat_template=chat.apply,
                    fewshot_as_multiturn=chat.apply and chat.examples_as_turns,
                    chat_template=model.apply_chat_template if chat.apply else None,
                    tokenizer_name=model.tokenizer_name if chat.apply else "",
                )
                task.check_targets()
        except (DataError, ChatError):
            raise
        except PROMPT_ERRORS as error:
            raise DataError(f"task {name}: a prompt can't be made: {reason_of(error)}") from error
        model.check(task.instances)


class _Nobody:
    """The scorer of a model that only makes prompts."""

    def likelihoods(
        self, requests: Sequence[Likelihood], done: Callable[[int, LikelihoodScore], None] = ignore
    ) -> list[LikelihoodScore]:
        """Answer nothing."""
        raise AssertionError("prompts alone are made here")

    def continuations(self, requests: Sequence[Continuation], done: Callable[[int, str], None] = ignore) -> list[str]:
        """Answer nothing."""
        raise AssertionError("prompts alone are made here")
