import ipaddress

import pytest

from kdtrain.config.server_urls import check_server_urls, is_loopback, is_metadata_address

GOOD = [
    "http://127.0.0.1:8000/v1",
    "http://localhost:8000/v1/",
    "http://[::1]:8000/v1",
    "https://api.example.com/v1",
    "http://gpu-17:8000/v1",
    "http://10.0.0.5:8000/openai/v1",
]
REFUSED = {
    "file:///etc/passwd": "begins with http",
    "ftp://host/v1": "begins with http",
    "127.0.0.1:8000/v1": "begins with http",
    "": "begins with http",
    "http:///v1": "no usable host",
    "http://:8000/v1": "no usable host",
    "http://host:0/v1": "no usable host",
    "http://host:99999/v1": "cannot be read",
    "http://host:port/v1": "cannot be read",
    "http://[::1/v1": "cannot be read",
    "http://user:canary@host/v1": "user or password",
    "http://canary@host/v1": "user or password",
    "http://@host/v1": "user or password",
    "http://host/v1?key=canary": "no query",
    "http://host/v1?": "no query",
    "http://host/v1#canary": "no query",
    "http://host\\@other/v1": "backslash",
    "http://ho\tst/v1": "printable",
    "http://host/v1\n": "printable",
    "http://host /v1": "space",
    "http://ⅿetadata/v1": "ASCII",
    "http://h%6fst/v1": "no usable host",
    "http://host:8000/v1/chat/completions": "one route (/chat/completions)",
    "http://host:8000/v1/completions/": "one route (/completions)",
}
METADATA = [
    "169.254.169.254",
    "169.254.170.2",
    "0xa9fea9fe",
    "2852039166",
    "0251.0376.0251.0376",
    "169.254.43518",
    "169.254.169.254.",
    "[::ffff:169.254.169.254]",
    "[::ffff:a9fe:a9fe]",
    "[::169.254.169.254]",
    "[64:ff9b::a9fe:a9fe]",
    "[2002:a9fe:a9fe::1]",
    "[fd00:ec2::254]",
    "[FD00:0EC2:0::254]",
    "[fe80::1]",
    "100.100.100.200",
    "metadata.google.internal",
    "Metadata.Google.Internal.",
    "metadata",
    "instance-data.ec2.internal",
]


def problems(*urls, with_key=False):
    return list(check_server_urls(("rlhf", "teacher", "base_url"), urls, with_key=with_key))


@pytest.mark.parametrize("url", GOOD)
def test_an_address_of_a_server_is_accepted(url):
    assert problems(url) == []


@pytest.mark.parametrize("url", REFUSED)
def test_an_address_that_is_none_of_a_server_is_refused_without_repeating_it(url):
    (problem,) = problems(url)
    assert problem.level == "error"
    assert problem.path == ("rlhf", "teacher", "base_url", 0)
    assert REFUSED[url] in problem.message
    assert problem.hint
    assert "canary" not in problem.message + problem.hint


@pytest.mark.parametrize("host", METADATA)
def test_addresses_where_clouds_hand_out_credentials_are_refused_in_every_spelling(host):
    (problem,) = problems(f"http://{host}/v1")
    assert "credentials" in problem.message
    assert "credentials" in problems(f"https://{host}:8000/v1", with_key=True)[0].message


@pytest.mark.parametrize("url", GOOD)
def test_a_key_goes_unencrypted_to_this_machine_alone(url):
    refused = [p for p in problems(url, with_key=True) if "unencrypted" in p.message]
    assert bool(refused) == (url in ("http://gpu-17:8000/v1", "http://10.0.0.5:8000/openai/v1"))


@pytest.mark.parametrize("host", ["127.evil.com", "localhost.evil.com", "0.0.0.0", "128.0.0.1", "[::ffff:10.0.0.1]"])
def test_a_host_that_only_looks_like_this_machine_gets_no_key(host):
    assert "unencrypted" in problems(f"http://{host}:8000/v1", with_key=True)[0].message


def test_loopback_is_known_in_every_spelling():
    assert all(
        map(is_loopback, ["localhost", "127.0.0.1", "127.1", "127.9.9.9", "2130706433", "::1", "::ffff:127.0.0.1"])
    )


def test_neighbours_of_metadata_addresses_are_no_metadata_addresses():
    for text in ("169.253.255.255", "169.255.0.0", "100.100.100.201", "fd00:ec2::255", "::1", "127.0.0.1", "8.8.8.8"):
        assert not is_metadata_address(ipaddress.ip_address(text)), text


def test_an_address_without_a_path_is_a_warning_that_names_the_usual_one():
    (problem,) = problems("http://127.0.0.1:8000")
    assert problem.level == "warning"
    assert "http://127.0.0.1:8000/v1" in problem.hint


def test_each_server_of_a_list_is_checked_and_named_once():
    found = problems("http://a/v1", "file://b", "http://a/v1/")
    assert [(p.path[-1], p.message) for p in found] == [
        (1, "a server's address begins with http:// or https://"),
        (2, "this server is already in the list"),
    ]
