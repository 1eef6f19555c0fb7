"""Connections between members: encrypted, and opened only to who proves to know the cluster's token, both ways.

TLS without certificates (an anonymous elliptic-curve exchange) gives a channel whose other end is unknown; then each
side sends a MAC, keyed by the token, of that channel's own binding (RFC 5929). Who stands in between has two channels,
with two bindings, and passes neither. The token itself is never sent.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
import ssl
from typing import Final

from aphro_core.channel import BlockingChannel, ChannelClosedError
from aphro_core.cluster.messages import Answer, Request
from aphro_core.errors import ClusterError
from aphro_core.messages.codec import Codec

_CIPHERS: Final = "AECDH-AES256-SHA:@SECLEVEL=0"  # ephemeral keys, encrypt-then-MAC; who it is, the token proves
_PROOF_BYTES: Final = 32
_REFUSED: Final = bytes(_PROOF_BYTES)
PROOF_SECONDS: Final = 5.0  # for a stranger to prove itself
_CONNECT_SECONDS: Final = 3.0

Asking = BlockingChannel[Request, Answer]
Serving = BlockingChannel[Answer, Request]


class WrongTokenError(ClusterError):
    """The other side is a member of a cluster, of another one."""


class NoMemberError(ClusterError):
    """Nobody answers there, or nobody who speaks as members do."""


def connect(address: str, port: int, token: str, *, timeout: float = 10.0, source: str = "") -> Asking:
    """A proven channel to a member; each wait on it lasts ``timeout`` seconds at most. ``source``: leave from there.

    Raises WrongTokenError or NoMemberError.
    """
    where = f"{address} port {port}"
    try:
        sock = socket.create_connection((address, port), _CONNECT_SECONDS, (source, 0) if source else None)
    except OSError as error:
        raise NoMemberError(f"{where}: {_words(error)}") from error
    try:
        sock.settimeout(PROOF_SECONDS)
        tls = _context(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(sock)
        tls.sendall(_proof(token, tls, b"client"))
        answer = _receive_exactly(tls, _PROOF_BYTES)
    except OSError as error:
        sock.close()
        raise NoMemberError(f"{where}: what listens there is no member of a cluster ({_words(error)})") from error
    if not hmac.compare_digest(answer, _proof(token, tls, b"server")):
        tls.close()
        whose = "the token is not that of its cluster" if answer == _REFUSED else "it does not know the token"
        raise WrongTokenError(f"{where}: {whose}")
    channel: Asking = BlockingChannel(tls, Codec(Answer))
    channel.set_timeout(timeout)
    return channel


def accept(sock: socket.socket, token: str) -> Serving | None:
    """The serving end of a new connection; None where the caller proves nothing (it is told so, and cut off)."""
    sock.settimeout(PROOF_SECONDS)
    try:
        tls = _context(ssl.PROTOCOL_TLS_SERVER).wrap_socket(sock, server_side=True)
        proof = _receive_exactly(tls, _PROOF_BYTES)
        if not hmac.compare_digest(proof, _proof(token, tls, b"client")):
            tls.sendall(_REFUSED)
            tls.close()
            return None
        tls.sendall(_proof(token, tls, b"server"))
    except OSError:
        sock.close()
        return None
    channel: Serving = BlockingChannel(tls, Codec(Request))
    channel.set_timeout(PROOF_SECONDS)
    return channel


def ask(address: str, port: int, token: str, request: Request, *, timeout: float = 10.0, source: str = "") -> Answer:
    """One request, one answer. Raises NoMemberError, WrongTokenError, or ClusterError where it is refused."""
    channel = connect(address, port, token, timeout=timeout, source=source)
    try:
        channel.send(request)
        answer = channel.receive()
    except ChannelClosedError as error:
        raise NoMemberError(f"{address} port {port}: no answer ({_words(error.__cause__)})") from error
    except ValueError as error:  # msgspec's errors are that
        raise ClusterError(f"{address} port {port} speaks another version of aphro: {error}") from error
    finally:
        channel.close()
    return answer


def _context(side: int) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    if side == ssl.PROTOCOL_TLS_CLIENT:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2  # 1.3 knows no anonymous exchange
    context.set_ciphers(_CIPHERS)
    return context


def _proof(token: str, tls: ssl.SSLSocket, side: bytes) -> bytes:
    binding = tls.get_channel_binding("tls-unique")
    if not binding:
        raise OSError("TLS gave no channel binding")
    return hmac.digest(token.encode(), b"aphro cluster 1 " + side + binding, hashlib.sha256)


def _receive_exactly(tls: ssl.SSLSocket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = tls.recv(size - len(received))
        if not part:
            raise OSError("the connection was closed")
        received += part
    return received


def _words(error: BaseException | None) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLError):
        return error.reason or "no TLS"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "the connection was closed"
