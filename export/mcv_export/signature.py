"""Who vouches for a bundle: a signature of its `mcv.json`, which lists the sha256 of every other file, in minisign's format.

Signing is minisign's own business (`minisign -S -m BUNDLE/mcv.json`); here a signature is only checked.
Source of the format: https://jedisct1.github.io/minisign/ ("Signature format", "Public key format").
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from mcv_runtime.bundle.manifest import FILE_NAME
from mcv_runtime.errors import BundleCorruptError, BundleError, OptionError, printable
from mcv_runtime.files import MakeError, read_regular, read_text

SIGNATURE_NAME = f"{FILE_NAME}.minisig"
_BYTES = 1 << 14
_PLAIN, _HASHED = b"Ed", b"ED"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """An Ed25519 key as minisign writes it: an id of 8 bytes, and the key."""

    number: bytes
    key: bytes

    @classmethod
    def read(cls, given: str) -> PublicKey:
        """From a `.pub` file, or from the line of 56 letters that stands in one; raises `OptionError`."""
        text = given if len(given) == 56 and not os.path.lexists(given) else _line(given)
        data = _decoded(text, f"{printable(given)[:200]} is no public key of minisign", OptionError, 42)
        if data[:2] != _PLAIN:
            raise OptionError(f"{printable(given)[:200]} is a key of another kind than Ed25519")
        return cls(data[2:10], data[10:])


def check_signature(bundle: Path, key: PublicKey) -> str:
    """The trusted comment of the bundle's signature, if it is `key`'s; else raises `BundleError` or `BundleCorruptError`."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        raise OptionError("checking a signature needs cryptography: pip install 'minicpmv-onnx[sign]'") from None
    path = bundle / SIGNATURE_NAME
    missing = BundleError(f"{bundle} has no {SIGNATURE_NAME}: who made it signs it with `minisign -S -m {bundle / FILE_NAME}`")
    text = read_text(path, error=BundleCorruptError, missing=lambda _: missing, within=bundle, max_bytes=_BYTES)
    lines = text.splitlines()
    damaged = f"{path} is no signature of minisign"
    if len(lines) != 4 or not lines[2].startswith("trusted comment: "):
        raise BundleCorruptError(damaged)
    signed = _decoded(lines[1], damaged, BundleCorruptError, 74)
    whole = _decoded(lines[3], damaged, BundleCorruptError, 64)
    kind, number, signature = signed[:2], signed[2:10], signed[10:]
    if kind not in (_PLAIN, _HASHED):
        raise BundleCorruptError(f"{path} is a signature of another kind than Ed25519")
    if number != key.number:
        raise BundleCorruptError(f"{path} was made with another key ({number[::-1].hex().upper()})")
    comment = lines[2].removeprefix("trusted comment: ")
    manifest = read_regular(bundle / FILE_NAME, error=BundleCorruptError, within=bundle)
    try:
        ours = Ed25519PublicKey.from_public_bytes(key.key)
        ours.verify(signature, hashlib.blake2b(manifest).digest() if kind == _HASHED else manifest)
        ours.verify(whole, signature + comment.encode())
    except InvalidSignature:
        raise BundleCorruptError(f"{bundle} is not what was signed: {SIGNATURE_NAME} does not fit its {FILE_NAME}") from None
    return printable(comment)


def _line(path: str) -> str:
    """The one line of a key's file that is no comment."""
    lines = read_text(path, error=OptionError, max_bytes=_BYTES).split("\n")
    return next((line.strip() for line in lines if line.strip() and not line.startswith("untrusted comment:")), "")


def _decoded(text: str, wrong: str, error: MakeError, length: int) -> bytes:
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if len(data) != length:
        raise error(wrong)
    return data
