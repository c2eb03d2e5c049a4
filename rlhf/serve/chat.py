"""`rlhf chat RUN [RUN ...]`: talk to policies in the terminal, or from a script."""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf.config import SEED, option
from rlhf.data.records import Message, RecordError, Samples, Scorer
from rlhf.errors import UserError

LEAVE = ("/exit", "/quit")
# all but tab and line feed, as they are shown
CONTROL_CODES = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}
HELP = """\
/system TEXT  begin again under this system prompt; without TEXT, under none
/again        answer the last message once more, with other random numbers
/reset        begin again
/exit         leave (Ctrl-D too; Ctrl-C ends an answer)"""


@dataclass
class ChatConfig:
    """Talk to one policy, or to several side by side, each in a conversation of its own. Lines of
    standard input are messages, or commands: /system, /again, /reset, /exit, /help.
    """

    runs: list[str] = option(help="folders of runs, adapters or models")
    prompt: str | None = option(
        None, "answer this and end; - reads it from standard input; default: a conversation"
    )
    system: str | None = option(None, "a system prompt")
    voice: str | None = option(None, "a brand voice (YAML); its score is shown under each answer")
    temperature: float = option(1.0, "of sampling; 0 takes the likeliest token", low=0)
    top_p: float = option(1.0, "sample from the likeliest tokens of this share", above=0, high=1)
    max_response_length: int = option(512, "tokens of an answer", low=1)
    seed: int = option(0, "of sampling; the same conversation gets the same answers", **SEED)

    def validate(self) -> None:
        if not self.runs:
            raise UserError("'runs' is empty: give at least one run")


@dataclass
class Speaker:
    """A policy and its side of the conversation."""

    policy: Any
    messages: list[Message] = field(default_factory=list)


class Chat:
    """A conversation with each of several policies."""

    def __init__(self, config: ChatConfig, scorer: Scorer | None):
        from rlhf.engines.sampling import Sampling
        from rlhf.serve.policies import load

        self.config, self.scorer = config, scorer
        self.sampling = Sampling(config.max_response_length, config.temperature, top_p=config.top_p)
        self.speakers = list(map(Speaker, load(config.runs, with_bases=False)))
        self.system = config.system
        # how many answers to the last message there have been before
        self.sample = 0
        self.reset()

    def reset(self) -> None:
        """Begin again."""
        for speaker in self.speakers:
            speaker.messages = []
            if self.system:
                speaker.messages.append({"role": "system", "content": self.system})

    def say(self, text: str) -> None:
        """Give a message to each policy, and print each answer as it comes. Raises UserError where a
        policy cannot take it, and the message is forgotten.
        """
        self.sample = 0
        # a message that one policy cannot take is forgotten by all
        with self._restoring():
            for speaker in self.speakers:
                speaker.messages.append({"role": "user", "content": text})
            self._answer()

    def again(self) -> None:
        """Answer the last message once more. Raises UserError where there is none."""
        if not any(message["role"] == "assistant" for message in self.speakers[0].messages):
            raise UserError("there is no message to answer once more")
        self.sample += 1
        with self._restoring():
            for speaker in self.speakers:
                speaker.messages.pop()
            self._answer()

    @contextlib.contextmanager
    def _restoring(self) -> Iterator[None]:
        """Take the conversations back to where they stood if anything is raised inside."""
        before = [list(speaker.messages) for speaker in self.speakers]
        try:
            yield
        except BaseException:
            for speaker, messages in zip(self.speakers, before, strict=True):
                speaker.messages = messages
            raise

    def _answer(self) -> None:
        """Let each policy answer its last message: print the answer with its score, and add it to the
        conversation.
        """
        # of several, each under its name
        has_headings = len(self.speakers) > 1
        for speaker in self.speakers:
            if has_headings:
                print(f"[{speaker.policy.name}]")
            prompt, ids, text = self._stream(speaker)
            if self.scorer is not None:
                # before the answer is one of the messages: these are the prompt that it is scored by
                print(self._score(speaker, prompt, ids, text))
            speaker.messages.append({"role": "assistant", "content": text})
            if has_headings:
                print()

    def _stream(self, speaker: Speaker) -> tuple[list[int], list[int], str]:
        """Print an answer as it is sampled; return the ids of the prompt and its own, and its text."""
        from rlhf.data.encode import encode_prompt
        from rlhf.engines.sampling import sample_key
        from rlhf.serve.worker import StreamedText

        policy = speaker.policy
        try:
            prompt = encode_prompt(policy.tokenizer, speaker.messages)
            limit = policy.room(prompt, None, self.sampling.max_new_tokens)
        except (RecordError, UserError) as error:
            raise UserError(f"{policy.name}: {error}. /reset begins again") from None
        text = StreamedText(policy.decoder, [])

        def show(piece: str, end: str = "") -> None:
            # codes that would move the cursor or ring the bell
            shown = piece.translate(CONTROL_CODES) if sys.stdout.isatty() else piece
            print(shown, end=end, flush=True)

        def each_token(row: int, token: int, logprob: float) -> None:
            show(text.add(token))

        # the same conversation draws the same numbers
        key = sample_key(self.config.seed, "chat", prompt, self.sample)
        sampling = replace(self.sampling, max_new_tokens=limit)
        done = policy.generate([prompt], [key], sampling, each_token)
        show(text.end(), end="\n")
        if not done.ended[0]:
            print(f"(cut off after {limit} tokens)", file=sys.stderr)
        return prompt, done.response_ids[0], text.text

    def _score(self, speaker: Speaker, prompt: list[int], ids: list[int], text: str) -> str:
        """Return the score of an answer and its parts, on one line."""
        # a scorer may punish an answer that was cut off
        has_ended = bool(ids) and ids[-1] in speaker.policy.stop_ids
        samples = Samples()
        about = {"ended": has_ended, "prompt_ids": prompt, "response_ids": ids}
        samples.add(list(speaker.messages), text, {"group": ""}, **about)
        scores = self.scorer(samples)
        parts = []
        for name, values in scores.breakdown.items():
            # a part that does not apply is NaN, and the voice's own score is the total
            if "/" in name and not math.isnan(values[0]):
                parts.append(f"{name.rpartition('/')[2]} {values[0]:.2f}")
        return f"  score {scores.total[0]:.2f} ({', '.join(parts)})"


def chat(config: ChatConfig, scorer: Scorer | None = None) -> None:
    """Talk until /exit or the end of standard input; `scorer` judges each answer."""
    if config.prompt is not None:
        question = sys.stdin.read().strip() if config.prompt == "-" else config.prompt
        if not question:
            raise UserError("'prompt' is empty: there is nothing to answer")
        attempt(Chat(config, scorer).say, question, is_terminal=False)
        return
    talk = Chat(config, scorer)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        names = ", ".join(speaker.policy.name for speaker in talk.speakers)
        print(f"{names}: write a message, or /help")
    # a script ends with its input, a person with /exit
    for line in lines(is_terminal):
        if line.split()[0] in LEAVE:
            return
        attempt(functools.partial(obey, talk), line, is_terminal=is_terminal)


def attempt(act: Callable[[str], None], line: str, *, is_terminal: bool) -> None:
    """Do something with a line. A person may interrupt it, and goes on after an error; a script
    ends.
    """
    try:
        act(line)
    except KeyboardInterrupt:
        if not is_terminal:
            # as shells give it for Ctrl-C
            sys.exit(130)
        print("\n(interrupted; this message is forgotten)", file=sys.stderr)
    except UserError as error:
        if not is_terminal:
            raise
        print(f"error: {error}", file=sys.stderr)


def lines(is_terminal: bool) -> Iterator[str]:
    """Yield what is typed or read, line by line, without empty lines."""
    if is_terminal:
        # arrows and history, where Python has it
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    while True:
        try:
            line = input("> ") if is_terminal else input()
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line.strip()


def obey(talk: Chat, line: str) -> None:
    """Do what a line says. Raises UserError for an unknown command."""
    word, _, rest = line.partition(" ")
    if not word.startswith("/"):
        talk.say(line)
        return

    def new_system() -> None:
        talk.system = rest.strip() or None
        talk.reset()

    commands: dict[str, Callable[[], None]] = {
        "/help": lambda: print(HELP),
        "/reset": talk.reset,
        "/again": talk.again,
        "/system": new_system,
    }
    if word not in commands:
        raise UserError(f"unknown command '{word}'. Commands:\n{HELP}")
    commands[word]()
