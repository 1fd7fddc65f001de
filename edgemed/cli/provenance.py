"""The verbs about where an engine comes from: its documents, and the keys and signatures that vouch
for it.

They stand apart from main.py because none of them runs a model. main.py puts them on the same
command line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgemed.cli.options import EngineDir, Json
from edgemed.console import show
from edgemed.errors import EdgemedError

PasswordFile = Annotated[
    Path | None, typer.Option(help="File whose first line is the private key's password.")
]


def card(
    engine: EngineDir,
    source: Annotated[
        str | None,
        typer.Option(
            help="The checkpoint it was made from, for its name and licence; default: as recorded."
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Write an engine's model card and bill of materials again from what its directory holds, new
    measurements included.
    """
    from edgemed.artifacts import store
    from edgemed.provenance import record

    before = store.read_manifest(engine)
    sections = {}
    if source:
        sections["source"] = record.describe_source(source, record.directory_of(source), engine)
    evidence = record.write_card_and_bom(engine, sections)
    result = {
        "card": str(engine / "README.md"),
        "bill of materials": str(engine / "bom.cdx.json"),
        "licence": evidence.licence,
        "as of": evidence.newest,
    }
    stale = (engine / store.SIGNATURE).exists() and store.read_manifest(engine) != before
    show(result | ({"signature": "no longer fits: sign again"} if stale else {}), json_)


def keygen(
    out: Annotated[Path, typer.Option(help="Directory to write private.pem and public.pem into.")],
    password_file: PasswordFile = None,
    json_: Json = False,
) -> None:
    """Make a pair of Ed25519 keys for signing engines."""
    from edgemed.provenance.signature import PRIVATE, PUBLIC
    from edgemed.provenance.signature import keygen as make_keys

    fingerprint = make_keys(out, password_of(password_file))
    show(
        {"private": str(out / PRIVATE), "public": str(out / PUBLIC), "fingerprint": fingerprint},
        json_,
    )


def sign(
    engine: EngineDir,
    key: Annotated[Path, typer.Option(help="private.pem, made by keygen.")],
    password_file: PasswordFile = None,
    json_: Json = False,
) -> None:
    """Sign every file of an engine; edgemed verify ENGINE --key public.pem then names each one that
    was changed.
    """
    from edgemed.provenance.signature import sign as sign_engine

    statement = sign_engine(engine, key, password_of(password_file))
    show(
        {
            "engine": str(engine),
            "files": len(statement["files"]),
            "signed": statement["signed"],
            "public_key": statement["public_key"],
        },
        json_,
    )


def signed(directory: Path, key: Path | None, as_json: bool) -> dict[str, str]:
    """Who signed a directory and when; {} where no key is given. Names what was changed since and
    ends with exit code 1, before anything is loaded from it.
    """
    from edgemed.provenance.signature import check_signature

    if key is None:
        return {}
    result = check_signature(directory, key)
    problems = result["problems"]
    signer = {"signed by": result["public_key"], "signed": result["signed"]}
    if problems:
        show({"artifact": str(directory), **signer, "intact": False, "problems": problems}, as_json)
        sys.exit(1)
    return signer


def password_of(file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise EdgemedError(
            f"password file {file} cannot be read: {error.strerror}",
            "Check the path and its permissions",
        ) from None
    if not lines or not lines[0]:
        raise EdgemedError(
            f"password file {file} has no password in its first line",
            "Write one, or leave --password-file out",
        )
    return lines[0]
