"""scripts/tpu_vm.sh: what it prints, what it runs, and what a TPU VM's shell makes of it."""

import os
import pathlib
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NEEDED = {
    "name": "my-tpu",
    "zone": "us-central2-b",
    "type": "v4-8",
    "version": "tpu-vm-tf-2.20.0-pjrt",
    "gin_file": "configs/digits.gin",
    "workdir": "gs://bucket/run",
}
WHERE = ["--zone=us-central2-b"]
AWKWARD = "x.names = ('a b', \"it's\", '$HOME `id` \\ * & é')"

# Stands for Google's: notes its arguments, and keeps what is copied.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\0' gcloud "$@" >>"$NOTES" && printf '\\n\\0' >>"$NOTES"
[[ $4 != scp ]] || cp "$5" "$NOTES.copied"
[[ $4 != "${FAILING:-}" ]] || exit 7
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> pathlib.Path:
    """A small copy of the project in a git repository of its own, with a space in its path."""
    root = tmp_path_factory.mktemp("a checkout")
    for file in ("scripts/tpu_vm.sh", "configs/digits.gin", "configs/synthetic.gin"):
        (root / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, root / file)
    git(root, "init")
    git(root, "add", ".")
    git(root, "-c", "user.name=a", "-c", "user.email=b", "commit", "-m", "all")
    return root


def git(folder: pathlib.Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def call(checkout) -> Callable[..., subprocess.CompletedProcess]:
    def call(*flags: str, **environment: str) -> subprocess.CompletedProcess:
        command = ["bash", str(checkout / "scripts/tpu_vm.sh"), *flags]
        variables = {**os.environ, **environment}
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)

    return call


def flags(**changes: str | None) -> list[str]:
    return [f"--{flag}={value}" for flag, value in {**NEEDED, **changes}.items() if value]


def printed(done: subprocess.CompletedProcess) -> list[list[str]]:
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.fixture
def google(tmp_path) -> dict[str, str]:
    """An environment with a gcloud of ours first on its path."""
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "NOTES": str(tmp_path / "notes"),
        "TMPDIR": str(tmp_path),
    }


def noted(google: dict[str, str]) -> list[list[str]]:
    calls = pathlib.Path(google["NOTES"]).read_text().split("\0\n\0")
    return [call.split("\0") for call in calls if call]


def test_a_dry_run_prints_every_command(call):
    more = ["--spot", "--project", "my project", "--gin_param", AWKWARD, "--git=https://host/a b"]
    create, install, launch = printed(call(*flags(), *more, "--dry_run"))
    where = [*WHERE, "--project=my project"]
    tpu_vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert create == [
        *tpu_vm, "create", "my-tpu", "--accelerator-type=v4-8", "--version=tpu-vm-tf-2.20.0-pjrt",
        "--spot", *where,
    ]  # fmt: skip
    assert install[:-3] == [*tpu_vm, "ssh", "my-tpu", "--worker=all"]
    assert launch[:-3] == [*tpu_vm, "ssh", "my-tpu", "--worker=0"]
    assert install[-2:] == launch[-2:] == where
    steps = install[-3].removeprefix("--command=").split(" && ")
    assert "git clone 'https://host/a b' condconv" in steps
    assert steps[-2].endswith("--no-deps --require-hashes -r requirements-tpu.lock")
    assert steps[-1].endswith("--no-deps --no-build-isolation --editable .")


def test_what_is_run_is_what_is_printed(call, google):
    more = ["--spot", "--project=my project", f"--gin_param={AWKWARD}"]
    promised = printed(call(*flags(), *more, "--dry_run", **google))
    assert not pathlib.Path(google["NOTES"]).exists()
    done = call(*flags(), *more, **google)
    assert printed(done) == promised
    assert [command for command in promised if command[0] == "gcloud"] == noted(google)
    assert [command[0] for command in promised] == ["gcloud", "git", "gcloud", "rm"] + 2 * [
        "gcloud"
    ]


def test_the_last_commit_is_what_is_copied(call, checkout, google, tmp_path):
    commands = printed(call(*flags(), **google))
    (copy,) = (command for command in commands if "scp" in command)
    assert copy[5:8] == [f"{tmp_path}/my-tpu.bundle", "my-tpu:condconv.bundle", "--worker=all"]
    assert not (tmp_path / "my-tpu.bundle").exists()
    git(tmp_path, "clone", f"{google['NOTES']}.copied", "condconv")
    assert git(tmp_path / "condconv", "rev-parse", "HEAD") == git(checkout, "rev-parse", "HEAD")
    assert (tmp_path / "condconv/scripts/tpu_vm.sh").read_text().startswith("#!/usr/bin/env bash")


def test_what_stays_behind_is_said(call, checkout):
    config = checkout / "configs/digits.gin"
    assert "not committed" not in call(*flags(), "--dry_run").stderr
    committed = config.read_text()
    config.write_text("changed")
    assert "what is not committed stays here" in call(*flags(), "--dry_run").stderr
    config.write_text(committed)


def test_what_is_no_checkout_cannot_be_copied(tmp_path):
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(ROOT / "scripts/tpu_vm.sh", tmp_path / "scripts")
    command = ["bash", script, *flags(), "--dry_run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is no whole git checkout that could be copied: give an address" in done.stderr
    assert subprocess.run([*command, "--git=https://host/x"], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("version", "tpu", "variables"),
    [
        (
            "tpu-vm-tf-2.20.0-pjrt",
            "local",
            {
                "NEXT_PLUGGABLE_DEVICE_USE_C_API": "true",
                "TF_PLUGGABLE_DEVICE_LIBRARY_PATH": "/lib/libtpu.so",
            },
        ),
        ("tpu-vm-tf-2.20.0-pod-pjrt", "my-tpu", {"TPU_LOAD_LIBRARY": "0"}),
        ("v2-alpha-tpuv6e", "local", {}),
    ],
)
def test_training_gets_its_flags_as_they_are_and_outlives_the_connection(
    call, tmp_path, version, tpu, variables
):
    python = tmp_path / "condconv/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/bash\nprintf '%s\\n' \"$@\" >started\nenv >variables\n"
        "while [[ ! -e end ]]; do sleep 0.05; done\ntouch ended\n"
    )
    python.chmod(0o755)
    bound = [f"--gin_param={AWKWARD}", "--config", "configs/synthetic.gin"]
    *_, launch = printed(call(*flags(version=version, workdir="gs://b/a run"), *bound, "--dry_run"))
    subprocess.run(  # as ssh does: it waits until nobody has its streams any more
        ["bash", "-c", launch[-2].removeprefix("--command=")],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=20,
    )
    folder = tmp_path / "condconv"
    wait_for(folder / "variables")
    assert not (folder / "ended").exists()
    assert (folder / "started").read_text().splitlines() == [
        "train.py",
        f"--tpu={tpu}",
        "--gin_file=configs/digits.gin",
        f"--gin_param={AWKWARD}",
        "--gin_file=configs/synthetic.gin",
        "--workdir=gs://b/a run",
    ]
    environment = set((folder / "variables").read_text().splitlines())
    assert {f"{name}={value}" for name, value in variables.items()} <= environment
    (folder / "end").touch()
    wait_for(folder / "ended")


def wait_for(path: pathlib.Path) -> None:
    limit = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < limit, path
        time.sleep(0.02)


def test_deleting_is_one_command(call, google):
    delete = ["--delete", "--name=my-tpu", *WHERE]
    expected = ["gcloud", "compute", "tpus", "tpu-vm", "delete", "my-tpu", "--quiet", *WHERE]
    assert printed(call(*delete, "--dry_run", **google)) == [expected]
    assert printed(call(*delete, **google)) == noted(google) == [expected]


@pytest.mark.parametrize("step", ["create", "scp", "ssh"])
def test_what_fails_ends_it_and_names_the_costs(call, google, step):
    done = call(*flags(), **google, FAILING=step)
    assert done.returncode == 7
    assert noted(google)[-1][4] == step
    assert "costs money until you delete it" in done.stderr
    assert "tpu_vm.sh --delete --name=my-tpu --zone=us-central2-b" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (flags(name=None), "--name is missing"),
        (flags(zone=None), "--zone is missing"),
        (flags(type=None), "--type is missing"),
        (flags(version=None), "--version is missing"),
        (flags(workdir=None), "--workdir is missing"),
        (flags(gin_file=None), "--gin_file is missing"),
        ([*flags(), "--zone"], "--zone needs a value"),
        ([*flags(), "--zone", "--spot"], "--zone needs a value"),
        ([*flags(), "--zone="], "--zone needs a value"),
        ([*flags(), "--spot=yes"], "--spot takes no value"),
        ([*flags(), "--zoon=x"], "there is no flag --zoon=x"),
        ([*flags(), "stray"], "there is no flag stray"),
        (flags(name="My tpu"), "--name takes small letters"),
        (flags(workdir="runs/x"), "--workdir takes gs://…, not 'runs/x'"),
        (flags(gin_file="configs/none.gin"), "none.gin is not in this checkout's last commit"),
        ([*flags(), "--delete"], "--delete takes only"),
        (["--delete", "--name=a", "--zone=b", "--spot"], "--delete takes only"),
    ],
)
def test_wrong_flags_are_one_line(call, google, arguments, message):
    done = call(*arguments, **google)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("tpu_vm.sh: ")
    assert message in line
    assert not pathlib.Path(google["NOTES"]).exists()


def test_without_gcloud_nothing_is_tried(call, tmp_path):
    for tool in ("bash", "git", "dirname"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    done = call(*flags(), PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "gcloud is not installed" in done.stderr


def test_help_names_every_flag_and_says_that_it_never_ran(call):
    done = call("--help")
    assert done.returncode == 0
    assert "never ran against Google Cloud" in done.stdout
    for flag in [*NEEDED, "config", "project", "spot", "git", "gin_param", "delete", "dry_run"]:
        assert f"--{flag}" in done.stdout
