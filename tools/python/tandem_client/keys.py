"""Key files (protocol/key_file.h): who this client is, and which coordinator it trusts."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from tandem_client.errors import TandemError

_FIELDS = ("name", "role", "public", "secret", "server")


@dataclass(frozen=True)
class KeyFile:
    name: str
    public: str
    secret: str
    server: str


def read_key_file(path: str) -> KeyFile:
    """Refuses a file that others may read, and one that lacks the secret or the server's key."""
    try:
        info = os.lstat(path)
        if not stat.S_ISREG(info.st_mode) or info.st_mode & 0o077:
            raise TandemError("refused", f"key file {path}: must be a plain file of mode 0600")
        with open(path, encoding="utf-8") as file:
            lines = file.read(4096).splitlines()
    except OSError as error:
        raise TandemError("refused", f"key file {path}: {error.strerror}") from None
    if not lines or lines[0] != "tandem-key 1":
        raise TandemError("invalid", f'key file {path}: line 1 must be "tandem-key 1"')
    values: dict[str, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        name, _, value = line.partition(" ")
        if line and name not in _FIELDS:
            raise TandemError("invalid", f"key file {path}: line {number}: unknown field")
        values[name] = value
    missing = [name for name in ("name", "public", "secret", "server") if not values.get(name)]
    if missing:
        raise TandemError("invalid", f"key file {path}: {', '.join(missing)} must be there")
    return KeyFile(values["name"], values["public"], values["secret"], values["server"])
