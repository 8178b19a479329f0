"""The data section: the text, and how it becomes tokens."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from trimaran.models.fields import INTEGRAL, Count, Positive
from trimaran.runtime.data.tokens.vocabulary import SMALLEST_VOCABULARY
from trimaran.runtime.spec.sections.common import SECTION_CONFIG, FilePath, Folder, Fraction, PositiveFraction
from trimaran.runtime.spec.sections.recipe.clean import CleanSection
from trimaran.runtime.spec.sections.recipe.corpora import Corpora, Key, NumBytes, Sources, Stages
from trimaran.runtime.spec.sections.recipe.dedup import DecontaminateSection, DedupSection
from trimaran.runtime.spec.sections.recipe.filter import FilterSection

# A worker takes a quarter of a GiB before it has a document.
WorkerMemory = Annotated[float, Field(ge=0.5, allow_inf_nan=False)]
ExampleFormat = Literal[
    "auto", "text", "messages", "sharegpt", "alpaca", "prompt_completion", "preference", "unpaired", "prompts"
]
TokenizerSize = Annotated[int, Field(ge=SMALLEST_VOCABULARY, le=2**31 - 1), INTEGRAL]


class DataSection(BaseModel):
    """The text, and how it becomes tokens."""

    model_config = SECTION_CONFIG

    source: Sources = Field(
        default_factory=lambda: ["quickstart"],
        description="Files, folders or globs of .txt, .jsonl, .ndjson and .json, also .gz, .bz2 or .xz of them; "
        "quickstart is a small built-in corpus.",
    )
    text_field: Key = Field(default="text", description="Key of the text in a JSON record.")
    format: ExampleFormat = Field(
        default="auto",
        description="finetune: how a record holds its example: text, messages, sharegpt, alpaca, prompt_completion, "
        "preference, unpaired or prompts (auto: by the fields of a file's first record).",
    )
    corpora: Corpora = Field(
        default={}, description="Several corpora by name, each with its weight in the blend, in place of source."
    )
    stages: Stages | None = Field(
        default=None, description="Weights of the corpora that change at counts of trained tokens (null: they do not)."
    )
    clean: CleanSection | None = Field(
        default=None, description="Cleaning of each document, in a fixed order (null: none, and no HTML)."
    )
    filter: FilterSection | None = Field(default=None, description="Which documents are removed (null: none).")
    dedup: DedupSection | None = Field(default=None, description="Which copies are removed (null: none).")
    decontaminate: DecontaminateSection | None = Field(
        default=None, description="Evaluation sets that are kept out of the text (null: none)."
    )
    max_lost_fraction: Fraction = Field(
        default=0.05,
        description="Largest share of the files, documents or characters that may be passed over, left out or replaced "
        "for one reason.",
    )
    cache_dir: Folder = Field(
        default=".cache/trimaran", description="Folder for downloaded text, tokenizers and token shards."
    )
    tokenizer: FilePath | None = Field(
        default=None,
        description="Existing tokenizer.json to use (null: that of checkpoint.init_from, or train one on the source).",
    )
    end_of_text: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Token of data.tokenizer that ends a document (null: the one that the files beside it name, or one "
        "with a usual name).",
    )
    tokenizer_vocab_size: TokenizerSize = Field(
        default=4096, description="Tokens of the tokenizer that is trained on the source."
    )
    tokenizer_train_bytes: NumBytes | None = Field(
        default=None, description="Bytes of text that the tokenizer is trained on, a sample (null: all text)."
    )
    held_out_fraction: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        default=0.02, description="Share of the text kept out of training, for evaluation."
    )
    mask_fraction: PositiveFraction | None = Field(
        default=None,
        description="masked_lm, permutation_lm: share of a sample's tokens that is predicted (null: 0.15, Devlin et "
        "al. 2019; 1/6, Yang et al. 2019).",
    )
    shuffle: bool = Field(
        default=True, description="Whether the samples of an epoch are drawn in a seeded random order."
    )
    max_document_bytes: NumBytes = Field(
        default=64 << 20, description="Largest document that is prepared; a larger one is left out and counted."
    )
    task_timeout_s: Positive = Field(
        default=60.0,
        description="Longest that preparing one document may take, in seconds; it is then left out and counted.",
    )
    workers: Count | None = Field(
        default=None, description="Processes that prepare the text (null: the usable cores of the machine)."
    )
    worker_memory: WorkerMemory | None = Field(
        default=None, description="Memory that one of them may take, in GiB (null: no limit)."
    )

    @property
    def has_recipe(self) -> bool:
        """Whether the text is prepared by the stages of a recipe, on workers."""
        sections = (self.clean, self.filter, self.dedup, self.decontaminate)
        return bool(self.corpora) or any(section is not None for section in sections)
