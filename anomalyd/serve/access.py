"""Who may do what: bearer tokens from a file that holds their hashes only.

    # name   scopes        SHA-256 of the token, in hexadecimal
    camera   score         2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
    operator score,admin   fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9

A token is random and long, as `openssl rand -hex 32` makes them, so that its hash needs no salt.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from pathlib import Path

from anomalyd.errors import UsageError
from anomalyd.serve.problems import Problem

__all__ = ["ADMIN", "SCORE", "Access"]

SCORE, ADMIN = "score", "admin"
SCOPES = (SCORE, ADMIN)
LINE = re.compile(r"([A-Za-z0-9._-]{1,64})\s+([a-z,]+)\s+(?:sha256:)?([0-9a-f]{64})")
LONGEST = 4096
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="anomalyd"'}


@dataclass(frozen=True)
class Token:
    """One line of the file."""

    name: str
    scopes: frozenset[str]
    digest: bytes


class Access:
    """The tokens of a file.

    Raises:
        UsageError: a file that cannot be read or holds no token, a line that is none.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._tokens = _read(file)

    def reload(self) -> None:
        """Read the file again; where it is bad, the tokens stay as they are.

        Raises:
            UsageError: it is bad.
        """
        self._tokens = _read(self._file)

    def grants(self, scope: str) -> bool:
        """Whether any token has this scope."""
        return any(scope in token.scopes for token in self._tokens)

    def check(self, authorization: bytes | None, scope: str) -> str:
        """The name of the token in an Authorization header.

        Raises:
            Problem: 401 no token or an unknown one, 403 one without that scope.
        """
        kind, _, given = (authorization or b"")[:LONGEST].partition(b" ")
        digest = hashlib.sha256(given.strip()).digest()
        found = None
        for token in self._tokens:  # all of them, so that time tells nothing
            if hmac.compare_digest(token.digest, digest):
                found = token
        if kind.lower() != b"bearer" or found is None:
            detail = "send a token that this daemon knows: Authorization: Bearer TOKEN"
            raise Problem(401, "unauthorized", detail, headers=CHALLENGE)
        if scope not in found.scopes:
            raise Problem(403, "forbidden", f"this token does not have the scope {scope}")
        return found.name


def _read(file: Path) -> list[Token]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"--tokens {file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--tokens {file}: is no text file of tokens") from None
    tokens = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = LINE.fullmatch(text)
        scopes = frozenset(found[2].split(",")) if found else frozenset()
        if found is None or not scopes <= set(SCOPES):
            # The line is not shown: somebody may have put the token itself there.
            raise UsageError(
                f"--tokens {file}: line {number} must be NAME SCOPES SHA256, with the scopes "
                f"{' and '.join(SCOPES)} and the hash of a token in hexadecimal"
            )
        tokens.append(Token(found[1], scopes, bytes.fromhex(found[3])))
    if not tokens:
        raise UsageError(f"--tokens {file}: holds no token; nobody could ask anything")
    return tokens
