"""Fetch a picture from an allowed host, by https, and from nowhere that only this machine can reach.

The name is resolved here, every address it has must be a public one, and the connection goes to the address that was checked:
nobody can answer with another one in between. Each redirect is checked like the first address.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from urllib.parse import urljoin, urlsplit

from mcv_serve.errors import ApiError

Resolve = Callable[[str, int], Sequence[str]]
"""The addresses of a host."""
_REDIRECTS = 3
_PIECE = 1 << 16


def resolve(host: str, port: int) -> list[str]:
    """By the system's resolver."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ApiError(400, "image_unreachable", f"the host {host} of a picture is not known") from None
    return [str(entry[4][0]) for entry in found]


def is_public(address: str) -> bool:
    """Whether an address is one of the wide net: not this machine's, a private network's, nor one with another inside."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if inner or ip in ipaddress.ip_network("64:ff9b::/96") or ip in ipaddress.ip_network("64:ff9b:1::/48"):
            return False
    return ip.is_global and not ip.is_multicast


class Fetcher:
    """Gets pictures of up to `limit` bytes from `hosts`, each within `seconds`; threads may share it."""

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        limit: int,
        seconds: float,
        resolve: Resolve = resolve,
        context: ssl.SSLContext | None = None,
        port: int = 443,
        public: Callable[[str], bool] = is_public,
    ) -> None:
        """`resolve`, `context`, `port` and `public` are for tests."""
        self._hosts = frozenset(host.lower().rstrip(".") for host in hosts)
        self._limit, self._seconds, self._resolve, self._port, self._public = limit, seconds, resolve, port, public
        self._context = ssl.create_default_context() if context is None else context

    def __call__(self, url: str) -> bytes:
        """The bytes at an address; raises `ApiError`."""
        if not self._hosts:
            raise ApiError(
                400,
                "remote_images_disabled",
                "this server fetches no pictures; send a data: URL, or start it with --allow-image-host HOST",
            )
        deadline = time.monotonic() + self._seconds
        for _ in range(_REDIRECTS + 1):
            try:
                found = self._get(url, deadline)
            except (OSError, http.client.HTTPException) as error:
                late = time.monotonic() >= deadline or isinstance(error, TimeoutError)
                reason = "it took too long" if late else type(error).__name__
                raise ApiError(400, "image_unreachable", f"the picture could not be fetched ({reason})") from error
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise ApiError(400, "image_unreachable", f"the picture is behind more than {_REDIRECTS} redirects")

    def _get(self, url: str, deadline: float) -> bytes | str:
        """What is there, or where to look instead."""
        host, target = self._checked(url)
        addresses = self._resolve(host, self._port)
        if not addresses or not all(map(self._public, addresses)):
            raise ApiError(400, "image_host_refused", f"the host {host} of a picture has an address that is not public")
        connection = _Pinned(host, addresses[0], self._port, self._context, max(deadline - time.monotonic(), 0.001))
        try:
            connection.request("GET", target, headers={"Accept": "image/*,video/*", "User-Agent": "mcv-serve"})
            with connection.getresponse() as response:
                if response.status in (301, 302, 303, 307, 308) and (to := response.headers.get("Location")):
                    return to
                if response.status != 200:
                    said = f"the host {host} answered {response.status} instead of a picture"
                    raise ApiError(400, "image_unreachable", said)
                return self._read(response, connection, deadline)
        finally:
            connection.close()

    def _read(self, response: http.client.HTTPResponse, connection: http.client.HTTPSConnection, deadline: float) -> bytes:
        data = bytearray()
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if connection.sock is not None:
                connection.sock.settimeout(left)
            piece = response.read1(_PIECE)
            if not piece:
                return bytes(data)
            data += piece
            if len(data) > self._limit:
                raise ApiError(413, "image_too_large", f"a picture has more than {self._limit / 1e6:,.0f} MB")

    def _checked(self, url: str) -> tuple[str, str]:
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower().rstrip("."), parts.port
        except ValueError:
            raise ApiError(400, "invalid_image_url", "this is no picture's URL") from None
        if parts.scheme != "https" or parts.username is not None or parts.password is not None:
            raise ApiError(400, "invalid_image_url", "pictures are fetched by plain https: URLs alone")
        if host not in self._hosts or port not in (None, 443):
            raise ApiError(400, "image_host_refused", "pictures are not fetched from this host; see --allow-image-host")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not target.isascii() or not target.isprintable() or " " in target:
            raise ApiError(400, "invalid_image_url", "this is no picture's URL")
        return host, target


class _Pinned(http.client.HTTPSConnection):
    """To an address, but with the host's name in the certificate and the request."""

    def __init__(self, host: str, address: str, port: int, context: ssl.SSLContext, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout, context=context)
        self._address, self._tls = address, context

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), self.timeout)
        try:
            self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise
