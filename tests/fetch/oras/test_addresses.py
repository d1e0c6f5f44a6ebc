"""Which addresses an upstream may lead to."""

from __future__ import annotations

import pytest

from ociproxy.fetch.oras.connect import Policy


@pytest.mark.parametrize(
    ("address", "unlisted", "listed"),
    [
        ("127.0.0.1", False, True),
        ("127.8.9.10", False, True),
        ("::1", False, True),
        ("::ffff:127.0.0.1", False, True),
        ("0.0.0.0", False, True),
        ("::", False, True),
        ("224.0.0.1", False, True),
        ("ff02::1", False, True),
        ("0.1.2.3", False, True),
        ("255.255.255.255", False, True),
        ("169.254.169.254", False, False),
        ("64:ff9b::127.0.0.1", False, True),
        ("64:ff9b::169.254.169.254", False, False),
        ("64:ff9b:1::169.254.169.254", False, False),
        ("64:ff9b::1.1.1.1", True, True),
        ("2002:7f00:1::", False, True),
        ("2002:a9fe:a9fe::1", False, False),
        ("2002:101:101::1", True, True),
        ("::127.0.0.1", False, True),
        ("::ffff:0:127.0.0.1", False, True),
        ("2001:0:7f00:1::", False, True),
        ("100.100.100.200", False, False),
        ("fd00:ec2::254", False, False),
        ("::ffff:169.254.169.254", False, False),
        ("fe80::1", False, False),
        ("fe80::1%eth0", False, False),
        ("10.0.0.1", True, True),
        ("192.168.1.1", True, True),
        ("fd00::1", True, True),
        ("1.1.1.1", True, True),
    ],
)
def test_which_addresses_are_refused(address: str, unlisted: bool, listed: bool) -> None:
    assert (Policy("r", False, 1.0).refusal(address) is None) is unlisted
    assert (Policy("r", True, 1.0).refusal(address) is None) is listed


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("10.1.2.3", True),
        ("172.16.0.1", True),
        ("172.32.0.1", False),
        ("192.168.255.255", True),
        ("100.64.0.1", True),
        ("100.128.0.1", False),
        ("fd12:3456::1", True),
        ("::ffff:10.0.0.1", True),
        ("64:ff9b::10.0.0.1", True),
        ("2002:a00:1::1", True),
        ("1.1.1.1", False),
        ("2606:4700::1111", False),
    ],
)
def test_private_addresses_are_refused_where_the_operator_says_so(
    address: str, private: bool
) -> None:
    assert (Policy("r", False, 1.0, deny_private=True).refusal(address) is not None) is private
    assert Policy("r", False, 1.0).refusal(address) is None
    assert Policy("r", True, 1.0, deny_private=True).refusal(address) is None
