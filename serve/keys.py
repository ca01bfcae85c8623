"""Who may ask: API keys by name, of which only hashes are kept.

    python -m serve.keys FILE NAME [--requests-per-minute N]

makes a key for NAME, adds its hash to FILE, and prints the key, this once. FILE is YAML, `NAME: {sha256: HEX,
requests_per_minute: N, disabled: true}`; the last two may be left out. It is read again when it changes, so that a line
less, or `disabled`, takes a key back while the service runs.
"""

from __future__ import annotations

import argparse
import hashlib
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import UserError
from pipelines.files import write_text
from pipelines.progress import say
from serve.errors import ApiError

_LOOK_EVERY_S = 1.0
_BEARER = "bearer "
_FIELDS = {"sha256", "requests_per_minute", "disabled"}


@dataclass(frozen=True)
class Key:
    """Whose it is, and what it allows; `requests_per_minute` 0: as many as the service can take."""

    name: str
    requests_per_minute: int = 0
    disabled: bool = False


class Keys:
    """The keys of a file, by hash; always as the file is now, give or take a second.

    Raises:
        UserError: it cannot be read, or is not what the module says.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known = read(file)
        self._stamp = _stamp(file)
        self._looked = time.monotonic()

    def who(self, authorization: str) -> Key:
        """The key that a header `Authorization: Bearer KEY` carries.

        Raises:
            ApiError: 401, none or an unknown one; 403, it is disabled.
        """
        self._look()
        if not authorization.lower().startswith(_BEARER):
            raise ApiError(
                401, "no API key; send one in the header 'Authorization: Bearer KEY'", code="invalid_api_key"
            )
        found = self._known.get(_hash(authorization[len(_BEARER) :].strip()))
        if found is None:
            raise ApiError(401, "this API key is not known here", code="invalid_api_key")
        if found.disabled:
            raise ApiError(403, f"the API key of '{found.name}' is disabled", code="key_disabled")
        return found

    def _look(self) -> None:
        """Read the file again where it has changed. One that is gone knows no key; one that is broken is an editor at
        work, and the last good one holds.
        """
        if time.monotonic() - self._looked < _LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        if (stamp := _stamp(self.file)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._known = read(self.file) if stamp else {}
        except UserError as error:
            say(f"keys: {error}; those from before hold")


def read(file: Path) -> dict[str, Key]:
    """Hash -> key.

    Raises:
        UserError: naming the file, and the entry that is wrong.
    """
    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: no file of API keys ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: no file of API keys; 'python -m serve.keys {file} NAME' makes one")
    found: dict[str, Key] = {}
    for name, entry in content.items():
        if not isinstance(entry, dict) or not set(entry) <= _FIELDS or not _is_hash(entry.get("sha256")):
            raise UserError(f"{file}: '{name}' is not NAME: {{sha256: 64 hexadecimal digits, ...}}")
        rate = entry.get("requests_per_minute", 0)
        if type(rate) is not int or rate < 0:
            raise UserError(f"{file}: requests_per_minute of '{name}' is a whole number, 0: no limit; not {rate!r}")
        found[entry["sha256"].lower()] = Key(str(name), rate, bool(entry.get("disabled", False)))
    return found


def add(file: Path, name: str, requests_per_minute: int = 0) -> str:
    """Make a key, write its hash down, and return it.

    Raises:
        UserError: the file is no file of keys, or has one of this name.
    """
    known = read(file) if file.is_file() and file.stat().st_size else {}
    if any(key.name == name for key in known.values()):
        raise UserError(f"{file}: '{name}' has a key already; take its entry away first")
    key = f"sk-{secrets.token_urlsafe(32)}"
    entry: dict[str, Any] = {"sha256": _hash(key)}
    entry |= {"requests_per_minute": requests_per_minute} if requests_per_minute else {}
    before = file.read_text(encoding="utf-8") if file.is_file() else ""
    write_text(file, before + yaml.safe_dump({name: entry}, default_flow_style=None))
    return key


def _hash(key: str) -> str:
    """Keys are long and random, so that a plain hash tells nothing about them."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _is_hash(text: Any) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text.lower()) <= set("0123456789abcdef")


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """Changes with the file, also where a link leads to another one, as in a mounted secret."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def main(argv: list[str] | None = None) -> int:
    """Print a new key."""
    parser = argparse.ArgumentParser(prog="python -m serve.keys", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("name")
    parser.add_argument("--requests-per-minute", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        print(add(options.file, options.name, options.requests_per_minute))
    except UserError as error:
        say(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
