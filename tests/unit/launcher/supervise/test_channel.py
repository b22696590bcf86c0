"""The control channel: only those who know the secret, only this incarnation, nothing altered."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.supervise import channel
from launcher.supervise.channel import Hub, Lost, Wire, candidate_ports, connect

SECRET = b"s" * 32
SIDES = {"leader": None, "node": 1}


@contextlib.contextmanager
def pair(secret=SECRET, other_secret=SECRET, incarnation="7.0", other="7.0"):
    """Two ends of a connection after the handshake; the errors where it failed."""
    left, right = socket.socketpair()
    wires = {"leader": Wire(left, "leader"), "node": Wire(right, "node")}
    errors: dict[str, str] = {}

    def shake(side: str, *values) -> None:
        try:
            wires[side].handshake(*values, SIDES[side])
        except Lost as error:
            errors[side] = str(error)

    thread = threading.Thread(target=shake, args=("node", other_secret, other))
    thread.start()
    shake("leader", secret, incarnation)
    thread.join()
    yield wires["leader"], wires["node"], errors
    left.close()
    right.close()


def drain(wire: Wire, count: int) -> list[dict]:
    found: list[dict] = []
    deadline = time.monotonic() + 5
    while len(found) < count and time.monotonic() < deadline:
        found += wire.receive()
    return found


def test_messages_arrive_in_order_both_ways():
    with pair() as (leader, node, errors):
        assert errors == {}
        sent = [{"kind": "x", "n": n, "text": "ä\n" * n} for n in range(20)]
        for body in sent:
            leader.send(body)
            node.send(body)
        assert drain(node, 20) == sent
        assert drain(leader, 20) == sent


@pytest.mark.parametrize("difference", [{"other_secret": b"t" * 32}, {"other": "7.1"},
                                        {"other": "8.0"}])
def test_another_secret_or_incarnation_is_refused_by_both(difference):
    with pair(**difference) as (_, _, errors):
        assert set(errors) == {"leader", "node"}


def test_an_altered_a_repeated_and_a_reflected_line_are_refused():
    def sniffed(leader: Wire) -> bytes:
        text = json.dumps({"do": "kill"})
        return json.dumps([text, leader._mac("leader", leader._sent, text)]).encode() + b"\n"

    with pair() as (leader, node, _):
        leader._socket.sendall(sniffed(leader).replace(b"kill", b"stop"))
        with pytest.raises(Lost, match="wrong signature"):
            drain(node, 1)
    with pair() as (leader, node, _):
        line = sniffed(leader)
        leader._socket.sendall(line + line)
        with pytest.raises(Lost, match="wrong signature"):
            drain(node, 2)
    with pair() as (leader, node, _):
        node._socket.sendall(sniffed(leader))
        with pytest.raises(Lost, match="wrong signature"):
            drain(leader, 1)


@given(st.binary(max_size=200))
def test_garbage_never_passes_for_a_message(data):
    with pair() as (leader, node, _):
        leader._socket.sendall(data + b"\n")
        leader._socket.close()
        with pytest.raises(Lost):
            assert drain(node, 1) == []


def test_a_closed_connection_is_noticed_at_once():
    with pair() as (leader, node, _):
        leader.close()
        began = time.monotonic()
        with pytest.raises(Lost, match="closed"):
            drain(node, 1)
        assert time.monotonic() - began < 0.5


def test_no_thread_outlives_a_connection(monkeypatch):
    """Hundreds of them, each asking for the interpreter's lock, have stopped a process for good."""
    monkeypatch.setattr(channel, "PING_S", 0.05)
    before = set(threading.enumerate())
    with pair(), pair() as (leader, _node, _):
        assert len(set(threading.enumerate()) - before) == 4
        leader.close()
    deadline = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


def test_a_side_that_is_busy_is_not_silent(monkeypatch):
    monkeypatch.setattr(channel, "SILENCE_S", 0.3)
    monkeypatch.setattr(channel, "PING_S", 0.05)
    with pair() as (_, node, _):  # the leader's main thread reads a file, say
        end = time.monotonic() + 1
        while time.monotonic() < end:
            assert node.receive() == []
            time.sleep(0.02)


def test_silence_is_noticed(monkeypatch):
    monkeypatch.setattr(channel, "SILENCE_S", 0.3)
    with pair() as (_, node, _):
        with pytest.raises(Lost, match="silent"):
            drain(node, 1)


def test_occupied_and_deaf_ports_are_passed_over():
    """The first port belongs to a program that accepts and says nothing, the second refuses."""
    ports = candidate_ports("9.0")
    with socket.socket() as deaf, socket.socket() as unborn:
        deaf.bind(("127.0.0.1", ports[0]))
        deaf.listen()
        unborn.bind(("127.0.0.1", ports[1]))
        began = time.monotonic()
        hub = Hub("127.0.0.1", "9.0", SECRET, 2)
        assert hub.port == ports[2]
        wires: list[Wire] = []
        thread = threading.Thread(
            target=lambda: wires.append(connect("127.0.0.1", "9.0", SECRET, 1, 20)))
        thread.start()
        while hub.missing:
            hub.accept()
        thread.join()
        assert time.monotonic() - began < 30
        hub.send({"do": "end"})
        assert drain(wires[0], 1) == [{"do": "end"}]
        wires[0].close()
        time.sleep(0.05)
        assert hub.receive() == ([], [(1, "connection closed")])
        hub.close()


def test_a_stranger_is_turned_away_and_the_node_still_joins():
    hub = Hub("127.0.0.1", "10.0", SECRET, 2)
    with socket.create_connection(("127.0.0.1", hub.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        hub.accept()
        assert hub.missing == [1]
        thread = threading.Thread(target=connect, args=("127.0.0.1", "10.0", SECRET, 1, 20))
        thread.start()
        while hub.missing:
            hub.accept()
        thread.join()
    hub.close()


@given(st.text(max_size=30))
def test_candidate_ports_are_distinct_and_below_the_outgoing_range(incarnation):
    ports = candidate_ports(incarnation)
    assert len(set(ports)) == len(ports) == channel.CANDIDATES
    assert all(20_000 <= port < 32_000 for port in ports)
    assert ports == candidate_ports(incarnation)
