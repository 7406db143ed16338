"""Keys files, and which Unix peers may administer."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from quantd.daemon.errors import ConfigError, Unauthorized
from quantd.daemon.server.auth import ApiKeys, HostRule, Peer, may_administer, peer_of, read_keys


def test_keys_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nfirst-key\nalice: key:with:colons\n  bob:second \n")
    assert read_keys(file) == [
        ("line-3", "first-key"),
        ("alice", "key:with:colons"),
        ("bob", "second"),
    ]


@pytest.mark.parametrize("text", ["", "# nothing\n", ":key\n", "name:\n", "two words\n"])
def test_bad_keys_files(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match="keys"):
        read_keys(file)


def test_missing_keys_file_does_not_open_the_door(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such"):
        ApiKeys.from_file(tmp_path / "no-such")


def test_replaced_keys() -> None:
    keys = ApiKeys([("a", "old")])
    keys.replace([("b", "new")])
    assert keys.caller("Bearer new", None) == "b"
    with pytest.raises(Unauthorized):
        keys.caller("Bearer old", None)


def test_a_key_of_odd_bytes_is_refused_and_not_a_crash() -> None:
    keys = ApiKeys([("a", "k")])
    with pytest.raises(Unauthorized):
        keys.caller("Bearer k\udcff", None)


def test_a_server_for_others_knows_its_own_name() -> None:
    HostRule("0.0.0.0").check_host(socket.gethostname())
    HostRule("example.org").check_host("example.org:8420")
    HostRule("127.0.0.1", ("*",)).check_host("whatever.example")
    HostRule("127.0.0.1").check_host(None)


def test_every_origin_may_be_allowed() -> None:
    HostRule("127.0.0.1", (), ("*",)).check_origin("https://any.example", None)


def test_peer_is_who_connected() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert peer_of(ours) == Peer(os.getpid(), os.getuid(), os.getgid())


def test_who_may_administer() -> None:
    stranger = 54321
    assert may_administer(Peer(1, 0, 0), None)
    assert may_administer(Peer(1, os.geteuid(), 1), None)
    assert may_administer(Peer(1, stranger, 700), 700)
    assert not may_administer(Peer(1, stranger, 701), 700)
    assert not may_administer(Peer(1, stranger, 700), None)
