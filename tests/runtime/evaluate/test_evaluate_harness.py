"""The harness over our files gives lm-eval's own scores: its `hf` backend and tasks in the same test, no network."""

import json
import math
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Inner
from transformers import AutoTokenizer

from tests.runtime.evaluate.evaluation_files import PLACES, documents, write_lines, write_sets
from tests.runtime.huggingface.huggingface_folders import llama, saved
from trimaran.runtime.data.files import DataError
from trimaran.runtime.evaluate import text_codes
from trimaran.runtime.evaluate.answers import Answers
from trimaran.runtime.evaluate.datasets import SETS, SUBJECTS
from trimaran.runtime.evaluate.engine.replica import Engine
from trimaran.runtime.evaluate.engine.requests import Continuation, Likelihood, LikelihoodScore, ScorerProtocol, ignore
from trimaran.runtime.evaluate.engine.scorer import Scorer
from trimaran.runtime.evaluate.engine.weights import load_stages, open_model
from trimaran.runtime.evaluate.evaluation import prepare
from trimaran.runtime.evaluate.harness import ChatOptions, HarnessModel, check_requests, run_tasks
from trimaran.runtime.evaluate.options import EvaluationOptions
from trimaran.runtime.evaluate.tasks.load import TaskSet, load_tasks
from trimaran.runtime.evaluate.tasks.offline import TASKS, offline
from trimaran.runtime.evaluate.text import score_texts
from trimaran.runtime.evaluate.text_codes import TextCodes
from trimaran.runtime.infer.chat import ChatError
from trimaran.runtime.infer.prompts import RunText
from trimaran.runtime.infer.sample_group import NotFiniteError
from trimaran.runtime.infer.text import TextStream
from trimaran.runtime.mesh import lone_mesh
from trimaran.runtime.spec.sections import PrecisionSection

CONTEXT = 256
YAMLS = {
    "arc_easy": ("arc/arc_easy", "arc_easy"),
    "arc_challenge": ("arc/arc_challenge", "arc_challenge"),
    "hellaswag": ("hellaswag/hellaswag", "hellaswag"),
    "truthfulqa_mc1": ("truthfulqa/truthfulqa_mc1", "truthfulqa"),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2", "truthfulqa"),
    "lambada_openai": ("lambada/lambada_openai", "lambada"),
    "piqa": ("piqa/piqa", "piqa"),
    "winogrande": ("winogrande/default", "winogrande"),
    "wsc": ("super_glue/wsc/default", "wsc"),
    "wsc273": ("wsc273/default", "wsc273"),
    "boolq": ("super_glue/boolq/default", "boolq"),
    "openbookqa": ("openbookqa/openbookqa", "openbookqa"),
    "copa": ("super_glue/copa/default", "copa"),
    "gsm8k": ("gsm8k/gsm8k", "gsm8k"),
    "mmlu_anatomy": ("mmlu/default/mmlu_anatomy", "mmlu"),
}
"""Task -> lm-eval's file of it, and our set."""
ASKED = [name.replace("_openai", "") for name in YAMLS]
SHOTS = 1
GENERATION = {"max_gen_toks": 8}


class InProcess:
    """A scorer over a model of transformers, one request after the other."""

    def __init__(self, model: Any, codes: TextCodes) -> None:
        self.model, self.codes = model, codes
        self.asked = 0

    @torch.inference_mode()
    def likelihoods(
        self, requests: Sequence[Likelihood], done: Callable[[int, LikelihoodScore], None] = ignore
    ) -> list[LikelihoodScore]:
        found = []
        for index, request in enumerate(requests):
            ids = torch.tensor([(*request.context, *request.continuation)])
            rows = self.model(ids[:, :-1]).logits[0, -len(request.continuation) :].log_softmax(-1)
            targets = ids[0, -len(request.continuation) :]
            log_likelihood = rows.gather(1, targets[:, None]).sum().item()
            found.append(LikelihoodScore(log_likelihood, bool((rows.argmax(-1) == targets).all())))
            self.asked += 1
            done(index, found[-1])
        return found

    @torch.inference_mode()
    def continuations(self, requests: Sequence[Continuation], done: Callable[[int, str], None] = ignore) -> list[str]:
        found = []
        for index, request in enumerate(requests):
            assert request.sampling.is_greedy
            stream = TextStream(self.codes.text.tokenizer, request.context, request.stop_strings)
            ids = list(request.context)
            for _ in range(request.sampling.max_new_tokens):
                ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] in request.sampling.stop_tokens or stream.add(ids[-1]):
                    break
            stream.finish()
            found.append(stream.text)
            self.asked += 1
            done(index, stream.text)
        return found


@dataclass(frozen=True)
class Stand:
    """A tiny model, in both hands, and the files."""

    folder: Path
    data: Path
    backend: HFLM
    scorer: InProcess
    codes: TextCodes

    def run(
        self, tasks: TaskSet, answers: Answers | None = None, scorer: ScorerProtocol | None = None, **options: Any
    ) -> dict[str, Any]:
        journal = Answers(None, "tiny") if answers is None else answers
        return run_tasks(tasks, scorer or self.scorer, self.codes, CONTEXT, journal, **options)


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def begin_texts(folder: Path) -> None:
    """Give a folder's tokenizer a begin-of-text token that it adds to every text, as LLaMA's does."""
    inner = Inner.from_file(str(folder / "tokenizer.json"))
    inner.add_special_tokens([AddedToken("<s>", special=True)])
    begin = inner.token_to_id("<s>")
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    inner.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Stand:
    root = tmp_path_factory.mktemp("evaluate")
    sizes = {"vocab_size": 301, "max_position_embeddings": CONTEXT, "num_hidden_layers": 1}
    model = llama(**sizes, eos_token_id=0, bos_token_id=300).double()
    folder = saved(model, root / "model", tokenizer=True)
    begin_texts(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    backend = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=16)
    codes = TextCodes.of(RunText.open(folder))
    return Stand(folder, write_sets(root / "data"), backend, InProcess(model.eval(), codes), codes)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: object) -> None:
        raise AssertionError(f"a test asked the network for {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def theirs(data: Path, cache: Path) -> dict[str, ConfigurableTask]:
    """Return lm-eval's own tasks; its own reader of JSON takes the place of the hub."""
    found = {}
    for name, (file, known) in YAMLS.items():
        config = load_yaml(TASKS / f"{file}.yaml")
        for key in ("tag", "dataset_name"):
            config.pop(key, None)
        names = (SETS[known].split, SETS[known].examples)
        files = {split: str(data / place) for split, place in zip(names, PLACES[known], strict=True) if place}
        if known == "mmlu":
            for split, place in list(files.items()):
                rows = [json.loads(line) for line in Path(place).read_text().splitlines()]
                of_subject = [row for row in rows if row["subject"] == "anatomy"]
                files[split] = str(write_lines(cache / f"anatomy_{split}.jsonl", of_subject))
        for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
            if config.get(key) not in files:
                config[key] = None
        kwargs = {"data_files": files, "cache_dir": str(cache)}
        task = ConfigurableTask(config={**config, "dataset_path": "json", "dataset_kwargs": kwargs})
        task.set_config("num_fewshot", 0 if known in ("truthfulqa", "lambada", "wsc273") else SHOTS)
        if task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", GENERATION, update=True)
        task.set_fewshot_seed(1234)
        found[name] = task
    return found


def asked_of(task: Any) -> list[tuple[Any, ...]]:
    return [instance.args for instance in task.instances]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_every_shipped_task_scores_as_lm_eval_with_its_hf_backend(stand: Stand, tmp_path: Path) -> None:
    """Prompts, each likelihood, texts and metrics; from flat files of the same documents too, by the scorer of a run.

    transformers computes rotary positions in float32 whatever the model's dtype; ours then differs by more.
    """
    tasks = theirs(stand.data, tmp_path)
    with offline():
        wanted = evaluate(lm=stand.backend, task_dict={"tasks": tasks, "groups": {}}, bootstrap_iters=0)
    assert wanted is not None
    flat = write_sets(tmp_path / "flat", flat=True)
    for data, scorer, most in ((stand.data, stand.scorer, 1e-9), (flat, scorer_of(stand.folder), 2e-4)):
        ours = load_tasks(shots_for(ASKED), data, num_fewshot=SHOTS, generation=GENERATION)
        alone = load_tasks(["lambada", "wsc273"], data)
        found = [stand.run(each, scorer=scorer, bootstraps=0) for each in (ours, alone)]
        for name, task in {**ours.tasks, **alone.tasks}.items():
            assert asked_of(task) == asked_of(tasks[name]), name
        results = {**found[0]["results"], **found[1]["results"]}
        samples = {**found[0]["samples"], **found[1]["samples"]}
        assert results.keys() == wanted["results"].keys()
        for name, record in wanted["results"].items():
            compare(results[name], record, name, most if "lambada" in name or "mc2" in name else 1e-9)
            for mine, other in zip(samples[name], wanted["samples"][name], strict=True):
                compare(mine["filtered_resps"], other["filtered_resps"], name, most)


def shots_for(names: Sequence[str]) -> list[str]:
    """Return the tasks that have documents to draw examples from."""
    return [name for name in names if name not in ("lambada", "wsc273")]


def scorer_of(folder: Path) -> Scorer:
    """Return the scorer of a model's folder in this process."""
    model, mesh = open_model(folder), lone_mesh()
    stages = load_stages(model.origin, model.spec, mesh, torch.device("cpu"))
    return Scorer(Engine(stages, mesh, model.spec, model.text.tokenizer))


def compare(mine: Any, other: Any, place: str, most: float = 1e-9) -> None:
    """Assert that two values are equal, numbers within `most`, absolute or relative."""
    if isinstance(other, dict):
        for key in other.keys() - {"alias"}:
            compare(mine[key], other[key], f"{place}.{key}", most)
    elif isinstance(other, list | tuple):
        assert len(mine) == len(other), place
        for number, (one, two) in enumerate(zip(mine, other, strict=True)):
            compare(one, two, f"{place}[{number}]", most)
    elif isinstance(other, float):
        assert mine == pytest.approx(other, rel=most, abs=most), place
    else:
        assert mine == other, place


@pytest.mark.parametrize("many", [0, 100])
def test_texts_are_encoded_as_the_hf_backend_does(stand: Stand, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spaces at the end of a context, no context, special tokens spelled out, and begin-of-text given already.

    Many texts are encoded by a faster engine, which must give the same ids.
    """
    monkeypatch.setattr(text_codes, "_MANY", many)
    monkeypatch.setattr(text_codes, "_BATCH", 3)
    pairs = [
        ("Question: who?\nAnswer:", " Anna"),
        ("ends in space  ", "word"),
        ("", " begins"),
        ("", "<s> begins"),
        ("<s>given", " once"),
        ("with <|endoftext|> inside", " and\n"),
        ("Ünïcode €", "ğ 漢"),
    ]
    for context, continuation in pairs:
        ids = stand.backend.tok_encode(continuation, add_special_tokens=False)
        wanted = stand.backend._encode_pair(context, continuation) if context else ([300], ids)
        if not context and ids[0] == 300:
            wanted = (ids[:1], ids[1:])
        assert [list(each) for each in stand.codes.pairs([(context, continuation)])[0]] == list(wanted), context
    assert stand.codes.pairs([("  ", "word")]) == stand.codes.pairs([("", "  word")])
    assert stand.codes.pairs(pairs) == [stand.codes.pairs([pair])[0] for pair in pairs]
    assert stand.codes._fast is not None


def test_the_end_of_a_turn_ends_a_text_where_the_model_says_so(stand: Stand, tmp_path: Path) -> None:
    """As of SmolLM2 and others: begin and end of a turn stand in for those of a text, which is no stop then."""
    folder = tmp_path / "model"
    shutil.copytree(stand.folder, folder)
    inner = Inner.from_file(str(folder / "tokenizer.json"))
    inner.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    inner.save(str(folder / "tokenizer.json"))
    for file, content in (
        ("tokenizer_config.json", {"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>"}),
        ("generation_config.json", {"eos_token_id": [301]}),
    ):
        (folder / file).write_text(json.dumps(content))
    codes = TextCodes.of(RunText.open(folder))
    assert (codes.prefix, codes.end, codes.stops) == (300, "<|im_end|>", (301,))
    assert codes.without_special("so<|endoftext|> it is") == "so it is"
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").unlink()
    codes = TextCodes.of(RunText.open(folder))
    assert (codes.prefix, codes.end, codes.stops) == (0, "<|endoftext|>", (0,))


def test_rolling_likelihood_equals_the_hf_backend(stand: Stand) -> None:
    texts = ["One short text.", "A long one, " * 200, ""]
    requests = [
        Instance("loglikelihood_rolling", {}, (text,), 0, ("rolling", number, 1)) for number, text in enumerate(texts)
    ]
    model = HarnessModel(stand.scorer, stand.codes, CONTEXT, Answers(None, "tiny"))
    assert model.loglikelihood_rolling(requests) == pytest.approx(
        stand.backend.loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-9
    )


def test_the_perplexity_of_texts_is_the_rolling_likelihood_of_the_hf_backend(stand: Stand, tmp_path: Path) -> None:
    """From the files of `--text` to the sums, on our own model of the same folder."""
    texts = ["Anna painted two old maps. " * 90, "<s>one line", "çay"]
    write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    options = EvaluationOptions(texts=(tmp_path / "texts.jsonl",))
    model, mesh = open_model(stand.folder), lone_mesh()
    spec = model.spec.model_copy(update={"precision": PrecisionSection(dtype="float64")})
    prepared = prepare(options, model.text, spec.transformer)
    with Scorer(Engine(load_stages(stand.folder, spec, mesh, torch.device("cpu")), mesh, spec)) as scorer:
        counts = score_texts(prepared.texts, scorer, prepared.codes.prefix, prepared.max_seq_len)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    expected = stand.backend.loglikelihood_rolling(requests, disable_tqdm=True)
    assert [-each.nats for each in counts] == pytest.approx(expected, rel=1e-6)
    assert sum(each.tokens for each in counts) > 2 * CONTEXT


def test_conversations_equal_the_hf_backend(stand: Stand) -> None:
    """Examples as turns, a system message, and special tokens of the template."""
    names, chat = ["arc_easy", "gsm8k"], ChatOptions(apply=True, system="Be brief.")
    ours = load_tasks(names, stand.data, num_fewshot=SHOTS, limit=3, generation=GENERATION)
    found = stand.run(ours, chat=chat)
    asked = {name: asked_of(task) for name, task in ours.tasks.items()}
    assert asked["gsm8k"][0][0].count("<|assistant|>") == SHOTS + 1
    for task in ours.tasks.values():
        task.set_fewshot_seed(1234)
    with offline():
        wanted = evaluate(
            lm=stand.backend,
            task_dict={"tasks": dict(ours.tasks), "groups": {}},
            limit=3,
            system_instruction="Be brief.",
            apply_chat_template=True,
            fewshot_as_multiturn=True,
        )
    assert wanted is not None
    for name in names:
        assert asked[name] == asked_of(ours.tasks[name])
        compare(found["results"][name], wanted["results"][name], name)
    history = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer is"}]
    model = HarnessModel(stand.scorer, stand.codes, CONTEXT, Answers(None, "tiny"))
    assert model.apply_chat_template(history, False) == stand.backend.apply_chat_template(history, False)
    (stand.folder / "chat_template.jinja").rename(stand.folder / "aside")
    try:
        bare = TextCodes.of(RunText.open(stand.folder))
        with pytest.raises(ChatError, match="no chat template; leave out --apply-chat-template"):
            run_tasks(ours, stand.scorer, bare, CONTEXT, Answers(None, ""), chat=chat)
    finally:
        (stand.folder / "aside").rename(stand.folder / "chat_template.jinja")


def test_an_interrupted_evaluation_asks_only_what_is_not_answered(stand: Stand, tmp_path: Path) -> None:
    tasks = load_tasks(["piqa", "gsm8k"], stand.data, num_fewshot=0, limit=4, generation=GENERATION)
    unbroken = stand.run(tasks)
    journal, before = tmp_path / "answers.jsonl", stand.scorer.asked

    class Stop(Exception):
        """The kill."""

    def stop(done: int, of: int) -> None:
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        stand.run(tasks, Answers(journal, "tiny"), progress=stop)
    assert stand.scorer.asked - before == 5
    with journal.open("ab") as file:
        file.write(b'["0123", [-1.')  # the line that was being written
    again, before = Answers(journal, "tiny"), stand.scorer.asked
    assert again.number == 5
    with again:
        resumed = stand.run(tasks, again)
    assert stand.scorer.asked - before == 4 * 2 + 4 - 5
    assert resumed["results"] == unbroken["results"]
    assert all(len(json.loads(line)) == 2 for line in journal.read_text().splitlines())
    other, before = Answers(journal, "other weights"), stand.scorer.asked
    stand.run(tasks, other)
    assert stand.scorer.asked - before == 4 * 2 + 4


def test_a_request_without_finite_logits_or_without_tokens_names_its_document(stand: Stand, tmp_path: Path) -> None:
    tasks = load_tasks(["piqa"], stand.data, limit=4)

    class NotFinite(InProcess):
        def likelihoods(self, requests: Sequence[Likelihood], done: Any = ignore) -> list[LikelihoodScore]:
            for index in range(len(requests)):
                done(index, LikelihoodScore(math.nan if index == 5 else -1.0, False))
            raise AssertionError("NaN was taken")

    class Refusing(InProcess):
        def likelihoods(self, requests: Sequence[Likelihood], done: Any = ignore) -> list[LikelihoodScore]:
            raise NotFiniteError("request 6 of 8 is not finite", 5)

    for kind in (NotFinite, Refusing):
        with pytest.raises(NotFiniteError, match="task piqa, document 2: the logits are infinite or NaN"):
            run_tasks(tasks, kind(stand.scorer.model, stand.codes), stand.codes, CONTEXT, Answers(None, ""))
    own = own_task(tmp_path, doc_to_choice=["", "b"], target_delimiter="")
    with pytest.raises(DataError, match="can't be built: IndexError"):
        load_tasks([str(own)])
    own = own_task(
        tmp_path, output_type="loglikelihood", doc_to_choice=None, doc_to_target="{{''}}", target_delimiter=""
    )
    with pytest.raises(DataError, match=r"task own, document 0: the continuation '' has no tokens after its context"):
        check_requests(load_tasks([str(own)]), stand.codes, CONTEXT)
    own = own_task(tmp_path, doc_to_choice=["no"])
    with pytest.raises(DataError, match=r"can't be built: IndexError"):
        load_tasks([str(own)])
    own = own_task(tmp_path, doc_to_target="{{3 if q == 'So?' else 0}}")
    with pytest.raises(
        DataError, match=r"task own, document 1 \(.*rows.jsonl\): the right answer is 3, and there are 2"
    ):
        check_requests(load_tasks([str(own)]), stand.codes, CONTEXT)
    own = own_task(tmp_path, doc_to_text="{{q[99] if q == 'So?' else 0}}")
    with pytest.raises(DataError, match="task own: a prompt can't be made: UndefinedError"):
        check_requests(load_tasks([str(own)]), stand.codes, CONTEXT)
    long = own_task(tmp_path, doc_to_choice=["b " * CONTEXT, "c"])
    with pytest.raises(DataError, match=r"document 0: the continuation has \d+ tokens, more than the model's context"):
        stand.run(load_tasks([str(long)]))
    generating = load_tasks(["gsm8k"], stand.data, num_fewshot=0, generation={"max_gen_toks": CONTEXT})
    with pytest.raises(DataError, match=f"generates {CONTEXT} tokens, and the model's context has {CONTEXT}"):
        check_requests(generating, stand.codes, CONTEXT)


def test_contexts_that_are_too_long_are_counted_and_told(stand: Stand) -> None:
    tasks = load_tasks(["arc_easy", "lambada"], stand.data, limit=2)
    assert stand.run(tasks)["notes"] == []
    tasks = load_tasks(["arc_easy"], stand.data, num_fewshot=20, limit=2)
    (note,) = stand.run(tasks)["notes"]
    assert note.startswith(f"arc_easy: 8 requests longer than the model's context of {CONTEXT} tokens")


def own_task(folder: Path, **changes: Any) -> Path:
    """Write a task of one's own, beside its documents."""
    write_lines(folder / "rows.jsonl.gz".removesuffix(".gz"), [{"q": "Is it?", "gold": 1}, {"q": "So?", "gold": 0}])
    config = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["no", "yes"],
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
        **changes,
    }
    path = folder / "own.yaml"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path


def test_a_task_of_ones_own_runs_and_its_code_only_where_allowed(stand: Stand, tmp_path: Path) -> None:
    found = stand.run(load_tasks([str(own_task(tmp_path))]))
    assert found["results"]["own"]["sample_len"] == 2
    assert set(found["results"]["own"]) >= {"acc,none", "acc_stderr,none"}
    (tmp_path / "code.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\ndef text(doc):\n    return doc['q']\n"
    )
    path = tmp_path / "coded.yaml"
    path.write_text("include: own.yaml\ntask: coded\ndoc_to_text: !function code.text\n")
    with pytest.raises(DataError, match=r"coded.yaml, line 3: !function code.text runs code .* --allow-code"):
        load_tasks([str(path)])
    assert not (tmp_path / "ran").exists()
    assert list(load_tasks([str(path)], allow_code=True).tasks) == ["coded"]
    assert (tmp_path / "ran").exists()


def test_a_group_of_ones_own_is_the_mean_of_its_tasks(stand: Stand, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    group: dict[str, Any] = {"group": "mine", "task": ["piqa", {"task": "copa", "num_fewshot": 1}]}
    path.write_text(json.dumps({**group, "aggregate_metric_list": [{"metric": "acc"}]}))
    tasks = load_tasks([str(path)], stand.data)
    assert [task.get_config("num_fewshot") for task in tasks.tasks.values()] == [0, 1]
    results = run_tasks(tasks, Constant(), stand.codes, CONTEXT, Answers(None, ""))["results"]
    parts = [results[name]["acc,none"] for name in ("piqa", "copa")]
    assert results["mine"]["acc,none"] == pytest.approx(sum(parts) / 2)
    path.write_text(json.dumps({**group, "task": ["piqa", "copaa"]}))
    with pytest.raises(DataError, match="there is no task copaa; did you mean copa"):
        load_tasks([str(path)], stand.data)


def test_a_set_of_the_hub_comes_from_the_cache(stand: Stand, tmp_path: Path) -> None:
    own = own_task(tmp_path)
    with offline():
        datasets.load_dataset(
            "json", data_files={"test": str(tmp_path / "rows.jsonl")}, cache_dir=str(tmp_path / "json")
        )
    made = next((tmp_path / "json").rglob("*.arrow"))
    cached = tmp_path / "cache" / "nobody___nothing" / "default" / "0.0.0" / "0123abc"  # as `datasets` lays it down
    cached.mkdir(parents=True)
    shutil.copy(made, cached / "nothing-test.arrow")
    info = json.loads((made.parent / "dataset_info.json").read_text())
    (cached / "dataset_info.json").write_text(
        json.dumps({**info, "builder_name": "nothing", "dataset_name": "nothing"})
    )
    wanted = stand.run(load_tasks([str(own)]))["results"]["own"]
    own_task(tmp_path, dataset_path="nobody/nothing", dataset_kwargs={"cache_dir": str(tmp_path / "cache")})
    assert stand.run(load_tasks([str(own)]))["results"]["own"] == wanted
    with pytest.raises(
        DataError, match=r"sciq needs allenai/sciq .*and the fields correct_answer, .* nothing is downloaded"
    ):
        load_tasks(["sciq"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_to_text": "{{q"}, "the template doc_to_text is wrong at line 1"),
        ({"doc_to_text": "{{missing}}"}, "can't be built: UndefinedError: 'missing' is undefined"),
        (
            {"metric_list": [{"metric": "nosuch"}]},
            "the metric nosuch is none of lm-eval's own, and nothing is downloaded",
        ),
        (
            {"filter_list": [{"name": "f", "filter": [{"function": "regex", "regex_pattern": "(a"}]}]},
            r"the regex filter_list.f.regex_pattern \(\(a\) does not compile",
        ),
        ({"filter_list": [{"name": "f", "filter": [{"function": "nosuch"}]}]}, "has no function 'nosuch'; take "),
        ({"dataset_kwargs": {"data_files": "none.jsonl"}}, "there is no file .*none.jsonl"),
        (
            {"dataset_path": "nobody/nothing", "dataset_kwargs": None},
            "own needs nobody/nothing with the split test and the fields gold, q, which the cache",
        ),
    ],
)
def test_a_task_that_is_wrong_is_a_sentence_before_anything_runs(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        load_tasks([str(own_task(tmp_path, **changes))])


def test_names_data_and_examples_that_are_missing_are_sentences(stand: Stand, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no task arc_esy; did you mean arc_easy"):
        load_tasks(["arc_esy"], stand.data)
    with pytest.raises(DataError, match=r"the test split of arc_easy is missing: .* give its folder with --data"):
        load_tasks(["arc_easy"])
    write_lines(tmp_path / "arc_easy.jsonl", documents("arc_easy")[1])
    with pytest.raises(DataError, match=r"arc_easy begins with 2 examples, and the train split .* is missing: "):
        load_tasks(["arc_easy"], tmp_path, num_fewshot=2)
    with pytest.raises(
        DataError, match="begins with 31 examples, and there are 30 to draw from; give --num-fewshot 30"
    ):
        load_tasks(["arc_easy"], stand.data, num_fewshot=31)
    with pytest.raises(DataError, match="no question of the subject astronomy"):
        load_tasks(["mmlu_astronomy"], stand.data)
    with pytest.raises(DataError, match="leaderboard has its own numbers of examples"):
        load_tasks(["leaderboard"], stand.data, num_fewshot=3)


class Constant:
    """A scorer that prefers the shorter continuation."""

    def likelihoods(self, requests: Sequence[Likelihood], done: Any = ignore) -> list[LikelihoodScore]:
        found = [LikelihoodScore(-float(len(request.continuation)), False) for request in requests]
        for index, score in enumerate(found):
            done(index, score)
        return found

    def continuations(self, requests: Sequence[Continuation], done: Any = ignore) -> list[str]:
        raise AssertionError("no task here generates")


@pytest.fixture
def all_subjects(stand: Stand, tmp_path: Path) -> Path:
    """The data, with questions of all 57 subjects of MMLU."""
    data = tmp_path / "all"
    for name in ("ARC-Challenge", "hellaswag", "truthfulqa"):
        data.mkdir(exist_ok=True)
        (data / name).symlink_to(stand.data / name)
    for split, count in (("test", 1), ("dev", 5)):
        rows = [{**row, "subject": name} for name in SUBJECTS for row in documents("mmlu", count, count)[0]]
        write_lines(data / "mmlu" / f"{split}.jsonl", rows)
    return data


def test_the_leaderboard_is_the_mean_of_four_with_their_own_examples(stand: Stand, all_subjects: Path) -> None:
    tasks = load_tasks(["leaderboard", "mmlu_stem"], all_subjects, limit=1)
    assert len([name for name in tasks.tasks if name.startswith("mmlu_")]) == 57
    shots = {name: task.get_config("num_fewshot") for name, task in tasks.tasks.items()}
    assert {shots[name] for name in shots if name.startswith("mmlu_")} == {5}
    named = {"leaderboard_arc_challenge": 25, "leaderboard_hellaswag": 10, "truthfulqa_mc2": 0}
    assert {name: shots[name] for name in named} == named
    found = run_tasks(tasks, Constant(), stand.codes, CONTEXT, Answers(None, ""))
    results = found["results"]
    parts = [
        results["leaderboard_arc_challenge"]["acc_norm,none"],
        results["leaderboard_hellaswag"]["acc_norm,none"],
        results["mmlu"]["acc,none"],
        results["truthfulqa_mc2"]["acc,none"],
    ]
    assert results["leaderboard"]["mean,none"] == pytest.approx(sum(parts) / 4)
    assert found["groups"].keys() >= {"leaderboard", "mmlu", "mmlu_stem", "mmlu_humanities"}
    assert results["mmlu_stem"]["sample_len"] == 19
