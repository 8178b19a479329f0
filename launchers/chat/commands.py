"""What a line that begins with a slash does in a conversation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from trimaran.launchers.chat.saved import load, place_in, save
from trimaran.launchers.chat.session import SETTINGS, Session
from trimaran.models.fields import counted
from trimaran.runtime.infer.modes import did_you_mean


@dataclass(frozen=True)
class Done:
    """What a command leaves to do.

    Args:
        text: for the user.
        retries: whether the last question is put again.
        quits: whether the conversation ends.
    """

    text: str = ""
    retries: bool = False
    quits: bool = False


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        run: from the session, the folder of conversations and the rest of the line.
        usage: the rest of the line, in words.
    """

    run: Callable[[Session, Path, str], Done]
    usage: str
    words: str


def run_command(line: str, session: Session, folder: Path) -> Done:
    """Run a line that begins with a slash.

    Raises:
        ValueError: it is no command (the nearest is told), or the command refuses; a sentence.
        OSError: a file can't be read or written.
    """
    name, _, rest = line[1:].partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = did_you_mean(name, list(COMMANDS)).replace("mean ", "mean /")
        other = "; /help names them, and a text that begins with a slash is sent with two"
        raise ValueError(f"there is no command /{name}{near or other}")
    return command.run(session, folder, rest.strip())


def _system(session: Session, folder: Path, rest: str) -> Done:
    told = session.dialogue.system
    if not rest:
        return Done("there is no system message" if told is None else f"system message: {told}")
    session.dialogue = replace(session.dialogue, system=None if rest == "-" else rest)
    return Done("the system message is removed" if rest == "-" else "the system message is set, from the next turn on")


def _retry(session: Session, folder: Path, rest: str) -> Done:
    session.dialogue.undone()  # which refuses where there is nothing to answer again
    return Done(retries=True)


def _undo(session: Session, folder: Path, rest: str) -> Done:
    last = session.dialogue.exchanges[-1:]
    session.dialogue = session.dialogue.undone()
    return Done(f"taken back: {_short(last[0].question)}")


def _save(session: Session, folder: Path, rest: str) -> Done:
    path = place_in(folder, rest)
    save(path, session.dialogue, session.identity)
    session.saved = session.dialogue.exchanges
    return Done(f"saved to {path}: {counted(len(session.dialogue.exchanges), 'turn')}")


def _load(session: Session, folder: Path, rest: str) -> Done:
    path = place_in(folder, rest)
    found, before = load(path), session.dialogue.exchanges
    lost = f"; of {counted(len(before), 'turn')} before it not all were saved" if before != session.saved else ""
    session.dialogue, session.identity = found
    session.saved = session.dialogue.exchanges
    return Done(f"loaded {path}: {counted(len(session.dialogue.exchanges), 'turn')}{lost}")


def _set(session: Session, folder: Path, rest: str) -> Done:
    name, _, value = rest.partition(" ")
    if value:
        session.set(name, value.strip())
        return Done(f"{name} is {getattr(session.sampling, name.replace('-', '_'))}")
    if name:
        raise ValueError(f"/set {name} needs a value, such as /set temperature 0.5")
    return Done("\n".join(f"{each} {getattr(session.sampling, each)}" for each in SETTINGS))


def _stats(session: Session, folder: Path, rest: str) -> Done:
    answers = [answer for turn in session.turns for answer in turn.answers]
    if not answers:
        return Done("nothing was answered yet")
    last = session.turns[-1].answers
    rows = [("last turn", last), ("all turns", answers)]
    lines = []
    for name, of in rows:
        prompt, cached = sum(each.prompt_tokens for each in of), sum(each.cached for each in of)
        drawn = sum(len(each.drawn) for each in of)
        lines.append(f"{name}: {prompt:,} prompt tokens, {cached:,} of them cached, {drawn:,} new tokens")
    speed, first = last[-1].tokens_per_second, last[-1].first_token_s
    lines.append(
        f"last answer: {'no' if speed is None else f'{speed:.1f}'} tokens/s, "
        f"{'no token came' if first is None else f'first token after {first:.2f} s'}"
    )
    history, remembered = counted(len(session.dialogue.exchanges), "turn"), len(session.dialogue.remembered)
    lines.append(f"history: {history}, {remembered} in the context of {session.asker.backend.context:,} tokens")
    return Done("\n".join(lines))


def _help(session: Session, folder: Path, rest: str) -> Done:
    names = {f"/{name} {command.usage}".rstrip(): command.words for name, command in COMMANDS.items()}
    return Done("\n".join(f"{name:22}{words}" for name, words in names.items()) + f"\n{KEYS}")


def _quit(session: Session, folder: Path, rest: str) -> Done:
    return Done(quits=True)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


KEYS: Final = (
    "Enter sends; Alt-Enter, or a backslash at the end of a line, goes on in a new line. Ctrl-C ends an answer; at the "
    "prompt, Ctrl-C twice or Ctrl-D leaves."
)
COMMANDS: Final[Mapping[str, Command]] = MappingProxyType(
    {
        "system": Command(_system, "[TEXT]", "show or set what the model is told first; - removes it"),
        "retry": Command(_retry, "", "another answer to the last question"),
        "undo": Command(_undo, "", "take the last question and its answer back"),
        "save": Command(_save, "FILE", "write the conversation to a new file, or to its own"),
        "load": Command(_load, "FILE", "go on with a saved conversation"),
        "set": Command(_set, "[NAME VALUE]", "show or change settings, such as temperature 0.5"),
        "stats": Command(_stats, "", "tokens, how many were cached, tokens/s, first token"),
        "help": Command(_help, "", "these lines"),
        "quit": Command(_quit, "", "leave"),
    }
)
