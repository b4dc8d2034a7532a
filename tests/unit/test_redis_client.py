"""The parts of the Redis client that need no Redis: keys, URLs, login, bytes on the wire, the clock."""

import itertools
import re
from pathlib import Path

import pytest
from redis.crc import key_slot
from redis.exceptions import NoPermissionError, OutOfMemoryError, ResponseError

import gateway.redis_client
from gateway.errors import InvalidArgument, Unavailable
from gateway.redis_client import Disconnected, Keys, RedisOptions
from gateway.redis_client.clock import Clock
from gateway.redis_client.cluster import key_of
from gateway.redis_client.link import delays
from gateway.redis_client.options import Address, parse_url
from gateway.redis_client.wire import pack, reply_error

KEYS = Keys("fleet")


def every_key():
    """The name of every key there is, by its method or attribute."""
    arguments = {"requests": ("m", "1", 2), "dead": ("m", "1"), "job_events": (), "job_hooks": ()}
    arguments |= {"owned": ("m", "1", "x"), "sequence": ("m", "1", "x")}
    for name in dir(Keys("p")):
        if not name.startswith("_") and name != "prefix":
            made = getattr(KEYS, name)
            yield name, made if isinstance(made, str) else made(*arguments.get(name, ("x",)))


def test_every_key_is_in_the_table_and_no_two_are_the_same():
    table = re.findall(r"^\| `([^`]+)`", gateway.redis_client.__doc__, re.MULTILINE)
    names = dict(every_key())
    assert len(set(names.values())) == len(names)
    for made in names.values():
        kind = re.escape(re.match(r"\{?fleet\}?:\w+", made)[0].replace("fleet", "P"))
        assert any(re.match(kind + r"(:|$)", row.replace("1..3", "2")) for row in table), made
    assert len(table) == len(names)


def test_keys_of_one_lane_are_in_one_slot():
    for model in ("m", "a{b}c", "{}", "}{", "100%"):
        slots = {key_slot(KEYS.requests(model, "1", klass).encode()) for klass in (1, 2, 3)}
        assert len(slots | {key_slot(KEYS.dead(model, "1").encode())}) == 1
    names = [KEYS.requests(model, "1", 1) for model in ("a{b", "a}b", "ab", "a%7Bb")]
    assert len(set(names)) == len(names)


def test_keys_of_the_fleet_are_in_one_slot():
    fleet = [made for _, made in every_key() if made.startswith("{")]
    assert len(fleet) > 3
    assert len({key_slot(made.encode()) for made in fleet}) == 1


@pytest.mark.parametrize("prefix", ["", "a{b", "a}b", "a b", "a\nb"])
def test_a_prefix_that_would_break_keys_is_refused(prefix):
    with pytest.raises(InvalidArgument, match="without braces"):
        RedisOptions("redis://h", prefix=prefix)


HOST = (Address("h", 6379),)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h", ("single", HOST, False, 0, "", "", "")),
        ("redis://h:7000/3", ("single", (Address("h", 7000),), False, 3, "", "", "")),
        ("redis://user:p%40ss@h", ("single", HOST, False, 0, "", "user", "p@ss")),
        ("redis://:pw@h", ("single", HOST, False, 0, "", "", "pw")),
        ("redis://[::1]:7000", ("single", (Address("::1", 7000),), False, 0, "", "", "")),
        ("rediss://h", ("single", HOST, True, 0, "", "", "")),
        ("unix:///run/r.sock", ("single", (Address(path="/run/r.sock"),), False, 0, "", "", "")),
        ("unix://:pw@/run/r.sock?db=2", ("single", (Address(path="/run/r.sock"),), False, 2, "", "", "pw")),
        (
            "redis+sentinel://a,b:1/svc/4",
            ("sentinel", (Address("a", 26379), Address("b", 1)), False, 4, "svc", "", ""),
        ),
        ("rediss+cluster://u:p@a,b:1", ("cluster", (Address("a", 6379), Address("b", 1)), True, 0, "", "u", "p")),
    ],
)
def test_urls(url, expected):
    found = parse_url(url)
    assert (
        found.kind, found.addresses, found.tls, found.db, found.service, found.username, found.password,
    ) == expected  # fmt: skip


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis:localhost:6379", "followed by //"),
        ("redis:/localhost", "followed by //"),
        ("localhost:6379", "schemes"),
        ("", "schemes"),
        ("http://h", "schemes"),
        ("redis://", "host is missing"),
        ("redis://:pw@", "host is missing"),
        ("redis://h:x", "port"),
        ("redis://h:99999", "[Pp]ort"),
        ("redis://h/x", "'x' is not a number"),
        ("redis://h/0/1", "'1' after the database"),
        ("redis://a,b", "several hosts"),
        ("redis://h?retry=10", "not understood"),
        ("unix://run/r.sock", "three slashes"),
        ("unix:///", "three slashes"),
        ("unix:///run/r.sock?timeout=1", "'timeout' is not understood"),
        ("redis+sentinel://h", "service is missing"),
        ("redis+cluster://h/1", "only database 0"),
        ("redis+cluster://a,,b", "host is missing"),
    ],
)
def test_urls_that_say_nothing_useful(url, why):
    with pytest.raises(InvalidArgument, match=why) as refused:
        RedisOptions(url)
    assert "redis+sentinel://host:port" in refused.value.message  # what is expected


def test_passwords_are_not_shown():
    options = RedisOptions("redis://user:secret@h")
    assert "secret" not in repr(options) + repr(options.target)
    with pytest.raises(InvalidArgument) as refused:
        RedisOptions("redis://user:secret@h/x")
    assert "secret" not in str(refused.value)


def test_the_password_file_wins_and_is_read_each_time(tmp_path):
    file = tmp_path / "password"
    file.write_text("one\n")
    options = RedisOptions("redis://user:url@h", password_file=file)
    assert options.login() == ("user", "one")
    file.write_text("two")
    assert options.login() == ("user", "two")
    assert RedisOptions("redis://user:url@h", username="other").login() == ("other", "url")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InvalidArgument, match="password file"):
        RedisOptions("redis://h", password_file=tmp_path / "none").login()
    (tmp_path / "ca").write_text("no certificate")
    for ca in ("none", "ca"):
        with pytest.raises(InvalidArgument, match="TLS files"):
            RedisOptions("rediss://h", ca_file=tmp_path / ca).tls()
    assert RedisOptions("redis://h", ca_file=Path("none")).tls() is None


@pytest.mark.parametrize("large", [b"x" * 50_000, memoryview(b"y" * 50_000)])
def test_large_words_are_sent_as_they_are(large):
    packed = pack(("SET", "key", large, "PX", 5, 1.5))
    small = b"*6\r\n$3\r\nSET\r\n$3\r\nkey\r\n$50000\r\n%b\r\n$2\r\nPX\r\n$1\r\n5\r\n$3\r\n1.5\r\n" % bytes(large)
    assert b"".join(packed) == small
    assert any(part is large or getattr(part, "obj", None) is (getattr(large, "obj", large)) for part in packed)


def test_small_commands_are_one_piece():
    assert pack(("SET", "k", memoryview(b"abc"))) == [b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$3\r\nabc\r\n"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("OOM command not allowed", OutOfMemoryError),
        ("NOPERM this user", NoPermissionError),
        ("NOGROUP No such key", ResponseError),
        ("ERR wrong number", ResponseError),
        ("LOADING Redis is loading", Disconnected),
        ("READONLY You can't write", Disconnected),
        ("CLUSTERDOWN Hash slot not served", Disconnected),
        ("TRYAGAIN Multiple keys", Disconnected),
    ],
)
def test_errors_of_redis(text, kind):
    error = reply_error(text)
    assert type(error) is kind or issubclass(type(error), Disconnected)
    assert isinstance(error, kind)
    assert text in str(error)


def test_disconnected_is_an_answer_on_the_wire():
    error = Disconnected("lost")
    assert isinstance(error, Unavailable)
    assert (error.http, error.retryable) == (503, True)
    assert 0.5 <= error.retry_after <= 1.0


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (("SET", "k", 1), b"k"),
        ((b"set", b"k", 1), b"k"),
        (("XADD", "k", "*", "f", 1), b"k"),
        (("XREADGROUP", "GROUP", "g", "c", "COUNT", 1, "streams", "k", "l", ">", ">"), b"k"),
        ((b"XREAD", b"STREAMS", b"k", b"0"), b"k"),
        (("XINFO", "STREAM", "k"), b"k"),
        (("xgroup", "CREATE", "k", "g", "$"), b"k"),
        (("PING",), None),
        (("CLIENT", "UNBLOCK", 1), None),
    ],
)
def test_the_key_of_a_command(command, key):
    assert key_of(command) == key


def test_delays_double_with_jitter_up_to_a_second():
    first = list(itertools.islice(delays(), 12))
    assert all(
        0.5 * bound <= delay <= bound for delay, bound in zip(first, (0.02 * 2**n for n in range(6)), strict=False)
    )
    assert all(0.5 <= delay <= 1.0 for delay in first[6:])
    assert first != list(itertools.islice(delays(), 12))


def test_the_clock_believes_the_least_delayed_look():
    clock = Clock(lambda: 100.0)
    clock.sample(sent=90.0, received=92.0, server=1091.5)  # 1000.5 ahead, by at most 1 s wrong
    assert clock.now() == pytest.approx(1100.5)
    clock.sample(sent=95.0, received=95.1, server=1095.05)
    assert clock.now() == pytest.approx(1100.0)
    clock.sample(sent=96.0, received=99.0, server=1099.0)
    assert clock.now() == pytest.approx(1100.0)
    for _ in range(8):
        clock.sample(sent=97.0, received=98.0, server=1098.5)  # an old look is not believed for ever
    assert clock.now() == pytest.approx(1101.0)


def test_the_clock_of_another_server_starts_anew():
    clock = Clock(lambda: 100.0)
    clock.sample(sent=100.0, received=100.0, server=500.0)
    clock.forget()
    clock.sample(sent=90.0, received=100.0, server=5000.0)
    assert clock.now() == pytest.approx(5005.0)
