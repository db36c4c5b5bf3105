"""nginx as what a download is compared with: a file from the page cache, sent by the kernel."""

from __future__ import annotations

import os
from pathlib import Path


def nginx_configuration(directory: Path, content: Path, port: int) -> str:
    """One process without a log of requests, serving ``content`` on 127.0.0.1."""
    temporary = "\n".join(
        f"  {name}_temp_path {directory / 'nginx-temp'};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;\n" if os.geteuid() == 0 else ""
    return (
        f"{user}daemon off;\nmaster_process off;\npid {directory / 'nginx.pid'};\n"
        "error_log stderr;\nevents {}\n"
        f"http {{\n{temporary}\n  access_log off;\n  sendfile on;\n  tcp_nopush on;\n"
        f"  server {{\n    listen 127.0.0.1:{port};\n    root {content};\n  }}\n}}\n"
    )


def nginx_command(directory: Path, content: Path, port: int) -> list[str]:
    """Write the configuration into ``directory``; returns how to start nginx with it."""
    file = directory / "nginx.conf"
    file.write_text(nginx_configuration(directory, content, port))
    return ["nginx", "-c", str(file), "-p", str(directory)]
