"""`swarmpull run` as a process: start order, draining, signals and exit statuses.

The roles here are stand-ins of a few lines, which misbehave on demand; what is tested is the process
around them.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

MEMBER_LISTS = ("cluster.trackers", "cluster.origins", "cluster.indexes")
PROGRAM = """
import sys
import trio
from swarmpull import runtime
from swarmpull.cli import main
from swarmpull.errors import ConfigError, Problem, StartupError
from swarmpull.roles.addresses import RoleAddresses

BEHAVIOUR = {behaviour!r}


def say(text):
    sys.stderr.write(f"event: {{text}}\\n")
    sys.stderr.flush()


class Ring:
    def replace(self, entries, weights):
        say(f"origins {{', '.join(entries)}} {{weights}}")


def role_main(role):
    async def run(config, settings, *, drain, changes, task_status):
        what = BEHAVIOUR.get(role, "")
        if what == "port in use":
            port = settings.admin.listen
            raise StartupError(f"{{port}} is in use", f"set {{role}}.admin.listen to another")
        if what == "bad config":
            async with trio.open_nursery():
                problems = (Problem("a", "-o", "is wrong"), Problem("b", "", "is too"))
                raise ConfigError(problems)
        if what == "never ready":
            say(f"{{role}} waits")
            await trio.sleep_forever()
        task_status.started(RoleAddresses(role, {{
            name: str(getattr(settings, name).listen)
            for name in ("registry", "admin") if hasattr(settings, name)
        }}))
        if what == "crash":
            raise LookupError("a defect")
        if what == "ends":
            return
        changes.follow(origins=Ring())
        await drain.wait()
        say(f"{{role}} drains")
        if what == "stuck":
            await trio.sleep_forever()
        if what == "unstoppable":
            with trio.CancelScope(shield=True):
                await trio.sleep_forever()

    return run


runtime.role_main = role_main
runtime._HARD_EXIT_AFTER = 0.2
sys.exit(main(sys.argv[1:]))
"""


class Process:
    """A running `swarmpull run` with stand-in roles."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self.popen = popen
        self.said: list[str] = []

    def announced(self) -> list[str]:
        """Standard output up to the end of the announcement."""
        assert self.popen.stdout is not None
        lines = []
        for line in self.popen.stdout:
            lines.append(line.rstrip())
            if line.startswith("Stop with"):
                break
        return lines

    def wait_until(self, text: str) -> None:
        """Read standard error until a line holds ``text``."""
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.said.append(line.rstrip())
            if text in line:
                return
        pytest.fail(f"{text!r} did not happen: {self.said}")

    def send(self, number: int) -> None:
        self.popen.send_signal(number)

    def end(self) -> tuple[int, list[str]]:
        """(exit status, all lines of standard error)."""
        assert self.popen.stderr is not None
        self.said += self.popen.stderr.read().splitlines()
        return self.popen.wait(30), self.said

    @property
    def events(self) -> list[str]:
        return [line.removeprefix("event: ") for line in self.said if line.startswith("event: ")]


@pytest.fixture
def start(environment, tmp_path):
    started = []

    def start(*arguments: object, behaviour: dict[str, str] | None = None) -> Process:
        program = PROGRAM.format(behaviour=behaviour or {})
        popen = subprocess.Popen(
            [sys.executable, "-c", program, "run", *map(str, arguments)],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(popen)
        return Process(popen)

    yield start
    for popen in started:
        popen.kill()
        popen.wait()
        popen.stdout.close()
        popen.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_agents_first_and_trackers_last(start, number: int) -> None:
    process = start("--role", "all", "--agents", 2)
    process.announced()
    process.send(number)
    status, _ = process.end()
    assert status == 0
    assert process.events == [
        "agent drains",
        "agent drains",
        "origin drains",
        "index drains",
        "tracker drains",
    ]


def test_what_listens_and_what_to_type_next_is_announced(start) -> None:
    process = start("--role", "all", "--agents", 2)
    said = process.announced()
    assert said[:5] == [
        "tracker    admin 127.0.0.1:7530",
        "index      admin 127.0.0.1:7540",
        "origin     registry 127.0.0.1:5100  admin 127.0.0.1:7520",
        "agent 1    registry 127.0.0.1:5000  admin 127.0.0.1:7500",
        "agent 2    registry 127.0.0.1:5001  admin 127.0.0.1:7501",
    ]
    text = "\n".join(said)
    assert (
        "skopeo copy --dest-tls-verify=false docker-daemon:IMAGE:TAG "
        "docker://127.0.0.1:5000/IMAGE:TAG\n" in text
    )
    assert "docker pull 127.0.0.1:5001/IMAGE:TAG" in text
    assert "swarmpull pull --registry http://127.0.0.1:5001 DIGEST -o FILE" in text


def test_a_role_alone_announces_what_it_listens_on_and_no_next_steps(start) -> None:
    process = start("--role", "agent", *(f"-o{key}=h:1" for key in MEMBER_LISTS))
    assert process.popen.stdout is not None
    assert process.popen.stdout.readline().split() == [
        *("agent", "registry", "127.0.0.1:5000", "admin", "127.0.0.1:7500")
    ]
    process.send(signal.SIGTERM)
    assert process.end()[0] == 0
    assert process.popen.stdout.read() == ""


def test_roles_are_logged_as_json_when_that_is_wanted(start) -> None:
    process = start("--role", "all", "-o", "log.format=json")
    process.announced()
    process.send(signal.SIGTERM)
    status, said = process.end()
    assert status == 0
    lines = [json.loads(line) for line in said if not line.startswith("event: ")]
    started = [line["role"] for line in lines if line["event"] == "role started"]
    assert started == ["tracker", "index", "origin", "agent"]
    assert all(line["level"] == "info" and line["timestamp"].endswith("Z") for line in lines)


def test_a_role_that_does_not_end_is_cut_off_after_the_timeout(start) -> None:
    process = start("--role", "all", "-o", "drain_timeout=400ms", behaviour={"agent": "stuck"})
    process.announced()
    process.send(signal.SIGTERM)
    status, said = process.end()
    assert status == 75
    # the others had their chance all the same
    assert process.events[-1] == "tracker drains"
    assert any("work was cut off" in line and "drain timeout" in line for line in said)


def test_a_second_signal_ends_at_once(start) -> None:
    process = start("--role", "all", "-o", "drain_timeout=1h", behaviour={"agent": "stuck"})
    process.announced()
    process.send(signal.SIGTERM)
    process.wait_until("agent drains")
    process.send(signal.SIGTERM)
    status, said = process.end()
    assert status == 75
    assert any("second signal, SIGTERM" in line for line in said)


def test_work_that_cannot_be_cancelled_does_not_keep_the_process(start) -> None:
    process = start("--role", "all", "-o", "drain_timeout=1ms", behaviour={"agent": "unstoppable"})
    process.announced()
    process.send(signal.SIGTERM)
    status, said = process.end()
    assert status == 75
    assert any("cannot be cancelled" in line for line in said)


def test_a_signal_before_all_have_started_ends_the_process(start) -> None:
    process = start("--role", "all", behaviour={"origin": "never ready"})
    process.wait_until("origin waits")
    process.send(signal.SIGTERM)
    assert process.end()[0] == 0


def test_a_role_that_cannot_start_is_one_line_and_status_78(start) -> None:
    process = start("--role", "all", "-o", "log.level=error", behaviour={"origin": "port in use"})
    assert process.end() == (
        78,
        ["swarmpull: 127.0.0.1:7520 is in use: set origin.admin.listen to another"],
    )


def test_every_problem_of_a_role_is_a_line_of_its_own(start) -> None:
    process = start("--role", "all", "-o", "log.level=error", behaviour={"index": "bad config"})
    assert process.end() == (78, ["swarmpull: a: is wrong  (-o)", "swarmpull: b: is too"])


def test_a_defect_shows_its_traceback_and_status_70(start) -> None:
    process = start("--role", "all", "-o", "log.level=error", behaviour={"agent": "crash"})
    status, said = process.end()
    assert status == 70
    assert said[-1] == "LookupError: a defect"
    assert said.count("Traceback (most recent call last):") == 1


def test_a_role_that_ends_by_itself_is_a_defect(start) -> None:
    process = start("--role", "all", "-o", "log.level=error", behaviour={"tracker": "ends"})
    status, said = process.end()
    assert status == 70
    assert said[-1] == "RuntimeError: role tracker ended although nobody asked it to"


def test_a_closed_standard_output_does_not_stop_the_roles(start) -> None:
    process = start("--role", "all")
    process.popen.stdout.close()
    process.wait_until("cannot write to standard output")
    process.send(signal.SIGTERM)
    assert process.end()[0] == 0


# --- SIGHUP ---------------------------------------------------------------------------------------


def cluster_file(tmp_path, *origins: str, more: str = "") -> str:
    path = tmp_path / "cluster.toml"
    lists = (f"{key} = {list(origins)}" for key in MEMBER_LISTS)
    path.write_text("\n".join(lists) + "\n" + more)
    return str(path)


def test_sighup_changes_the_members_of_the_cluster(start, tmp_path) -> None:
    file = cluster_file(tmp_path, "a:1")
    process = start("--role", "origin", "--config", file, "-o", "log.format=json")
    assert process.popen.stdout is not None
    process.popen.stdout.readline()
    cluster_file(tmp_path, "a:1", "b:1", more='cluster.weights = ["b:1=2"]\norigin.replicas = 2\n')
    process.send(signal.SIGHUP)
    process.wait_until("configuration reloaded")

    assert process.events == ["origins a:1, b:1 {'b:1': 2.0}"]
    line = json.loads(process.said[-1])
    assert line["changed"] == [
        *("cluster.indexes", "cluster.origins", "cluster.trackers", "cluster.weights")
    ]
    assert line["need_restart"] == ["origin.replicas"]

    # What waits for a restart goes on waiting; what was taken over is not news.
    process.send(signal.SIGHUP)
    process.wait_until("configuration reloaded")
    line = json.loads(process.said[-1])
    assert (line["changed"], line["need_restart"]) == ([], ["origin.replicas"])
    process.send(signal.SIGTERM)
    assert process.end()[0] == 0


def test_sighup_with_a_wrong_file_changes_nothing_and_says_why(start, tmp_path) -> None:
    file = cluster_file(tmp_path, "a:1")
    process = start("--role", "origin", "--config", file)
    assert process.popen.stdout is not None
    process.popen.stdout.readline()
    cluster_file(tmp_path, "b:1", more="cluster.orgins = []\n")
    process.send(signal.SIGHUP)
    process.wait_until("did you mean cluster.origins?")

    assert process.events == []
    process.send(signal.SIGTERM)
    assert process.end()[0] == 0
