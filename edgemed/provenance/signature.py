"""An Ed25519 signature over every file of an engine, so that a device can tell who vouches for it
and which file was changed since.

A manifest alone shows accidents: whoever alters a file can alter the manifest too. What is signed
is a list of hashes, so that a check names each file that differs, and it covers the manifest and
the records as well.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.artifacts import hashing, records, store
from edgemed.artifacts.json_files import decode_json, json_text
from edgemed.documents.limited_files import read_limited
from edgemed.documents.signature import PURPOSE, SignatureDocument, SignedStatement
from edgemed.engines.engine import open_engine
from edgemed.errors import EdgemedError, need

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

PRIVATE = "private.pem"
PUBLIC = "public.pem"
LARGEST = 16 << 20  # bytes of signature.json


def keygen(out: Path, password: bytes | None = None) -> str:
    """Write a new private.pem (PKCS 8, for its owner's eyes only) and public.pem into `out`;
    returns the public key's fingerprint.

    password: encrypts the private key. Raises EdgemedError where either file exists: a lost key
    cannot be made again.
    """
    serialization = need("cryptography.hazmat.primitives.serialization", "sign")
    key = need(
        "cryptography.hazmat.primitives.asymmetric.ed25519", "sign"
    ).Ed25519PrivateKey.generate()
    locked = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    there = [out / name for name in (PRIVATE, PUBLIC) if (out / name).exists()]
    if there:
        raise EdgemedError(
            f"{there[0]} exists", "Choose another directory; a key that is overwritten is lost"
        )
    written: list[Path] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content, mode in ((PRIVATE, private, 0o600), (PUBLIC, public, 0o644)):
            # O_EXCL: a file that appeared since is not overwritten. The mode holds from the first
            # byte on.
            with open(
                os.open(out / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb"
            ) as handle:
                written.append(out / name)
                handle.write(content)
    except OSError as error:
        # Half a pair of keys is worse than none.
        for file in written:
            file.unlink(missing_ok=True)
        raise EdgemedError(
            f"cannot write a key into {out}: {error.strerror}", "Choose another directory"
        ) from None
    return fingerprint(key.public_key())


def sign(engine: Path, key: Path, password: bytes | None = None) -> dict[str, Any]:
    """Write signature.json beside an engine's files; returns its statement.

    Raises EdgemedError for an engine that differs from its manifest, for what is not an Ed25519
    private key, and for a key inside the engine.
    """
    engine = Path(engine)
    private = _private_key(Path(key), password)
    if Path(key).resolve().is_relative_to(engine.resolve()):
        raise EdgemedError(
            f"the private key {key} lies inside the engine",
            "Move it out: it would travel to every device",
        )
    hashing.clear_hash_cache()
    opened = open_engine(engine, check=True)
    files = hashes(engine)
    if odd := [name for name, sha in files.items() if sha is None]:
        raise EdgemedError(
            f"{engine} holds {', '.join(odd)}, which is not a file", "Remove it and sign again"
        )
    statement = {
        "purpose": PURPOSE,
        "engine": opened.name,
        "engine_key": opened.key,
        "public_key": fingerprint(private.public_key()),
        "signed": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "edgemed": store.versions().get("edgemed"),
        "files": files,
    }
    store.write_json_beside(
        engine,
        store.SIGNATURE,
        {"statement": statement, "signature": private.sign(hashing.canonical(statement)).hex()},
    )
    return statement


def check_signature(directory: Path, key: Path) -> dict[str, Any]:
    """{public_key, signed, files, problems}: one sentence per file that was altered, is missing or
    was added since the signature.

    key: the signer's public key. Raises EdgemedError for a directory that is not signed, a damaged
    signature, or another key's.
    """
    directory = Path(directory)
    public = _public_key(Path(key))
    statement = _statement(directory, public)
    hashing.clear_hash_cache()
    signed = statement.files
    present = hashes(directory)
    problems = []
    for name in signed:
        if name not in present:
            problems.append(with_hint(f"{name} is missing"))
        elif present[name] != signed[name]:
            problems.append(with_hint(f"{name} was altered after signing"))
    for name in present:
        if name not in signed:
            problems.append(with_hint(f"{name} was added after signing"))
    return {
        "public_key": statement.public_key,
        "signed": statement.signed,
        "files": len(signed),
        "problems": sorted(problems),
    }


def with_hint(problem: str) -> str:
    """A problem with what may explain it. Measuring or building on the device is no attack, but
    only the signer can say so.
    """
    if problem.startswith(f"{records.RECORDS} was "):
        return f"{problem}: sign again if these measurements are yours"
    if problem.startswith(f"{store.ON_DEVICE}/"):
        return f"{problem}: sign again if you built it on this device"
    return problem


def hashes(directory: Path) -> dict[str, str | None]:
    """file -> sha256 of everything in a directory but its signature; None for what is not a file,
    such as a link to nowhere.
    """
    digests: dict[str, str | None] = {}
    try:
        for path in sorted(directory.rglob("*")):
            name = path.relative_to(directory).as_posix()
            if name != store.SIGNATURE and (path.is_symlink() or not path.is_dir()):
                digests[name] = hashing.file_sha256(path) if path.is_file() else None
    except OSError as error:
        raise EdgemedError(
            f"{error.filename} cannot be read: {error.strerror}", "Check its permissions"
        ) from None
    return digests


def fingerprint(key: Ed25519PublicKey) -> str:
    """'sha256:' and the digest of the key in DER form (SubjectPublicKeyInfo)."""
    serialization = need("cryptography.hazmat.primitives.serialization", "sign")
    return (
        "sha256:"
        + hashlib.sha256(
            key.public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        ).hexdigest()
    )


def _statement(directory: Path, public: Ed25519PublicKey) -> SignedStatement:
    """The statement of signature.json, once the signature over it is found to be this key's."""
    invalid = need("cryptography.exceptions", "sign").InvalidSignature
    file = directory / store.SIGNATURE
    if not directory.is_dir():
        raise EdgemedError(
            f"{directory} is not a directory",
            "Give a directory made by edgemed export or edgemed run",
        )
    if not file.is_file():
        raise EdgemedError(
            f"{directory} is not signed", f"Sign it with: edgemed sign {directory} --key {PRIVATE}"
        )
    fix = "Copy the engine again, or sign it again"
    content = read_limited(file, fix, LARGEST)
    try:
        whole = decode_json(content)
        document = SignatureDocument.from_json(whole, "signature.json")
    except (ValueError, EdgemedError) as error:
        reason = error.problem if isinstance(error, EdgemedError) else error
        raise EdgemedError(f"{file} is damaged ({reason})", fix) from None
    statement = document.statement
    if statement.public_key != fingerprint(public):
        raise EdgemedError(
            f"{file} was made with another key ({statement.public_key}) than the one given"
            f" ({fingerprint(public)})",
            "Give the signer's public key, or do not trust this engine",
        )
    altered = EdgemedError(
        f"{file} was altered: it is not what the key signed",
        "Copy the engine again; do not trust this one",
    )
    # One text says this, and no other: further keys, spaces and bytes behind it are an alteration.
    if document.extra or statement.extra or content != json_text(whole).encode():
        raise altered
    try:
        public.verify(bytes.fromhex(document.signature), hashing.canonical(whole["statement"]))
    except invalid:
        raise altered from None
    return statement


def _read_key(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise EdgemedError(
            f"key {file} cannot be read: {error.strerror}",
            "Make a pair of keys with: edgemed keygen --out DIR",
        ) from None


def _private_key(file: Path, password: bytes | None) -> Ed25519PrivateKey:
    ed25519 = need("cryptography.hazmat.primitives.asymmetric.ed25519", "sign")
    unsupported = need("cryptography.exceptions", "sign").UnsupportedAlgorithm
    content = _read_key(file)
    if b"ENCRYPTED" in content and password is None:
        raise EdgemedError(
            f"key {file} is encrypted", "Give its password with --password-file FILE"
        )
    try:
        key = need("cryptography.hazmat.primitives.serialization", "sign").load_pem_private_key(
            content, password
        )
    except (ValueError, TypeError, unsupported) as error:
        public = b"PUBLIC KEY" in content
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        problem = "is a public key" if public else f"cannot be read as a private key ({reason})"
        raise EdgemedError(
            f"key {file} {problem}", f"Give {PRIVATE}, and its own password if it has one"
        ) from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise EdgemedError(
            f"key {file} is of the kind {type(key).__name__}, not Ed25519",
            "Make a pair of keys with: edgemed keygen --out DIR",
        )
    return key


def _public_key(file: Path) -> Ed25519PublicKey:
    ed25519 = need("cryptography.hazmat.primitives.asymmetric.ed25519", "sign")
    unsupported = need("cryptography.exceptions", "sign").UnsupportedAlgorithm
    content = _read_key(file)
    if b"PRIVATE KEY" in content:
        raise EdgemedError(
            f"key {file} is a private key",
            f"Give {PUBLIC}; a private key has no place where engines are checked",
        )
    try:
        key = need("cryptography.hazmat.primitives.serialization", "sign").load_pem_public_key(
            content
        )
    except (ValueError, unsupported):
        raise EdgemedError(
            f"key {file} cannot be read as a public key", f"Give the signer's {PUBLIC}"
        ) from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise EdgemedError(
            f"key {file} is of the kind {type(key).__name__}, not Ed25519",
            "Ask the signer for the Ed25519 key",
        )
    return key
