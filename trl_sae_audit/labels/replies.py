"""Replies of language models, kept on disk, and what those cost that are not there yet."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ..errors import AuditError
from ..io.cache import cache_root
from .chat import Chat
from .prompts import Messages

_CHARACTERS_A_TOKEN = 4
_TOKENS_A_MESSAGE = 4


@dataclass(frozen=True)
class Cost:
    """What some conversations cost: how many there are, how many of them were answered before, and tokens of the others, about."""

    conversations: int
    known: int
    prompt_tokens: int
    reply_tokens: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __str__(self) -> str:
        return (
            f"{self.conversations:,} requests, {self.known:,} of them answered before; about {self.prompt_tokens:,} tokens to read and "
            f"at most {self.reply_tokens:,} to write"
        )


class KeptReplies:
    """A model whose replies are kept on disk: the same conversation is never asked twice.

    `max_tokens` are those of a reply; the model has its `thinking_tokens` besides.

    Args:
        chat: the model.
        path: of the file; by default in the cache of this package.
    """

    _AT_ONCE = 64

    def __init__(self, chat: Chat, path: Path | None = None) -> None:
        self.chat = chat
        self._path = path or cache_root() / "replies.sqlite"

    def cost(self, conversations: Sequence[Messages], max_tokens: int) -> Cost:
        """What it would cost to ask."""
        new = [
            each
            for each, reply in zip(conversations, self._known(conversations, max_tokens), strict=True)
            if reply is None
        ]
        length = sum(
            len(part["content"]) // _CHARACTERS_A_TOKEN + _TOKENS_A_MESSAGE for each in new for part in each
        )
        written = len(new) * self._room(max_tokens)
        return Cost(len(conversations), len(conversations) - len(new), length, written)

    def reply(self, conversations: Sequence[Messages], max_tokens: int, progress: bool = False) -> list[str]:
        """A reply to each conversation. Each is kept as soon as it is there, so that a stopped command goes on."""
        from tqdm.auto import tqdm

        found = self._known(conversations, max_tokens)
        keys = [self._key(each, max_tokens) for each in conversations]
        missing = list({keys[place]: place for place, reply in enumerate(found) if reply is None}.values())
        new: dict[str, str] = {}
        for start in tqdm(
            range(0, len(missing), self._AT_ONCE), desc=self.chat.name, disable=None if progress else True
        ):
            places = missing[start : start + self._AT_ONCE]
            replies = self.chat.reply([conversations[place] for place in places], self._room(max_tokens))
            for place, reply in zip(places, replies, strict=True):
                self._keep(keys[place], reply)
                new[keys[place]] = reply
        return [new[key] if reply is None else reply for key, reply in zip(keys, found, strict=True)]

    def _room(self, max_tokens: int) -> int:
        return max_tokens + self.chat.thinking_tokens

    def _key(self, messages: Messages, max_tokens: int) -> str:
        asked = [self.chat.source, self.chat.name, self.chat.version, messages, self._room(max_tokens)]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def _known(self, conversations: Sequence[Messages], max_tokens: int) -> list[str | None]:
        if not self._path.exists():
            return [None] * len(conversations)
        with closing(self._open()) as database:
            return [
                next(
                    (row[0] for row in database.execute("SELECT reply FROM replies WHERE key = ?", (key,))),
                    None,
                )
                for key in (self._key(each, max_tokens) for each in conversations)
            ]

    def _keep(self, key: str, reply: str) -> None:
        with closing(self._open()) as database, database:
            database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, reply))

    def _open(self) -> sqlite3.Connection:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(self._path, timeout=60)
            database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            raise AuditError(
                f"The replies kept in {self._path} cannot be used ({error}); delete that file."
            ) from error
        return database
