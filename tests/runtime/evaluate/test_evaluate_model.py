"""A model to evaluate is opened from a run, a checkpoint or a Hugging Face folder, and continues texts by requests."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.runtime.huggingface.huggingface_folders import VOCAB, llama, saved, tokenizer_of
from trimaran.runtime.checkpoint.manifest import CheckpointError
from trimaran.runtime.evaluate.engine.replica import Engine, Numbered, decode_continuations, encode_continuations
from trimaran.runtime.evaluate.engine.requests import Continuation, Likelihood
from trimaran.runtime.evaluate.engine.score import check_causal
from trimaran.runtime.evaluate.engine.scorer import Scorer
from trimaran.runtime.evaluate.engine.weights import load_stages, open_model
from trimaran.runtime.huggingface.importing import import_model
from trimaran.runtime.infer.generate import generate
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.mesh import lone_mesh

CPU = torch.device("cpu")
GREEDY = SamplingParams(12, temperature=0.0, context="stop")
DRAWN = SamplingParams(9, temperature=1.0, seed=3, stop_tokens=(0,), context="stop")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face folder, and the run that was imported from it."""
    place = tmp_path_factory.mktemp("models")
    folder = saved(llama(), place / "model", tokenizer=True)
    return folder, import_model(folder, place / "run").run


def engine_at(path: Path) -> Engine:
    model, mesh = open_model(path), lone_mesh()
    return Engine(load_stages(model.origin, model.spec, mesh, CPU), mesh, model.spec, model.text.tokenizer)


def test_folder_run_and_checkpoint_hold_the_same_model(places: tuple[Path, Path]) -> None:
    folder, run = places
    requests = [Likelihood((1, 2, 3), (4, 5)), Likelihood((1, 2), (VOCAB - 1,))]
    found = [
        Scorer(engine_at(place)).likelihoods(requests) for place in (folder, run, run / "checkpoints/step-00000000")
    ]
    assert found[0] == found[1] == found[2]
    opened = [open_model(place) for place in (folder, run)]
    assert [model.step for model in opened] == [None, 0]
    assert opened[0].text.stop_tokens == opened[1].text.stop_tokens
    assert all(model.text.is_imported and model.text.template is not None for model in opened)
    assert open_model(run, step=0).origin == opened[1].origin
    assert open_model(run, tp=2, pp=3, dp=5).spec.parallel.dp == 5


def no_checkpoint(folder: Path, run: Path) -> Path:
    shutil.rmtree(run / "checkpoints/step-00000000")
    return run


def truncated(folder: Path, run: Path) -> Path:
    file = next((run / "checkpoints/step-00000000").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-5])
    return run / "checkpoints/step-00000000"


def cut_weights(folder: Path, run: Path) -> Path:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    return folder


def without_tokenizer(folder: Path, run: Path) -> Path:
    (folder / "tokenizer.json").unlink()
    return folder


def with_anothers_tokenizer(folder: Path, run: Path) -> Path:
    tokenizer_of(VOCAB + 40).save(run / "tokenizer.json")
    return run


@pytest.mark.parametrize(
    ("spoil", "layout", "words"),
    [
        (lambda folder, run: run / "nowhere", {}, "nowhere is no folder"),
        (no_checkpoint, {}, "has no whole checkpoint and no config.json"),
        (lambda folder, run: run, {"step": 7}, "has no checkpoint of step 7"),
        (lambda folder, run: folder, {"step": 7}, "has no checkpoints to choose from"),
        (truncated, {}, "truncated or overwritten"),
        (cut_weights, {}, "is not a whole safetensors file"),
        (without_tokenizer, {}, "has no tokenizer.json"),
        (with_anothers_tokenizer, {}, "it is another model's tokenizer"),
        (lambda folder, run: run, {"pp": 4}, "num_layers"),
        (lambda folder, run: folder, {"tp": 5}, "num_heads"),
    ],
)
def test_what_cannot_be_evaluated_is_told_before_weights_are_read(
    spoil: Callable[[Path, Path], Path],
    layout: dict[str, Any],
    words: str,
    places: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    folder, run = (shutil.copytree(place, tmp_path / place.name) for place in places)
    with pytest.raises((ValueError, CheckpointError), match=words):
        open_model(spoil(folder, run), **layout)


def test_requests_that_the_model_cannot_read_are_told(places: tuple[Path, Path]) -> None:
    scorer = Scorer(engine_at(places[0]))
    for context, continuation, words in (
        ((), (1,), "the context of request 2 has 0 tokens"),
        ((1,), (), "the continuation of request 2 has 0 tokens"),
        ((1,) * 96, (2, 3), "the continuation of request 2 has 2 tokens, and it must have from 1 to 1"),
        ((1,), (VOCAB,), f"the continuation of request 2 has the token {VOCAB}"),
    ):
        with pytest.raises(ValueError, match=words):
            scorer.likelihoods([Likelihood((1,), (2,)), Likelihood(context, continuation)])
    with pytest.raises(ValueError, match="the context of request 1 has 97 tokens"):
        scorer.continuations([Continuation((1,) * 97, (), GREEDY)])
    with pytest.raises(ValueError, match="the batch size"):
        Scorer(engine_at(places[0]), 0)


def test_continuations_are_those_of_generate_whatever_their_batch(places: tuple[Path, Path]) -> None:
    engine = engine_at(places[1])
    assert engine.tokenizer is not None
    prompts = [tuple(engine.tokenizer.encode(text)) for text in ("abc", "bad cafe", "face a fed bed", "h")]
    requests = [Continuation(prompt, (), (GREEDY, DRAWN)[number % 2]) for number, prompt in enumerate(prompts * 2)]
    expected = []
    for number, request in enumerate(requests):
        (made,) = generate(
            engine.stages, engine.mesh, engine.spec, [request.context], request.sampling, first_sample=number
        )
        tokens = [token for token in made.tokens if token not in request.sampling.stop_tokens]
        expected.append(
            engine.tokenizer.decode([*request.context, *tokens])[len(engine.tokenizer.decode(request.context)) :]
        )
    sizes: tuple[Any, ...] = (1, 3, "auto")
    for size in sizes:
        told: dict[int, str] = {}
        scorer = Scorer(engine, size)
        texts = scorer.continuations(requests, lambda number, text: told.update({number: text}))  # noqa: B023
        assert texts == expected == [told[number] for number in range(len(requests))]
    stop = expected[0][2:4]
    stopped = Scorer(engine).continuations([Continuation(prompts[0], (stop,), GREEDY)])
    assert stopped == [expected[0][: expected[0].index(stop)]]
    numbered = [Numbered(number, request) for number, request in enumerate(requests)]
    assert decode_continuations(encode_continuations(numbered)) == numbered


def test_models_that_predict_hidden_tokens_are_refused() -> None:
    config: Any = SimpleNamespace(has_head=True, is_causal=False, objective="masked_lm")
    with pytest.raises(ValueError, match="predicts hidden tokens from both sides"):
        check_causal(config)
