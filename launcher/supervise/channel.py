"""Control channel between the supervisors of a job: authenticated JSON lines over TCP.

The supervisor of node 0 listens, those of the other nodes connect. Both sides prove that they hold
the run's secret (a 0600 file written by `submit`) and that they belong to the same incarnation of
the same job; from then on every line carries an HMAC over its direction, its number and its
content, so that nothing can be forged, replayed or reordered. The content is not encrypted. Lines
are JSON and short; nothing is unpickled. When all nodes are connected the listener is closed.

A lost connection is a lost node. A supervisor that says nothing for `SILENCE_S` counts as lost; a
thread says that it lives, so that one which waits for a file server is not taken for dead.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)

Message = dict[str, Any]
MAX_LINE = 65_536
SILENCE_S = 60.0  # a supervisor may be suspended for a while
PING_S = 2.0
HANDSHAKE_S = 1.0
PARTING_S = 1.0
CANDIDATES = 16
_PORTS = range(20_000, 32_000)  # below the range from which outgoing connections take theirs


class Lost(Exception):
    """The other side is gone, or is not who it should be."""


def candidate_ports(incarnation: str) -> list[int]:
    """Ports that both sides derive from job id and restart count, in the order of trying."""
    seed = int.from_bytes(hashlib.sha256(incarnation.encode()).digest()[:8], "big")
    return [_PORTS[(seed + 379 * index) % len(_PORTS)] for index in range(CANDIDATES)]


class Wire:
    """One connection. `key` is None until the handshake is done."""

    def __init__(self, connection: socket.socket, own: str) -> None:
        self._socket, self._own = connection, own
        self._key = b""
        self._sent = self._received = 0
        self._buffer = b""
        self._heard = time.monotonic()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def send(self, body: Message) -> None:
        """Raises: Lost."""
        text = json.dumps(body)
        with self._lock:
            mac = self._mac(self._own, self._sent, text)
            self._sent += 1
            self._write(json.dumps([text, mac]).encode())

    def receive(self) -> list[Message]:
        """What has arrived, without waiting. Raises: Lost."""
        now = time.monotonic()
        try:
            with self._lock:
                closed = self._take(now)
        except OSError as error:
            raise Lost(str(error)) from None
        messages = [body for body in self._lines() if body.get("kind") != "ping"]
        if closed and not messages:
            raise Lost("connection closed")
        if now - self._heard > SILENCE_S:
            raise Lost(f"silent for {SILENCE_S:.0f} s")
        return messages

    def _take(self, now: float) -> bool:
        """Whether the other side has closed."""
        self._socket.settimeout(0)
        try:
            while data := self._socket.recv(65_536):
                self._buffer += data
                self._heard = now
                if len(self._buffer) > 64 * MAX_LINE:
                    raise Lost("it talks without end")
        except (BlockingIOError, TimeoutError):
            return False
        return True

    def _ping(self) -> None:
        with contextlib.suppress(Lost):  # `receive` will tell
            while not self._closed.wait(PING_S):
                self.send({"kind": "ping"})

    def _lines(self) -> Iterator[Message]:
        while b"\n" in self._buffer:
            line, self._buffer = self._buffer.split(b"\n", 1)
            try:
                text, mac = json.loads(line)
                expected = self._mac("leader" if self._own == "node" else "node",
                                     self._received, text)
                genuine = hmac.compare_digest(expected, mac)
                body = json.loads(text)
            except (ValueError, TypeError, AttributeError):
                raise Lost("a line that is not of this protocol") from None
            if not genuine or not isinstance(body, dict):
                raise Lost("a line with a wrong signature")
            self._received += 1
            yield body
        if len(self._buffer) > MAX_LINE:
            raise Lost("a line without end")

    def handshake(self, secret: bytes, incarnation: str, node: int | None) -> int:
        """Prove each other's knowledge of the secret. Returns the other side's node. Raises: Lost.

        The leader passes `node=None`. The MAC covers both nonces, so neither side's proof can be
        used again, and the side that speaks, so it cannot be reflected.
        """
        self._socket.settimeout(HANDSHAKE_S)
        nonce = secrets.token_hex(16)
        try:
            self._write(json.dumps(["resnet-dist-1", nonce, -1 if node is None else node]).encode())
            protocol, other, peer = json.loads(self._read_line())
            if protocol != "resnet-dist-1" or not isinstance(other, str) or type(peer) is not int:
                raise Lost("it speaks another protocol")
            pair = [nonce, other] if node is None else [other, nonce]
            context = json.dumps([*pair, incarnation, peer if node is None else node]).encode()
            self._key = hmac.digest(secret, b"channel" + context, "sha256")
            self._write(self._mac(self._own, -1, "proof").encode())
            expected = self._mac("node" if node is None else "leader", -1, "proof")
            if not hmac.compare_digest(expected.encode(), self._read_line()):
                raise Lost("it does not know the run's secret, or belongs to another incarnation")
        except (OSError, ValueError, TypeError) as error:
            raise Lost(f"handshake failed: {error}") from None
        threading.Thread(target=self._ping, daemon=True, name="ping").start()
        return peer

    def close(self) -> None:
        """Last words arrive: a socket that is closed over unread bytes would take them back."""
        self._closed.set()
        deadline = time.monotonic() + PARTING_S
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(PARTING_S)
            while self._socket.recv(65_536) and time.monotonic() < deadline:
                pass
        self._socket.close()

    def _mac(self, side: str, number: int, text: str) -> str:
        return hmac.new(self._key, json.dumps([side, number, text]).encode(), "sha256").hexdigest()

    def _write(self, line: bytes) -> None:
        try:
            self._socket.settimeout(5)
            self._socket.sendall(line + b"\n")
        except OSError as error:
            raise Lost(str(error)) from None

    def _read_line(self) -> bytes:
        """One line, for the handshake; byte by byte, so that nothing behind it is taken."""
        self._socket.settimeout(HANDSHAKE_S)
        deadline, line = time.monotonic() + HANDSHAKE_S, b""
        while not line.endswith(b"\n"):
            byte = self._socket.recv(1)
            if not byte or len(line) > 1024 or time.monotonic() > deadline:
                raise Lost("no answer")
            line += byte
        return line[:-1]


class Hub:
    """The leader's side: one wire to each of the other nodes."""

    def __init__(self, address: str, incarnation: str, secret: bytes, nodes: int) -> None:
        self._secret, self._incarnation, self._nodes = secret, incarnation, nodes
        self._wires: dict[int, Wire] = {}
        self._listener = _listen(address, candidate_ports(incarnation))
        self.port = self._listener.getsockname()[1]

    @property
    def missing(self) -> list[int]:
        return [node for node in range(1, self._nodes) if node not in self._wires]

    def accept(self) -> None:
        """Admit the nodes that knock, waiting at most 0.1 s; strangers are turned away."""
        self._listener.settimeout(0.1)
        try:
            connection, peer = self._listener.accept()
        except TimeoutError:
            return
        wire = Wire(connection, "leader")
        try:
            node = wire.handshake(self._secret, self._incarnation, None)
            if node not in self.missing:
                raise Lost(f"node {node} is not expected")
        except Lost as reason:
            log.warning("turned away %s: %s", peer[0], reason)
            wire.close()
            return
        self._wires[node] = wire
        if not self.missing:
            self._listener.close()

    def send(self, body: Message) -> list[tuple[int, str]]:
        """To all nodes. Returns (node, reason) for those that are gone."""
        return [(node, why) for node in list(self._wires)
                if (why := self._try_send(node, body)) is not None]

    def receive(self) -> tuple[list[tuple[int, Message]], list[tuple[int, str]]]:
        """(node, message) of what arrived, and (node, reason) of nodes lost since the last call."""
        messages, lost = [], []
        for node, wire in list(self._wires.items()):
            try:
                messages += [(node, body) for body in wire.receive()]
            except Lost as reason:
                lost.append((node, self._drop(node, str(reason))))
        return messages, lost

    def close(self) -> None:
        for wire in self._wires.values():
            wire.close()
        self._listener.close()

    def _try_send(self, node: int, body: Message) -> str | None:
        try:
            self._wires[node].send(body)
        except Lost as reason:
            return self._drop(node, str(reason))
        return None

    def _drop(self, node: int, reason: str) -> str:
        self._wires.pop(node).close()
        return reason


def connect(host: str, incarnation: str, secret: bytes, node: int, limit_s: float) -> Wire:
    """A node's side: find the leader among the candidate ports. Raises: Lost."""
    deadline = time.monotonic() + limit_s
    reason = "no port answers"
    while time.monotonic() < deadline:
        for port in candidate_ports(incarnation):
            try:
                connection = socket.create_connection((host, port), timeout=HANDSHAKE_S)
            except OSError as error:
                reason = str(error)
                continue
            wire = Wire(connection, "node")
            try:
                wire.handshake(secret, incarnation, node)
                return wire
            except Lost as error:  # someone else's port, or a leader that is not ours
                reason = str(error)
                wire.close()
        time.sleep(0.2)
    raise Lost(f"no leader at {host} within {limit_s:.0f} s ({reason})")


def address_of_leader(host: str, other: str) -> str:
    """The address of this node, `host`, on which node `other` can reach it.

    Debian gives a machine's own name a loopback address, which other machines cannot reach: then
    the address is that of the interface towards `other`.
    """
    own = socket.gethostbyname(host)
    if own.startswith("127.") and not socket.gethostbyname(other).startswith("127."):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((other, 9))  # sends nothing
            return str(probe.getsockname()[0])
    return own


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def _listen(address: str, ports: list[int]) -> socket.socket:
    for port in ports:
        listener = socket.socket()
        try:
            listener.bind((address, port))
            listener.listen(16)
            return listener
        except OSError as error:
            log.warning("control port %s:%d: %s; trying the next", address, port, error)
            listener.close()
    raise OSError(f"none of the {len(ports)} control ports is free on {address}: {ports}")
