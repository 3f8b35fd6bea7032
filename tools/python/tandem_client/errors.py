"""What can go wrong, with the codes of protocol/schema/common.capnp."""

from __future__ import annotations


class TandemError(Exception):
    """An answer that is not ok, or no answer.

    `code` is the wire's name: invalid, notFound, refused, unavailable, busy, timeout, corrupt,
    cancelled, internal or conflict.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
