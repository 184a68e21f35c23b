"""An Orthanc of a test's own, with DICOMweb and a password."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from redis_server import free_port

USER, PASSWORD = "tester", "correct horse"
_PLUGINS = ("/usr/share/orthanc/plugins", "/usr/lib/orthanc/plugins", "/usr/local/share/orthanc/plugins")


def _plugin() -> Path | None:
    found = [path for folder in _PLUGINS for path in Path(folder).glob("libOrthancDicomWeb.so*")]
    return found[0] if found else None


class Server:
    """Orthanc on a free port of loopback, its data below ``folder``; skips the test where it is not installed.

    Attributes:
        url: of DICOMweb.
        password_file: holds the password of `USER`.
    """

    def __init__(self, folder: Path):
        plugin = _plugin()
        if shutil.which("Orthanc") is None or plugin is None:
            pytest.skip("no Orthanc with its DICOMweb plug-in (Debian: apt-get install orthanc orthanc-dicomweb)")
        self.folder, self.port = folder, free_port()
        self.url = f"http://localhost:{self.port}/dicom-web"
        folder.mkdir(parents=True, exist_ok=True)
        self.password_file = folder / "password"
        self.password_file.write_text(PASSWORD + "\n")
        settings = {
            "Name": "test",
            "StorageDirectory": str(folder / "db"),
            "IndexDirectory": str(folder / "db"),
            "Plugins": [str(plugin)],
            "HttpPort": self.port,
            "HttpBindAddresses": ["127.0.0.1"],
            "DicomServerEnabled": False,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {USER: PASSWORD},
            "WebDavEnabled": False,
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        (folder / "orthanc.json").write_text(json.dumps(settings))
        self.start()

    def start(self) -> None:
        log = open(self.folder / "log", "ab")  # noqa: SIM115
        with log:
            self.process = subprocess.Popen(["Orthanc", str(self.folder / "orthanc.json")], stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)
