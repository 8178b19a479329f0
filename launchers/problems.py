"""What `trimaran check` can tell of a run before its ranks start: files, length of the text, device, launcher."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trimaran.launchers.before_start import check_code, check_device, check_nodes, check_run_folder, check_writable
from trimaran.launchers.env.commands import find_mpirun
from trimaran.launchers.terminal import sentence
from trimaran.runtime.files import check_regular
from trimaran.runtime.spec import RunSpec


def problems_here(spec: RunSpec, kind: str) -> list[str]:
    """Return a sentence for everything on this machine that would end the run before its first step.

    Args:
        kind: the launcher. Of a Slurm job the device is not looked at, for it runs on other machines.
    """
    looks: list[Callable[[RunSpec], object]] = [
        lambda spec: check_run_folder(Path(spec.train.output_dir)),
        _check_resume,
        _check_schedule,
        _check_cache,
        _check_text,
        _check_tokenizer,
        _check_weights,
        lambda spec: check_nodes(spec, kind),
        lambda spec: _check_launcher(kind),
    ]
    if kind != "slurm":
        looks.append(_check_packages)
        looks.append(lambda spec: check_device(spec, spec.world_size // spec.launcher.nodes))
    found = []
    for look in looks:
        try:
            look(spec)
        except (ValueError, OSError, RuntimeError) as error:  # of the last kind is CheckpointError
            found.append(sentence(error))
    return found


def _check_schedule(spec: RunSpec) -> None:
    from trimaran.runtime.train.pipeline import schedule_of

    schedule_of(spec)


def _check_packages(spec: RunSpec) -> None:
    if spec.zero.backend == "deepspeed":
        from trimaran.runtime.zero.deepspeed_setup import check_installed

        check_installed()


def _check_cache(spec: RunSpec) -> None:
    """Refuse a cache in which nothing can be prepared; one that has something may be read-only."""
    cache = Path(spec.data.cache_dir)
    if not (cache / "data").is_dir():
        check_writable("data.cache_dir", cache)


def _check_text(spec: RunSpec) -> None:
    """Refuse sources that are not there, and a text that is too short whatever its tokens are."""
    from trimaran.runtime.data.account import Account
    from trimaran.runtime.data.sources import QUICKSTART, SECTION_CHARACTERS, SourceFile, find_files

    data, cache = spec.data, Path(spec.data.cache_dir)
    if spec.finetune is not None:
        from trimaran.launchers.data.examples import first_examples
        from trimaran.runtime.finetune.run_files import check_vocabulary

        _, tokenizer = first_examples(spec, 1)
        check_vocabulary(spec, tokenizer)
        if spec.finetune.rl is not None:
            from trimaran.runtime.finetune.rl.inputs import check_reward_runs

            check_code(spec, allow_code=True)  # check runs none of it
            check_reward_runs(spec, tokenizer)
        return
    if data.has_recipe:
        from trimaran.runtime.data.recipe.of_spec import recipe_of

        recipe_of(spec, os.environ, fetch=False)  # how much text a recipe keeps can't be seen yet
        return
    named = [source for source in data.source if source != QUICKSTART]
    found = find_files(named, data.text_field, Account(), cache) if named else []
    files = [check_regular(file.path) for file in found]
    if QUICKSTART in data.source:
        files.append(cache / QUICKSTART / "corpus.jsonl")
    if not all(file.exists() and not SourceFile(file, "").compression for file in files):
        return  # how long the text is can't be seen yet
    # A token for each byte at most, and one for each end; an 8-bit encoding takes up to twice the bytes in UTF-8.
    most = 2 * sum(file.stat().st_size for file in files)
    seq_len = spec.train.seq_len
    if most <= seq_len:
        raise ValueError(
            f"the text of data.source has at most {most:,} tokens, too few for one sample of train.seq_len "
            f"({seq_len}); add text to data.source or lower train.seq_len"
        )
    # One section more than the share, for at least one is held out.
    held_out = int(data.held_out_fraction * most) + 4 * SECTION_CHARACTERS
    if spec.train.eval_interval and held_out <= seq_len:
        raise ValueError(
            f"the held-out text will have at most {held_out:,} tokens, too few for one sample of train.seq_len "
            f"({seq_len}); add text to data.source, raise data.held_out_fraction or set train.eval_interval to 0"
        )


def _check_tokenizer(spec: RunSpec) -> None:
    if spec.data.tokenizer is None:
        return
    from trimaran.runtime.data.tokens.build import check_tokenizer
    from trimaran.runtime.data.tokens.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(Path(spec.data.tokenizer), spec.data.end_of_text)
    check_tokenizer(tokenizer, spec.transformer.objective == "masked_lm", spec.transformer.vocab_size)


def _check_resume(spec: RunSpec) -> bool:
    """Return whether the run goes on from a checkpoint of its folder; refuse one from which it can't."""
    if not (Path(spec.train.output_dir) / "checkpoints").is_dir():
        return False
    from trimaran.runtime.train.state import resume_path

    return resume_path(spec) is not None


def _check_weights(spec: RunSpec) -> None:
    """Refuse initial weights of another model; a folder that can't be resumed is a problem of its own."""
    with suppress(ValueError, OSError, RuntimeError):  # told by `_check_resume`
        if _check_resume(spec):
            return
    if spec.checkpoint.init_from is not None:
        from trimaran.runtime.train.init_from import check_initial_weights

        check_initial_weights(spec)


def _check_launcher(kind: str) -> None:
    if kind == "mpi":
        find_mpirun()
    if kind == "slurm" and shutil.which("sbatch") is None:
        raise ValueError("sbatch is not on this machine's PATH; submit from a machine of the cluster")
