"""A bundle's signature in minisign's format: one that minisign made, and what does not fit."""

import base64
import hashlib
import shutil

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from mcv_export.cli import app
from mcv_export.signature import PublicKey, check_signature
from mcv_runtime.bundle.folder import DEFAULT
from mcv_runtime.errors import BundleCorruptError, BundleError, McvError, OptionError

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY_OF_MINISIGN = "RWRk9Qj/NX3FGiFHXIaU7hkzRG/SwdAQuaC/mfEUXpokFdaJjOsrc/VN"
MADE_BY_MINISIGN = """\
untrusted comment: signature from minisign secret key
RURk9Qj/NX3FGqFo1O5Z9tkHptrCx7CzJLZQhgbW0wVcmBKPJxM28p21e+pq5WBEg6C24SYgHy5vDNPqs16c6LQWWPc9StHAFgE=
trusted comment: of the tests
5NgdnjtNx6Fc+5r8mTRs7Y0Qgf5meoijGcZqlt8Z2tOWea370hoKJFhCoobIFVtEMlRs55NQWUl192nFyhOVBw==
"""
NUMBER = b"\x01\x02\x03\x04\x05\x06\x07\x08"


def public(key=KEY, number=NUMBER):
    return base64.b64encode(b"Ed" + number + key.public_key().public_bytes_raw()).decode()


def sign(data, *, key=KEY, number=NUMBER, comment="built by the tests", kind=b"ED"):
    signature = key.sign(hashlib.blake2b(data).digest() if kind == b"ED" else data)
    whole = base64.b64encode(key.sign(signature + comment.encode())).decode()
    body = base64.b64encode(kind + number + signature).decode()
    return f"untrusted comment: anything\n{body}\ntrusted comment: {comment}\n{whole}\n"


@pytest.fixture
def bundle(tmp_path):
    return shutil.copytree(DEFAULT, tmp_path / "bundle")


@pytest.fixture
def signed(bundle):
    (bundle / "mcv.json.minisig").write_text(sign((bundle / "mcv.json").read_bytes()))
    return bundle


def test_what_minisign_itself_signed(tmp_path):
    """minisign 0.11: `minisign -G -W -p key.pub -s key.sec`, `minisign -S -s key.sec -m mcv.json -t "of the tests"`."""
    (tmp_path / "mcv.json").write_text("what is signed\n")
    (tmp_path / "mcv.json.minisig").write_text(MADE_BY_MINISIGN)
    assert check_signature(tmp_path, PublicKey.read(KEY_OF_MINISIGN)) == "of the tests"
    (tmp_path / "mcv.json").write_text("what is signed \n")
    with pytest.raises(BundleCorruptError, match="not what was signed"):
        check_signature(tmp_path, PublicKey.read(KEY_OF_MINISIGN))


@pytest.mark.parametrize("kind", [b"ED", b"Ed"])
def test_a_key_as_a_line_and_as_a_file(bundle, tmp_path, kind):
    (bundle / "mcv.json.minisig").write_text(sign((bundle / "mcv.json").read_bytes(), kind=kind))
    (tmp_path / "key.pub").write_text(f"untrusted comment: minisign public key\n{public()}\n")
    for key in (public(), str(tmp_path / "key.pub")):
        assert check_signature(bundle, PublicKey.read(key)) == "built by the tests"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("built by the tests", "built by another"), "not what was signed"),
        (lambda text: text.replace("trusted comment: ", "comment: "), "no signature"),
        (lambda text: "\n".join(text.splitlines()[:3]), "no signature"),
        (lambda text: text.replace("=", "", 1), "no signature"),
        (lambda text: "", "no signature"),
        (lambda text: text * 2, "no signature"),
        (lambda text: "\ud7ff" * 4, "no signature"),
        (lambda text: "x" * 100_000, "bytes"),
    ],
)
def test_a_changed_signature(signed, change, message):
    path = signed / "mcv.json.minisig"
    path.write_text(change(path.read_text()))
    with pytest.raises(BundleCorruptError, match=message) as said:
        check_signature(signed, PublicKey.read(public()))
    assert "\n" not in str(said.value)


def test_another_key_another_kind_and_no_signature(signed):
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    with pytest.raises(BundleCorruptError, match="not what was signed"):
        check_signature(signed, PublicKey.read(public(other)))
    with pytest.raises(BundleCorruptError, match=r"with another key \(0807060504030201\)"):
        check_signature(signed, PublicKey.read(public(number=bytes(8))))
    (signed / "mcv.json.minisig").write_text(sign((signed / "mcv.json").read_bytes(), kind=b"RS"))
    with pytest.raises(BundleCorruptError, match="another kind"):
        check_signature(signed, PublicKey.read(public()))
    (signed / "mcv.json.minisig").unlink()
    with pytest.raises(BundleError, match="minisign -S"):
        check_signature(signed, PublicKey.read(public()))


@pytest.mark.parametrize("key", ["", "nothing.pub", "a" * 56, "/dev/zero", base64.b64encode(b"RS" + bytes(40)).decode()])
def test_no_key(key):
    with pytest.raises(McvError) as said:
        PublicKey.read(key)
    assert isinstance(said.value, OptionError)


def test_the_command(signed):
    def verify(*more):
        return CliRunner().invoke(app, ["verify", str(signed), *more], catch_exceptions=True)

    told = verify("--key", public())
    assert (told.exit_code, told.stdout.splitlines()[0]) == (0, "signed: built by the tests")
    assert verify("--key", public(), "--json").stdout.strip().endswith('"signed": "built by the tests"}')
    manifest = signed / "mcv.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"models/tiny"', b'"models/tinx"'))
    assert verify().exit_code == 0  # hashes alone say nothing about who made them
    assert isinstance(verify("--key", public()).exception, BundleCorruptError)
