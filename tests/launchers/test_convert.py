"""`trimaran import` and `trimaran export` from end to end: wrong input is a sentence, a stopped one leaves nothing."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.launchers.runs import Command, Outcome, Workplace, run_script, trimaran
from tests.runtime.checkpoint.checkpoint_ranks import lines_without_this_package
from tests.runtime.huggingface.huggingface_folders import corpus, llama, logits_of, rewrite, saved
from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.folder_lock import FolderInUse, FolderLock
from trimaran.runtime.spec import load_spec
from trimaran.runtime.train.init_from import tokenizer_of_weights
from trimaran.runtime.train.metrics import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, the run that was imported from it, and text to train on."""
    folder = tmp_path_factory.mktemp("convert")
    saved(llama(), folder / "models" / "small", tokenizer=True)
    (folder / "corpus.txt").write_text(corpus())
    outcome = trimaran(folder, "import", "models/small")
    assert outcome.code == 0, outcome.err
    return folder


def assert_sentence(outcome: Outcome, *words: str, code: int = 2) -> None:
    assert outcome.code == code, outcome.out + outcome.err
    sentence = outcome.err[outcome.err.rindex("error: ") :]
    assert all(word in sentence for word in words), sentence
    assert "Traceback" not in outcome.err
    assert len(sentence.splitlines()) <= 6


def train(folder: Path, *overrides: str) -> Outcome:
    """Train on from the imported run, as the import says, on its own text and with little of everything."""
    short = [
        "data.source=[corpus.txt]",
        "data.cache_dir=cache",
        "data.held_out_fraction=0.1",
        "train.num_steps=4",
        "train.seq_len=32",
        "lr_schedule.warmup_steps=1",
        "launcher.threads_per_rank=1",
        "logging.tensorboard=false",
        *overrides,
    ]
    return trimaran(
        folder, "train", "runs/small/spec.yaml", *(part for override in short for part in ("--set", override))
    )


def test_import_says_what_it_did_and_what_can_be_done_next(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "models", tmp_path / "models")
    outcome = trimaran(tmp_path, "import", "models/small")
    assert outcome.code == 0
    assert outcome.out == ""
    for words in (
        "random tokens, 64 positions: max abs error",
        "real text,",
        "at a logit scale of",
        "llama model imported into runs/small",
        "text: trimaran chat runs/small --mode continue",
        'trimaran train runs/small/spec.yaml --set "data.source=[my-texts]"',
    ):
        assert words in outcome.err, outcome.err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["small"]


def test_the_imported_run_generates_at_any_layout(place: Path) -> None:
    texts = []
    for layout in ((), ("--tp", "2", "--pp", "2")):
        outcome = trimaran(
            place, "generate", "runs/small", "--prompt", "abc", "--temperature", "0", "--max-new-tokens", "6", *layout
        )
        assert outcome.code == 0, outcome.err
        texts.append(outcome.out)
    assert texts[0] == texts[1]
    assert len(texts[0]) > 3


def test_training_goes_on_from_the_weights_at_another_layout(place: Path) -> None:
    """The first loss is that of the imported model on the same tokens: nothing is lost on the way to the layout."""
    layout = ("parallel.tp=2", "parallel.pp=2", "train.output_dir=runs/tuned")
    outcome = train(place, *layout, "train.num_steps=4", "train.eval_interval=2", "train.eval_batches=1")
    assert outcome.code == 0, outcome.err
    assert (
        "starting from the weights of runs/small/checkpoints/step-00000000 (step 0), with a fresh optimizer"
        in outcome.out
    )
    rows = read_metrics(place / "runs" / "tuned" / "metrics.jsonl")
    first = next(row["loss"] for row in rows if "loss" in row)
    assert first == pytest.approx(mean_loss(place / "models" / "small", place / "runs" / "tuned"), abs=1e-4)
    for name in ("chat_template.jinja", "tokenizer_config.json", "import.json"):
        assert (place / "runs" / "tuned" / name).read_bytes() == (place / "runs" / "small" / name).read_bytes()

    shutil.rmtree(place / "cache")
    resumed = train(place, *layout, "train.num_steps=6", "train.eval_interval=2", "train.eval_batches=1")
    assert resumed.code == 0, resumed.err
    assert "resuming at step 4" in resumed.out
    assert "starting from the weights" not in resumed.out

    exported = trimaran(place, "export", "runs/tuned", "tuned-model")
    assert exported.code == 0, exported.err
    card = (place / "tuned-model" / "README.md").read_text()
    assert "It began as `small`" in card
    assert "| steps | 6 |" in card
    assert "held-out loss" in card
    assert (place / "tuned-model" / "chat_template.jinja").exists()
    assert AutoModelForCausalLM.from_pretrained(place / "tuned-model").config.architectures == ["LlamaForCausalLM"]


def mean_loss(model: Path, run: Path) -> float:
    """The loss of transformers' model on the first global batch of a run."""
    from trimaran.models.parallel.group import Group
    from trimaran.runtime.data.prepare import open_prepared
    from trimaran.runtime.train.samples import build_loader

    spec = load_spec(run / "spec.yaml")
    data = open_prepared(Path(json.loads((run / "logs" / "task.json").read_text())["data"]))
    losses = []
    for rank in range(spec.parallel.dp):
        replicas = Group("dp", tuple(range(spec.parallel.dp)), rank)
        for batch in build_loader(spec, data.train, data.tokenizer, replicas).microbatches(0):
            logits = logits_of(model, batch.tokens)
            losses.append(F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()))
    return float(torch.stack(losses).mean())


def test_weights_of_another_shape_are_refused_before_the_data_is_prepared(place: Path) -> None:
    outcome = train(
        place,
        "model.num_layers=4",
        "model.ffn_hidden_size=64",
        "train.output_dir=runs/other",
        "data.source=[missing.txt]",
    )
    assert_sentence(
        outcome,
        "runs/small holds weights of another model",
        "model.num_layers: 3 -> 4",
        "model.ffn_hidden_size: 48 -> 64",
    )
    assert not (place / "runs" / "other" / "checkpoints").exists()
    assert_sentence(
        train(place, "model.activation=geglu", "train.output_dir=runs/other"), "model.activation: swiglu -> geglu"
    )


def test_what_a_run_may_choose_anew_is_told_and_taken(place: Path) -> None:
    outcome = train(
        place,
        "model.rotary_base=20000.0",
        "model.hidden_dropout=0.1",
        "train.output_dir=runs/longer",
        "train.num_steps=2",
    )
    assert outcome.code == 0, outcome.err
    assert "model.rotary_base: 10000.0 -> 20000.0" in outcome.err
    assert "hidden_dropout" not in outcome.err


def test_text_is_tokenized_with_the_tokenizer_of_the_weights_and_another_is_refused(place: Path) -> None:
    new = (
        "data.tokenizer=null",
        "data.tokenizer_vocab_size=280",
        "train.output_dir=runs/new-text",
        "train.num_steps=2",
    )
    outcome = train(place, *new)
    assert outcome.code == 0, outcome.err
    assert "runs/small/tokenizer.json, the tokenizer of checkpoint.init_from" in " ".join(outcome.err.split())
    known = Tokenizer.load(place / "runs" / "small" / "tokenizer.json")
    assert Tokenizer.load(place / "runs" / "new-text" / "tokenizer.json").definition == known.definition
    spec = load_spec(place / "runs" / "new-text" / "spec.yaml")
    assert tokenizer_of_weights(spec, resumed=True) == Path("runs/new-text/tokenizer.json")

    Tokenizer.train(["another text"], 280).save(place / "other.json")
    words = (
        "other.json is not the tokenizer of checkpoint.init_from: token",
        "set data.tokenizer to runs/small/tokenizer",
    )
    assert_sentence(train(place, "data.tokenizer=other.json", "train.output_dir=runs/other"), *words)
    shutil.copytree(place / "runs" / "small", place / "runs" / "bare", ignore=shutil.ignore_patterns("tokenizer.json"))
    bare = ("checkpoint.init_from=runs/bare", "data.tokenizer=null", "train.output_dir=runs/other")
    assert_sentence(train(place, *bare), "runs/bare has no tokenizer.json", "set data.tokenizer")


def test_weights_that_are_not_there_are_refused(place: Path) -> None:
    outcome = train(place, "checkpoint.init_from=runs/nothing", "train.output_dir=runs/other")
    assert_sentence(outcome, "runs/nothing does not exist", "trimaran import")


def test_training_in_the_folder_of_an_import_is_refused(place: Path) -> None:
    outcome = train(place, "train.output_dir=runs/small")
    assert_sentence(outcome, "holds weights alone", "checkpoint.init_from", "train.output_dir to another folder")


def test_a_run_of_ours_is_exported_and_loaded_with_its_tokenizer(
    finished: tuple[Workplace, Outcome], tmp_path: Path
) -> None:
    """A run of 4 ranks with its own tokenizer: transformers loads it by path alone and computes its held-out loss."""
    workplace, _ = finished
    outcome = trimaran(tmp_path, "export", str(workplace.run), "exported", "--max-shard-gib", "0.001")
    assert outcome.code == 0, outcome.err
    assert "LlamaForCausalLM in float32" in outcome.err
    check_lines_without_this_package(workplace.run, tmp_path)
    model, tokenizer = (
        loader.from_pretrained(tmp_path / "exported") for loader in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert tokenizer.eos_token == "<|endoftext|>"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    held_out = [row["held_out_loss"] for row in read_metrics(workplace.run / "metrics.jsonl") if "held_out_loss" in row]
    text = (workplace.folder / "corpus.txt").read_text()[:2000]
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][:, :480].view(-1, 16)
    with torch.no_grad():
        loss = float(model(input_ids=tokens, labels=tokens).loss)
    assert held_out[-1] is not None
    assert abs(loss - held_out[-1]) < 0.5 < abs(loss - math.log(tokenizer.vocab_size)), (
        "it has learned what the run has learned"
    )


WITHOUT_THIS_PACKAGE = """
import sys

for name in ["trimaran", *(name for name in sys.modules if name.startswith("trimaran."))]:
    sys.modules[name] = None  # an import of it raises ModuleNotFoundError
"""


def check_lines_without_this_package(run: Path, folder: Path) -> None:
    """Open a run's weights by the page's lines, where nothing of ours can be imported: they are those of `exported`."""
    checkpoint = max((run / "checkpoints").iterdir())
    lines = lines_without_this_package(checkpoint)
    (folder / "open.py").write_text(f"{WITHOUT_THIS_PACKAGE}\n{lines}\nnp.savez('weights.npz', **weights)\n")
    outcome = run_script(folder, folder / "open.py")
    assert outcome.code == 0, outcome.err
    with np.load(folder / "weights.npz") as found:
        ours = {name: torch.from_numpy(found[name]) for name in found.files}
    opened = Checkpoint.open(checkpoint)
    assert {name for name in opened.names() if "weight" in opened.keys(name)} == ours.keys()
    assert all(torch.equal(opened.read_global(name, "weight"), ours[name]) for name in ours)
    exported = [tensor for file in (folder / "exported").glob("*.safetensors") for tensor in load_file(file).values()]
    values = [torch.cat([each.flatten() for each in tensors]).sort().values for tensors in (ours.values(), exported)]
    assert torch.equal(*values), "an export names and arranges them anew"


def test_export_writes_beside_the_run_by_default(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "runs" / "small", tmp_path / "small")
    outcome = trimaran(tmp_path, "export", "small", "--dtype", "bfloat16")
    assert outcome.code == 0, outcome.err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small" / "huggingface").dtype == torch.bfloat16
    assert "# small\n" in (tmp_path / "small" / "huggingface" / "README.md").read_text()
    assert_sentence(trimaran(tmp_path, "export", "small"), "small/huggingface is there already")


# --- what goes wrong


def test_bad_input_ends_with_a_sentence_and_leaves_nothing(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "models" / "small", tmp_path / "model")
    rewrite(tmp_path / "model", model__norm__weight=None)
    assert_sentence(trimaran(tmp_path, "import", "model"), "model.norm.weight")
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert_sentence(trimaran(tmp_path, "import", "pytorch_model.bin"), "pickle (pytorch_model.bin)", "never does")
    assert_sentence(
        trimaran(tmp_path, "import", "model/model.safetensors"), "is not a GGUF file", "folder with config.json"
    )
    assert_sentence(trimaran(tmp_path, "import", "nothing"), "nothing does not exist")
    assert_sentence(trimaran(tmp_path, "export", "nothing"), "nothing does not exist")
    assert_sentence(trimaran(tmp_path, "export", "model"), "has no whole checkpoint")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["err", "model", "out", "pytorch_model.bin"]


SLOW_PROOF = """
import time
from pathlib import Path
import trimaran.runtime.huggingface.proof as proof

def wait(*arguments):
    Path(__file__).with_name("waiting").touch()
    time.sleep(1000)

proof.our_logits = wait
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("what", ["import", "export"])
def test_nothing_is_left_of_a_conversion_that_is_stopped(
    place: Path, tmp_path: Path, what: str, number: signal.Signals
) -> None:
    """Stopped when all is written but the proof. A killed one can't clean up; the next with the same target does."""
    shutil.copytree(place / "models" / "small", tmp_path / "model")
    shutil.copytree(place / "runs" / "small", tmp_path / "run")
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(SLOW_PROOF)
    arguments = [what, "model" if what == "import" else "run", "made/target"]
    with Command.start(tmp_path, arguments, {"PYTHONPATH": str(tmp_path / "fault")}) as command:
        command.wait_until((tmp_path / "fault" / "waiting").exists)
        assert len(list((tmp_path / "made").glob(".target.*.tmp"))) == 1
        with pytest.raises(FolderInUse, match=r"made/target is in use: `trimaran import or export` on host "):
            FolderLock.beside(tmp_path / "made" / "target", "trimaran import")
        os.kill(command.process.pid, number)
        outcome = command.finish()
    if number != signal.SIGKILL:
        assert outcome.code == 128 + number
        assert outcome.last_line == f"stopped by {number.name}; nothing is left of what was half written"
        assert list((tmp_path / "made").iterdir()) == []
    else:
        assert not (tmp_path / "made" / "target").exists()
        assert trimaran(tmp_path, *arguments).code == 0
        assert [path.name for path in (tmp_path / "made").iterdir()] == ["target"]
