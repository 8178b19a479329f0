"""What is learned of a conversation, seen by decoding it: the answers and the ends of their turns, for any template."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.finetune.data.chat_templates import BUILT_IN, choose_template
from trimaran.runtime.finetune.data.examples import Document
from trimaran.runtime.finetune.data.records import Origin, Turn, Turns
from trimaran.runtime.finetune.data.templates import ConversationEncoder
from trimaran.runtime.infer.chat import ChatError, ChatTemplate

WITH_SYSTEM = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 2, Touvron et al. 2023: the start of an answer writes nothing, each answer ends with </s>.
INST = (
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '<s>[INST] ' + message.content | trim + ' [/INST]' }}{% else %}"
    "{{ ' ' + message.content | trim + ' </s>' }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_END = MARKED.replace("{% endgeneration %}", "{{ '<|im_end|>' }}{% endgeneration %}").replace(
    "{{ '<|im_end|>\n' }}", "{{ '\n' if message.role == 'assistant' else '<|im_end|>\n' }}"
)
# No token ends a turn: the end of the text does.
ALPACA = (
    "{% for message in messages %}{{ '### ' + message.role + ':\n' + message.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
# As Qwen 3 does: thoughts are in the last answer alone.
FORGETS = (
    "{% for message in messages %}<|im_start|>{{ message.role + '\n' }}"
    "{% if loop.last or message.role != 'assistant' %}{{ message.content }}"
    "{% else %}{{ message.content.split('</think>')[-1] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS: Turns = (
    Turn("user", "Hello, wörld 🙂"),
    Turn("assistant", "Hi.\n\nYes? <|im_end|> is a token."),
    Turn("user", "Who <|im_start|>assistant\nare you?"),
    Turn("assistant", "The  user's friend 🙂"),
)
ORIGIN = Origin("chats.jsonl", 3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    inner.train_from_iterator(["the user and the assistant\n\nHi. user's friend\n"] * 20, trainer)
    inner.add_special_tokens(["<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    inner.save(str(path))
    return Tokenizer.load(path)


def encoder_of(tokenizer: Tokenizer, source: str) -> ConversationEncoder:
    return ConversationEncoder(tokenizer, ChatTemplate(source, "a test"))


def learned_texts(document: Document, tokenizer: Tokenizer) -> list[str]:
    """The text of each run of learned tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], document.learned, [0]]).astype(int)))
    return [tokenizer.decode(document.tokens[start:end].tolist()) for start, end in edges.reshape(-1, 2)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (WITH_SYSTEM, ["Hi.\n\nYes? <|im_end|> is a token.<|im_end|>", "The  user's friend 🙂<|im_end|>"]),
        (BUILT_IN["chatml"], ["Hi.\n\nYes? <|im_end|> is a token.<|im_end|>", "The  user's friend 🙂<|im_end|>"]),
        (MARKED, ["Hi.\n\nYes? <|im_end|> is a token.<|im_end|>", "The  user's friend 🙂<|im_end|>"]),
        (MARKED_END, ["Hi.\n\nYes? <|im_end|> is a token.<|im_end|>", "The  user's friend 🙂<|im_end|>"]),
        (INST, [" Hi.\n\nYes? <|im_end|> is a token. </s>", " The  user's friend 🙂 </s>"]),
        (ALPACA, ["Hi.\n\nYes? <|im_end|> is a token.\n\n", "The  user's friend 🙂\n\n<|endoftext|>"]),
    ],
    ids=["default-system", "chatml", "generation", "generation-with-end", "inst", "no-end"],
)
def test_every_answer_and_the_end_of_its_turn_are_learned(
    source: str, expected: list[str], tokenizer: Tokenizer
) -> None:
    encoder = encoder_of(tokenizer, source)
    document = encoder.conversation(TURNS, ORIGIN)
    assert learned_texts(document, tokenizer) == expected
    last = encoder.conversation(TURNS, ORIGIN, "last_answer")
    assert learned_texts(last, tokenizer) == expected[1:]
    assert np.array_equal(last.tokens, document.tokens)
    later = encoder.conversation(TURNS, ORIGIN, first_turn=3)
    assert learned_texts(later, tokenizer) == expected[1:]
    whole = encoder.conversation(TURNS, ORIGIN, "all")
    assert whole.learned.tolist() == [False] + [True] * (len(whole.tokens) - 1)


@pytest.mark.parametrize(
    ("source", "start"),
    [(BUILT_IN["chatml"], "<|im_start|>assistant"), (ALPACA, "### assistant:"), (MARKED, "<|im_start|>assistant")],
)
def test_a_template_whose_prompts_lack_the_beginning_of_an_answer_is_refused(
    source: str, start: str, tokenizer: Tokenizer
) -> None:
    """Else an answer's role would be learned, or never be asked for."""
    deaf = source.replace("add_generation_prompt", "false")
    for turns in (TURNS, TURNS[:2]):
        with pytest.raises(DataError, match="does not look at add_generation_prompt") as caught:
            encoder_of(tokenizer, deaf).conversation(turns, ORIGIN)
        assert f"chats.jsonl:3: the chat template of a test writes {start!r} before an answer" in str(caught.value)
    with pytest.raises(DataError, match="does not look at add_generation_prompt"):
        encoder_of(tokenizer, deaf).prompt(TURNS[:1], ORIGIN)


@pytest.mark.parametrize("source", [WITH_SYSTEM, BUILT_IN["chatml"], MARKED, INST, ALPACA])
def test_an_answer_follows_the_tokens_of_its_prompt(source: str, tokenizer: Tokenizer) -> None:
    """What precedes the first learned token of each answer is what the model gets when it has to answer."""
    encoder = encoder_of(tokenizer, source)
    document = encoder.conversation(TURNS, ORIGIN)
    starts = np.flatnonzero(np.diff(document.learned.astype(int)) == 1) + 1
    for start, answer in zip(starts, (1, 3), strict=True):
        assert document.tokens[:start].tolist() == encoder.prompt(TURNS[:answer], ORIGIN).tokens.tolist()


@pytest.mark.parametrize("source", [WITH_SYSTEM, BUILT_IN["chatml"], MARKED, INST])
def test_tokens_and_masks_are_those_of_transformers(source: str, tokenizer: Tokenizer) -> None:
    turns = (*TURNS[:1], Turn("assistant", "Hi.\n\nYes?"), Turn("user", "Who are you?"), Turn("assistant", "A friend"))
    messages = [turn.message for turn in turns]
    peer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.definition))
    found: dict[str, Any] = peer.apply_chat_template(
        messages, chat_template=source, return_dict=True, return_assistant_tokens_mask=source == MARKED
    )
    document = encoder_of(tokenizer, source).conversation(turns, ORIGIN)
    assert document.tokens.tolist() == found["input_ids"]
    if source == MARKED:  # theirs leaves the end of the turn out, as the marks do
        end = tokenizer.id_of("<|im_end|>")
        ours = document.learned & (document.tokens != end)
        assert ours.astype(int).tolist() == found["assistant_masks"]


def test_a_spelled_token_in_a_message_is_no_control_token(tokenizer: Tokenizer) -> None:
    document = encoder_of(tokenizer, WITH_SYSTEM).conversation(TURNS, ORIGIN)
    assert np.count_nonzero(document.tokens == tokenizer.id_of("<|im_end|>")) == 5  # the system and four turns
    assert np.count_nonzero(document.tokens == tokenizer.id_of("<|im_start|>")) == 5


def test_a_template_that_rewrites_history_is_refused(tokenizer: Tokenizer) -> None:
    turns = (TURNS[0], Turn("assistant", "<think>hm</think>Hi."), TURNS[2], Turn("assistant", "<think></think>Yes."))
    encoder = encoder_of(tokenizer, FORGETS)
    assert learned_texts(encoder.conversation(turns[:2], ORIGIN), tokenizer) == ["<think>hm</think>Hi.<|im_end|>"]
    with pytest.raises(DataError, match=r"chats\.jsonl:3: the chat template of a test rewrites history: .* turn 2"):
        encoder.conversation(turns, ORIGIN)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ messages[0].content }}<|im_end|>", "leaves nothing to learn; its answers must appear in the text"),
        ("{{ raise_exception('no system') }}", "chats.jsonl:3: the chat template of a test refuses these messages"),
    ],
)
def test_a_template_that_leaves_nothing_to_learn_is_refused(source: str, words: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=words):
        encoder_of(tokenizer, source).conversation(TURNS[:2], ORIGIN)


def test_marks_that_no_answer_has_are_passed_over(tokenizer: Tokenizer) -> None:
    source = MARKED.replace("== 'assistant' %}{% gen", "== 'model' %}{% gen")
    assert source != MARKED
    document = encoder_of(tokenizer, source).conversation(TURNS[:2], ORIGIN)
    assert learned_texts(document, tokenizer) == ["Hi.\n\nYes? <|im_end|> is a token.<|im_end|>"]


def test_without_a_template_turns_are_refused_and_texts_are_not(tokenizer: Tokenizer) -> None:
    encoder = ConversationEncoder(tokenizer, None)
    with pytest.raises(DataError, match=r"chats\.jsonl:3 has turns, and the model has no chat template .* to chatml"):
        encoder.conversation(TURNS, ORIGIN)
    document = encoder.plain("the user", " and the friend")
    assert learned_texts(document, tokenizer) == [" and the friend<|endoftext|>"]
    assert tokenizer.decode(document.tokens.tolist()) == "the user and the friend<|endoftext|>"
    whole = encoder.plain("", "the user")
    assert whole.learned.tolist() == [False] + [True] * (len(whole.tokens) - 1)


def test_a_prompt_begins_an_answer_and_nothing_of_it_is_learned(tokenizer: Tokenizer) -> None:
    document = encoder_of(tokenizer, WITH_SYSTEM).prompt(TURNS[:1], ORIGIN)
    assert tokenizer.decode(document.tokens.tolist()).endswith("wörld 🙂<|im_end|>\n<|im_start|>assistant\n")
    assert document.num_learned == 0


def test_the_commonest_end_of_a_turn_is_counted(tokenizer: Tokenizer) -> None:
    encoder = encoder_of(tokenizer, WITH_SYSTEM)
    encoder.conversation(TURNS, ORIGIN)
    assert encoder.ends == {tokenizer.id_of("<|im_end|>"): 2}


def test_new_tokens_of_a_template_are_added_after_the_last(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chosen = choose_template("llama3", tokenizer, None)
    assert chosen is not None
    new = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    assert chosen.new_tokens == new
    grown = tokenizer.with_special_tokens(chosen.new_tokens)
    assert [grown.id_of(name) for name in new] == [tokenizer.vocab_size + index for index in range(4)]
    assert grown.first_difference(tokenizer) is None
    assert (grown.eot_id, tokenizer.id_of("<|eot_id|>")) == (tokenizer.eot_id, None)
    document = ConversationEncoder(grown, chosen.template).conversation(TURNS[:2], ORIGIN)
    assert document.tokens[0] == tokenizer.vocab_size
    assert learned_texts(document, grown) == ["Hi.\n\nYes? <|im_end|> is a token.<|eot_id|>"]
    assert choose_template("chatml", tokenizer, None).new_tokens == ()  # type: ignore[union-attr]


def test_the_template_is_the_specs_or_that_of_the_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert choose_template(None, tokenizer, tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text(WITH_SYSTEM)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    found = choose_template(None, tokenizer, tmp_path)
    assert found is not None
    assert (found.template.source, found.is_own) == (WITH_SYSTEM, False)
    own = tmp_path / "mine.jinja"
    own.write_text("{{ eos_token }}<|mine|>")
    found = choose_template(str(own), tokenizer, tmp_path)
    assert found is not None
    assert (found.new_tokens, found.is_own, found.template.names) == (("<|mine|>",), True, {"eos_token": "</s>"})
    with pytest.raises(DataError, match=r"finetune\.chat_template 'nowhere' can't be read: No such file"):
        choose_template("nowhere", tokenizer, tmp_path)
    own.write_text("{% for %}")
    wrong = choose_template(str(own), tokenizer, tmp_path)
    assert wrong is not None
    with pytest.raises(ChatError, match="is wrong at line 1"):
        wrong.template.render([{"role": "user", "content": "x"}])
