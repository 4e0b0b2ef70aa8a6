"""The settings of a node, from a YAML file."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import ssl
import typing
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from ..dicom_out import ALL_KINDS, KINDS, SR_CLASSES


@dataclass(frozen=True)
class Tls:
    """Files in PEM.

    Attributes:
        cert, key: of this node; a server needs both, a client where it is asked for them.
        ca: who signs the other side's certificate. A server with it refuses clients without one.
    """

    cert: str = ""
    key: str = ""
    ca: str = ""

    def server(self) -> ssl.SSLContext:
        """For what listens."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.cert, self.key or None)
        if self.ca:
            context.load_verify_locations(self.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client(self) -> ssl.SSLContext:
        """For what connects; the other side's name is checked against its certificate."""
        context = ssl.create_default_context(cafile=self.ca or None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.cert:
            context.load_cert_chain(self.cert, self.key or None)
        return context


@dataclass(frozen=True)
class Receive:
    """The storage SCP.

    Attributes:
        ae_title: of this node; an association that calls another is refused.
        bind, port: where it listens.
        calling_ae_titles: who may send; [] is everyone that reaches the port.
        max_associations: at a time.
        max_pdu: bytes of a PDU that is received.
        max_instance_mb, max_study_mb: larger ones are refused.
        min_free_mb: below this much free disk everything is refused with 0xA700.
        timeout_s: without a word of the other side.
        tls: asks for TLS.
    """

    ae_title: str = "ICH_DET2"
    bind: str = "127.0.0.1"
    port: int = 11112
    calling_ae_titles: tuple[str, ...] = ()
    max_associations: int = 20
    max_pdu: int = 262144
    max_instance_mb: float = 512.0
    max_study_mb: float = 8192.0
    min_free_mb: float = 1024.0
    timeout_s: float = 60.0
    tls: Tls | None = None


@dataclass(frozen=True)
class Complete:
    """When a study is taken for complete.

    Attributes:
        quiet_s: without a new instance.
        qido: address of a DICOMweb service that knows how many instances a study has; "" for none.
        wait_s: how long a study waits for the rest that it says there is; then it is answered as
            incomplete, and again when the rest comes.
        ca, token_file: as of :class:`Destination`.
    """

    quiet_s: float = 60.0
    qido: str = ""
    wait_s: float = 600.0
    ca: str = ""
    token_file: str = ""


@dataclass(frozen=True)
class Destination:
    """Where answers are sent: by C-STORE (host, port and ae_title) or by STOW-RS (url).

    Attributes:
        name: in the journal and the log.
        host, port, ae_title: of a storage SCP.
        url: of a DICOMweb service.
        objects: kinds that are sent there, of ``dicom_out.ALL_KINDS``.
        tls: of the storage SCP.
        ca: who signs the certificate of the DICOMweb service; "" for the public ones.
        token_file: holds a bearer token for it.
    """

    name: str
    host: str = ""
    port: int = 0
    ae_title: str = ""
    url: str = ""
    objects: tuple[str, ...] = KINDS
    tls: Tls | None = None
    ca: str = ""
    token_file: str = ""


@dataclass(frozen=True)
class Keep:
    """What is removed, and when; never a study of which something is still to be sent.

    Attributes:
        days: after the last answer was sent.
        max_gb: of all studies together; the oldest go first.
    """

    days: float = 30.0
    max_gb: float = 100.0


@dataclass(frozen=True)
class Http:
    """``/metrics`` and ``/healthz``; port 0 for none."""

    bind: str = "127.0.0.1"
    port: int = 8081


@dataclass(frozen=True)
class ServeConfig:
    """All of a node's settings.

    Attributes:
        root: folder of the journal, of what was received, and of the answers.
        model: OUTPUT_DIR of a training, or ``zoo://NAME``.
        threshold: positive at this score and above; None for the model's.
        backend, threads: engine of the network, see ``inference.accelerate``, and its threads.
        sr_class: of ``dicom_out.SR_CLASSES``.
        send: destinations; none keeps the answers in ``root``.
        retry_s, max_retry_s: after a failure, the wait before the next try; it doubles up to the
            second.
    """

    root: Path
    model: str = "zoo://ct-ich"
    threshold: float | None = None
    backend: str = "eager"
    threads: int = 1
    sr_class: str = "3d"
    receive: Receive = field(default_factory=Receive)
    complete: Complete = field(default_factory=Complete)
    send: tuple[Destination, ...] = ()
    retry_s: float = 10.0
    max_retry_s: float = 3600.0
    keep: Keep = field(default_factory=Keep)
    http: Http = field(default_factory=Http)

    def __post_init__(self):
        _check(self)


def read_config(path: str | Path) -> ServeConfig:
    """Reads a node's YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one sentence that names the key.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is no YAML ({str(error).splitlines()[0]}).") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        return _build(ServeConfig, content, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would take the last."""

    def construct_mapping(self, node, deep=False):
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        keys = [key.value for key, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            line = node.start_mark.line + 1
            raise ValueError(
                f"{twice[0]} is there {keys.count(twice[0])} times in what begins in line {line},"
                " expected once."
            )
        return super().construct_mapping(node, deep)


def _build(kind, content, where: str):
    """A dataclass of a mapping, checked key by key."""
    if not isinstance(content, dict):
        raise ValueError(f"{where or 'the file'} is {content!r}, expected keys and values.")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    if unknown := [name for name in content if name not in fields]:
        raise ValueError(f"there is no key {where}{unknown[0]}; known are {', '.join(fields)}.")
    needed = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in needed if name not in content]:
        raise ValueError(f"{where}{missing[0]} is missing.")
    return kind(**{k: _convert(hints[k], v, where + k) for k, v in content.items()})


def _convert(hint, value, where: str):
    options = typing.get_args(hint) if typing.get_origin(hint) is not tuple else ()
    if value is None and type(None) in options:
        return None
    for option in options:
        if option is not type(None):
            return _convert(option, value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}, expected a list.")
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where + ".")
    if hint is Path and isinstance(value, str) and value:
        return Path(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where} is {value!r}, expected {hint.__name__}.")


def _check(cfg: ServeConfig) -> None:
    """What types do not say."""
    receive = cfg.receive
    titles = [("receive.ae_title", receive.ae_title)]
    titles += [("receive.calling_ae_titles", title) for title in receive.calling_ae_titles]
    titles += [(f"send '{d.name}' ae_title", d.ae_title) for d in cfg.send if d.host]
    for key, title in titles:
        if not re.fullmatch(
            r"[\x21-\x5b\x5d-\x7e](?:[\x20-\x5b\x5d-\x7e]{0,14}[\x21-\x5b\x5d-\x7e])?", title
        ):
            raise ValueError(f"{key} is {title!r}, expected 1 to 16 characters of ASCII.")
    positive = {
        "receive.max_associations": receive.max_associations,
        "receive.max_instance_mb": receive.max_instance_mb,
        "receive.max_study_mb": receive.max_study_mb,
        "receive.timeout_s": receive.timeout_s,
        "threads": cfg.threads,
        "retry_s": cfg.retry_s,
        "max_retry_s": cfg.max_retry_s,
        "keep.days": cfg.keep.days,
        "keep.max_gb": cfg.keep.max_gb,
    }
    for key, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{key} is {value}, expected more than 0, and a finite number.")
    for key, value in (
        ("complete.quiet_s", cfg.complete.quiet_s),
        ("complete.wait_s", cfg.complete.wait_s),
        ("receive.min_free_mb", receive.min_free_mb),
    ):
        if not 0 <= value < math.inf:
            raise ValueError(f"{key} is {value}, expected 0 or more, and a finite number.")
    if receive.max_instance_mb > receive.max_study_mb:
        raise ValueError(
            f"receive.max_instance_mb is {receive.max_instance_mb:g}, expected at most"
            f" receive.max_study_mb, {receive.max_study_mb:g}."
        )
    if not 4096 <= receive.max_pdu <= 2**24:
        raise ValueError(f"receive.max_pdu is {receive.max_pdu}, expected 4096 to 16777216 bytes.")
    for key, port, least in (("receive.port", receive.port, 0), ("http.port", cfg.http.port, 0)):
        if not least <= port <= 65535:
            raise ValueError(f"{key} is {port}, expected a port, {least} to 65535.")
    if cfg.threshold is not None and not 0 <= cfg.threshold <= 1:
        raise ValueError(f"threshold is {cfg.threshold}, expected a score from 0 to 1.")
    if cfg.sr_class not in SR_CLASSES:
        raise ValueError(f"sr_class is {cfg.sr_class!r}, expected one of {', '.join(SR_CLASSES)}.")
    if receive.tls and not receive.tls.cert:
        raise ValueError("receive.tls.cert is missing: who listens shows a certificate.")
    names = [d.name for d in cfg.send]
    if len({*names}) < len(names):
        raise ValueError("two destinations in send have one name.")
    for d in cfg.send:
        if bool(d.host) == bool(d.url):
            raise ValueError(f"send '{d.name}' needs host, port and ae_title, or url.")
        if not d.name:
            raise ValueError("a destination in send has the name '', expected some characters.")
        # A key that is not used would leave its writer in a wrong belief.
        unused = ("ca", "token_file") if d.host else ("port", "ae_title", "tls")
        if found := [key for key in unused if getattr(d, key)]:
            way = "C-STORE (host)" if d.host else "STOW-RS (url)"
            raise ValueError(
                f"send '{d.name}' {found[0]} is {getattr(d, found[0])!r}, expected none: it is not"
                f" used by {way}."
            )
        if not d.objects:
            raise ValueError(
                f"send '{d.name}' objects is [], expected at least one of {', '.join(ALL_KINDS)}."
            )
        if d.host and not 1 <= d.port <= 65535:
            raise ValueError(f"send '{d.name}' port is {d.port}, expected 1 to 65535.")
        if d.url:
            _check_url(f"send '{d.name}' url", d.url)
        if unknown := [kind for kind in d.objects if kind not in ALL_KINDS]:
            raise ValueError(
                f"send '{d.name}' objects: {unknown[0]!r} is none of {', '.join(ALL_KINDS)}."
            )
    if cfg.complete.qido:
        _check_url("complete.qido", cfg.complete.qido)
    for key in ("ca", "token_file"):
        if (value := getattr(cfg.complete, key)) and not cfg.complete.qido:
            raise ValueError(f"complete.{key} is {value!r}, expected none without complete.qido.")
    for where, holder in (
        ("receive.tls.", receive.tls),
        ("complete.", cfg.complete),
        *((f"send '{d.name}' ", d) for d in cfg.send),
        *((f"send '{d.name}' tls.", d.tls) for d in cfg.send),
    ):
        for key in ("cert", "key", "ca"):
            value = getattr(holder, key, "")
            if value and not os.path.isfile(value):
                raise ValueError(f"{where}{key} is {value!r}, expected a file that exists.")


def _check_url(key: str, url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{key} is {url!r}, expected http:// or https:// and a host.")
    try:
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"{key} is {url!r}, expected a port from 0 to 65535.") from error
    if parts.username or parts.password:
        raise ValueError(f"{key} holds a name or password; put a token into token_file.")
