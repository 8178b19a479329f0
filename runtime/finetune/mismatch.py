"""KTO's mismatched documents: each prompt with an answer to another one. No torch."""

import numpy as np
import numpy.typing as npt

from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.permutation import Int64Array
from trimaran.runtime.finetune.data.examples import Document
from trimaran.runtime.finetune.data.store import ExampleSet
from trimaran.runtime.finetune.documents import Documents


def mismatched(examples: ExampleSet, seq_len: int) -> Documents:
    """Return for each rated example its prompt with the answer of the next example of the split with another prompt.

    So the pairs depend on the data alone. What is longer than `seq_len` tokens is cut at its end.

    Raises:
        DataError: all examples have the same prompt.
    """
    prompts = np.array([_prompt_length(examples.document(number)) for number in range(examples.num_documents)])
    lengths = examples.example_lengths
    partners = _partners([_prompt(examples, number, prompts) for number in range(len(prompts))])

    def read(number: int) -> Document:
        asked, answered = examples.document(number), examples.document(int(partners[number]))
        prompt, start = asked.tokens[: prompts[number]], prompts[partners[number]]
        tokens = np.concatenate([prompt, answered.tokens[start:]])
        learned = np.concatenate([np.zeros(len(prompt), dtype=np.bool_), answered.learned[start:]])
        return Document.of(tokens, learned).cut(seq_len, "right")

    return Documents(np.minimum(prompts + (lengths - prompts)[partners], seq_len), read)


def _prompt_length(document: Document) -> int:
    """Return how many tokens precede the first learned one."""
    return int(document.learned.argmax()) if document.learned.any() else len(document.tokens)


def _prompt(examples: ExampleSet, number: int, lengths: npt.NDArray[np.int64]) -> bytes:
    return examples.document(number).tokens[: lengths[number]].tobytes()


def _partners(prompts: list[bytes]) -> Int64Array:
    """Return for each prompt the number of the next one that differs, from the last one on to the first."""
    count = len(prompts)
    following = np.zeros(count, dtype=np.int64)
    if count and all(prompt == prompts[0] for prompt in prompts):
        raise DataError(
            "kto compares each prompt with an answer to another one, and all rated examples have the same prompt; add "
            "others, or set finetune.preference.loss to dpo and give pairs"
        )
    for index in range(2 * count - 1, -1, -1):  # twice round, so that the last ones find the first
        at, after = index % count, (index + 1) % count
        following[at] = after if prompts[after] != prompts[at] else following[after]
    return following
