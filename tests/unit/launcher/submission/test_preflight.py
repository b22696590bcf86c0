"""What is known before a job is queued: profiles, the cluster's answer, cost, the batch script."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launcher.frozen.freeze import read_provenance
from launcher.frozen.source import code_fingerprint, freeze_code
from launcher.journal.events import record
from launcher.slurm import cluster as cluster_module
from launcher.slurm.cluster import cluster_problems, minutes, partitions
from launcher.slurm.sbatch import batch_script, python_command, sbatch_parameters
from launcher.slurm.scheduler import cancel
from launcher.submission.campaign import plan_order, submit_order
from launcher.submission.control import resume
from launcher.submission.preflight import Order
from launcher.submission.submit import handed_to_slurm
from resnet_dist.config.load import config_from_dict, dump_config, load_config, load_frozen
from resnet_dist.config.profiles import KEYS, load_profile, profile_folders, profile_names
from resnet_dist.config.schema import Config, ConfigError
from resnet_dist.run.paths import RunPaths
from tests.unit.launcher import slurm_stand_in
from tests.unit.launcher.stand_in import make_run

ROOT = Path(__file__).resolve().parents[4]
RECIPE = ROOT / "configs" / "digits" / "quickstart.yaml"
IMAGENET = ROOT / "configs" / "imagenet" / "resnet50_he2015.yaml"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster with GPUs in front of PATH; the folder of its programs."""
    folder = slurm_stand_in.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    return folder


def asking(**launch: object) -> Config:
    return config_from_dict({"name": "x", "data": "d", "batch_size": 12_288, "bn_batch": 32,
                             "launch": launch})


# -- profiles --------------------------------------------------------------------------------------

def test_every_profile_of_the_project_is_valid_and_says_what_it_is() -> None:
    names = [path.stem for path in (ROOT / "slurm").glob("*.yaml")]
    assert {"gpu", "gres", "container", "local"} <= set(names)
    for name in names:
        launch = load_profile(name)["launch"]
        assert launch["partition"]
        assert (ROOT / "slurm" / f"{name}.yaml").read_text().startswith("# ")


def test_a_profile_lies_under_the_recipe_and_the_command_line(tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text("partition: gpu\nranks_per_node: 8\nqos: long\nscratch: $TMPDIR/x\n"
                       "environment: {A: 1}\n")
    config = load_config(RECIPE, [f"cluster={profile}", "launch.qos=short"])
    launch = config.launch
    assert launch.partition == "gpu", "the profile's, where nobody else speaks"
    assert launch.ranks_per_node == 2, "the recipe's"
    assert launch.qos == "short", "the command line's"
    assert launch.environment == {"A": 1}
    assert config.data.stage_dir == "$TMPDIR/x"
    assert launch.cluster == str(profile)
    assert load_config(RECIPE, [f"launch.cluster={profile}", "launch.qos=short"]) == config
    assert config_from_dict(yaml.safe_load(dump_config(config))) == config, "resolved for good"


def test_the_users_own_profile_goes_before_the_projects(cluster: Path) -> None:
    own, _ = profile_folders()
    own.mkdir(parents=True)
    (own / "gpu.yaml").write_text("partition: mine\n")
    assert load_profile("gpu") == {"launch": {"partition": "mine"}}
    (own / "another.yaml").write_text("{}\n")
    assert {"another", "gpu", "gres", "local"} <= set(profile_names())


@pytest.mark.parametrize(("text", "message"), [
    ("partitoin: gpu", "partitoin = gpu: unknown key; did you mean 'partition'"),
    ("nodes: 4", "nodes = 4: unknown key"),
    ("cpus_per_rank: many", "cpus_per_rank = many: "),
    ("gpu_request: gress", "gpu_request = gress: "),
    ("environment: {1A: x}", "environment.1A = x: a variable's name"),
    ("environment: {A: $HOME}", "($VARS belong into launch.setup)"),
    ("options: {time: 5}", "options.time = 5: is decided by launch.time_minutes"),
    ("options: {--exclude: n1}", "options.--exclude = n1: write sbatch's long option without"),
    ("gpu_request: none\ngpu_type: a100", "gpu_type = a100: is asked for by"),
    ("scratch: 7", "scratch = 7: name a folder"),
    ("partition: two words", "partition = two words: "),
    ("- a list", "expected `key: value` lines"),
    ("partition: [", "cannot be read")])
def test_a_wrong_profile_is_named_with_key_value_and_remedy(tmp_path: Path, text: str,
                                                            message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(RECIPE, [f"cluster={path}"])
    assert str(refused.value).startswith(f"cluster = {path}: {path}: ")
    assert message in str(refused.value)


def test_resume_may_move_to_another_cluster(tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    profile = tmp_path / "other.yaml"
    profile.write_text("partition: elsewhere\nqos: long\n")
    run, config = make_run(tmp_path / "run", partition="here", qos="short", ranks=2)
    record(run, "submitted", where="local", nodes=1, steps=config.steps, batch_size=64)
    record(run, "stopped", step=20, cause="")
    monkeypatch.setattr("launcher.submission.control.submit", lambda *_, **__: "1")
    freeze_code(run)
    resume(run, [f"cluster={profile}", "launch.qos=now"], local=True)
    launch = load_frozen(run.config).launch
    assert (launch.partition, launch.qos, launch.ranks_per_node) == ("elsewhere", "now", 2)


def test_a_missing_profile_is_answered_with_the_nearest(cluster: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster = grs: no such profile; did you mean 'gres'"):
        load_config(RECIPE, ["cluster=grs"])
    with pytest.raises(ConfigError, match=r"cluster = no/such.yaml: no such file"):
        load_config(RECIPE, ["cluster=no/such.yaml"])


def test_the_guide_explains_every_key_of_a_profile() -> None:
    guide = (ROOT / "docs" / "cluster-guide.md").read_text()
    missing = [key for key in KEYS if f"`{key}`" not in guide]
    assert not missing


# -- what sbatch is told ---------------------------------------------------------------------------

@pytest.mark.parametrize(("launch", "line"), [
    ({}, "--gpus-per-node=8"),
    ({"gpu_type": "a100"}, "--gpus-per-node=a100:8"),
    ({"gpu_request": "gres"}, "--gres=gpu:8"),
    ({"gpu_request": "gres", "gpu_type": "a100"}, "--gres=gpu:a100:8"),
    ({"gpu_request": "none"}, None)])
def test_each_dialect_asks_for_gpus_in_its_own_words(tmp_path: Path, cluster: Path, launch: dict,
                                                     line: str | None) -> None:
    script = batch_script(asking(ranks_per_node=8, gpus_per_rank=1, **launch),
                          RunPaths(tmp_path / "x"))
    asked = re.findall(r"^#SBATCH (--g\S+)$", script, re.M)
    assert asked == ([line] if line else [])


def test_lines_of_the_environment_come_in_order_and_are_quoted(tmp_path: Path,
                                                               cluster: Path) -> None:
    config = asking(modules=["cuda/12.6", "a;b"], environment={"A": "x y", "B": 3},
                    setup=["ulimit -n 4096"], options={"reservation": "friday"})
    script = batch_script(config, RunPaths(tmp_path / "it's"))
    wanted = ["#SBATCH --reservation=friday", "trap '' TERM USR1 USR2",
              "module load cuda/12.6 || exit 1", "module load 'a;b' || exit 1", "export A='x y'",
              "export B=3", "ulimit -n 4096", "export PYTHONSAFEPATH=1", "srun "]
    places = [script.index(line) for line in wanted]
    assert places == sorted(places)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert shlex.quote(str(tmp_path / "it's" / "code")) in script


def test_a_module_that_does_not_load_ends_the_job() -> None:
    setup = sbatch_parameters(asking(modules=["nothing/1.0"]))["slurm_setup"]
    done = subprocess.run(["bash", "-c", "\n".join([*setup, "echo went on"])],
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert "went on" not in done.stdout


def test_a_container_wraps_the_jobs_python_and_sees_what_the_job_needs(tmp_path: Path,
                                                                       cluster: Path) -> None:
    """With a stand-in for apptainer, which notes its words and runs the rest."""
    image = tmp_path / "image.sif"
    image.write_text("")
    slurm_stand_in.program(cluster, "apptainer", 'while [ "$1" != ' + str(image) +
                           ' ]; do shift; done; shift; exec "$@"')
    config = asking(ranks_per_node=8, gpus_per_rank=1, container=str(image),
                    container_python=sys.executable, container_options=["--bind=/etc/slurm"])
    run = RunPaths(tmp_path / "x")
    script = batch_script(config, run)
    command = python_command(config, run.root)
    assert command is not None
    assert f"{command} -u -m submitit.core._submit {run.submitit}" in script
    assert 'export APPTAINERENV_PYTHONPATH="$PYTHONPATH"' in script
    done = subprocess.run(["bash", "-c", f"{command} -c 'print(6 * 7)'"], capture_output=True,
                          text=True)
    assert done.stdout == "42\n", done.stderr
    called = (cluster / "calls").read_text()
    data = Path("d").absolute()
    assert f"exec --nv --bind={run.root} --bind={data} --bind=/etc/slurm {image}" in called
    with pytest.raises(ConfigError, match=r"launch.container = /no.sif: no such file"):
        python_command(asking(container="/no.sif"), None)


def test_pyxis_is_asked_by_srun(tmp_path: Path, cluster: Path) -> None:
    script = batch_script(asking(container="nvcr.io/x:1", container_runtime="pyxis"),
                          RunPaths(tmp_path / "x"))
    assert "--container-image=nvcr.io/x:1" in script
    data = Path("d").absolute()
    assert f"--container-mounts={tmp_path}/x:{tmp_path}/x,{data}:{data}" in script
    assert " python3 -u -m submitit.core._submit" in script


# -- the cluster's answer --------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "value"), [
    ("30:00", 30), ("1:00:00", 60), ("2-12", 3600), ("2-00:30:00", 2910), ("infinite", math.inf),
    ("0:30", 0.5), ("n/a", math.inf)])
def test_slurms_times_are_read(text: str, value: float) -> None:
    assert minutes(text) == value


@pytest.mark.parametrize(("gres", "gpus"), [
    ("(null)", {}), ("gpu:8", {"": 8}), ("gpu:a100:8(S:0-1)", {"a100": 8}),
    ("gpu:nvidia_h100-80gb:4,nvme:1", {"nvidia_h100-80gb": 4}), ("gpu:1g.10gb:7", {"1g.10gb": 7}),
    ("gpu:a100:2(S:0),gpu:v100:1(S:1)", {"a100": 2, "v100": 1}), ("license:gpux:3", {})])
def test_gpus_are_read_from_every_dialect_of_gres(gres: str, gpus: dict) -> None:
    assert cluster_module._gpus(gres) == gpus


def test_partitions_are_read_with_their_kinds_of_nodes(cluster: Path) -> None:
    found = partitions()
    assert found is not None
    assert found["cpu"].default
    assert not found["gpu"].default
    assert not found["old"].up
    assert [nodes.gpus for nodes in found["gpu"].nodes] == [{"a100": 8}, {"v100": 4}]
    assert found["debug"].nodes[0].gpus == {"": 2}


GPU = {"partition": "gpu", "gpus_per_rank": 1, "ranks_per_node": 8, "cpus_per_rank": 12}


@pytest.mark.parametrize(("launch", "message"), [
    ({}, None), (GPU, None),
    (GPU | {"gpu_type": "a100", "nodes": 12, "constraint": "ib&zen3"}, None),
    (GPU | {"constraint": "[ib*2|skylake*1]"}, None),
    ({"account": "speech", "qos": "normal"}, None),
    ({"partition": "gpus"}, "launch.partition = gpus: the cluster has no such partition; did you "
                            "mean 'gpu'?"),
    ({"partition": "old"}, "launch.partition = old: is not up"),
    ({"partition": "debug"}, "launch.time_minutes = 1440: partition debug allows 30; a run saves"),
    ({"gpus_per_rank": 1}, "launch.partition = cpu: its nodes have no GPUs; partitions with GPUs: "
                           "debug, gpu"),
    (GPU | {"gpu_type": "h100"}, "launch.gpu_type = h100: partition gpu has a100, v100"),
    (GPU | {"ranks_per_node": 16}, "launch.ranks_per_node = 16: needs 16 GPUs a node, those of "
                                   "partition gpu have 8"),
    (GPU | {"gpu_type": "v100"}, "needs 8 GPUs a node, those of partition gpu have 4"),
    (GPU | {"cpus_per_rank": 13}, "launch.cpus_per_rank = 13: needs 104 cores a node, those of "
                                  "partition gpu have 96"),
    (GPU | {"mem_gb": 2000}, "launch.mem_gb = 2000.0: needs 2.048e+06 MB of memory a node"),
    (GPU | {"nodes": 16}, "launch.nodes = 16: partition gpu has 12 that fit"),
    (GPU | {"constraint": "hdr"}, "launch.constraint = hdr: no node of partition gpu has hdr; "
                                  "their features: ib, skylake, zen3"),
    ({"account": "music"}, "launch.account = music: "),
    ({"qos": "express"}, "launch.qos = express: your account has long, normal"),
    ({"account": "speech", "qos": "long"}, "launch.qos = long: your account has normal")])
def test_what_the_cluster_cannot_do_is_told_before_queueing(cluster: Path, launch: dict,
                                                            message: str | None) -> None:
    problems = cluster_problems(asking(**launch))
    if message is None:
        assert problems == []
    else:
        (problem,) = problems
        assert message in problem


@pytest.mark.parametrize(("launch", "device", "noted"), [
    ({"partition": "gpu"}, "auto", True), ({"partition": "cpu,debug"}, "auto", True),
    ({"partition": "cpu"}, "auto", False), ({}, "auto", False),
    ({"partition": "gpu"}, "cpu", False), ({"partition": "gpu"}, "cuda", False),
    ({"partition": "gpu", "gpu_request": "none"}, "auto", False), (GPU, "auto", False)])
def test_gpus_that_nobody_asks_for_are_noted(cluster: Path, launch: dict, device: str,
                                             noted: bool) -> None:
    said = cluster_module.unasked_gpus(replace(asking(**launch), device=device))
    assert bool(said) is noted
    assert not noted or "device=cuda asks for one a rank" in said


def test_the_note_reaches_the_plan(digits: Path, tmp_path: Path, cluster: Path) -> None:
    words = (f"data={digits}", f"runs={tmp_path}/runs", "launch.partition=gpu", "device=auto")
    plan = plan_order(Order(RECIPE, words))
    assert dict(plan.cost.rows(plan.config))["note"].startswith("device = auto: partition gpu has")


def test_of_several_partitions_one_must_do(cluster: Path) -> None:
    assert cluster_problems(asking(**GPU | {"partition": "debug,gpu"})) == []
    (problem,) = cluster_problems(asking(partition="cpu,gpus"))
    assert "launch.partition = cpu,gpus: the cluster has no such partition; did you" in problem
    assert cluster_problems(asking(**GPU | {"partition": "cpu,old"})) != []


def test_the_users_word_that_slurm_knows_better_is_taken(digits: Path, tmp_path: Path,
                                                         cluster: Path) -> None:
    words = (f"data={digits}", f"runs={tmp_path}/runs", "launch.partition=hidden")
    with pytest.raises(ConfigError, match=r"launch.partition = hidden: the cluster has no such"):
        plan_order(Order(RECIPE, words))
    plan = plan_order(Order(RECIPE, words, trust_slurm=True))
    assert plan.script is not None
    assert "#SBATCH --partition=hidden" in plan.script


def test_accounts_are_not_judged_where_slurm_takes_any(cluster: Path) -> None:
    slurm_stand_in.install(cluster, scontrol="AccountingStorageEnforce = none\n")
    assert cluster_problems(asking(account="music", qos="express")) == []


def test_a_silent_cluster_is_not_judged(cluster: Path) -> None:
    slurm_stand_in.program(cluster, "sinfo", "exit 1")
    assert cluster_problems(asking(partition="whatever")) == []


# -- what is queued together -----------------------------------------------------------------------

def test_what_the_shell_would_make_of_a_job_is_refused_by_its_name(
        digits: Path, tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_TIMELIMIT", "5")
    words = (f"data={digits}", "cluster=gpu", f"runs={tmp_path}/runs")
    with pytest.raises(ConfigError, match=r"SBATCH_TIMELIMIT = 5: .*unset .*launch.time_minutes"):
        plan_order(Order(IMAGENET, words))
    with pytest.raises(ConfigError, match="SBATCH_TIMELIMIT = 5"):
        batch_script(asking(), RunPaths(tmp_path / "x"))


def test_a_job_that_submits_another_hands_nothing_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_MEM_PER_CPU", "SRUN_CPUS_PER_TASK", "RANK"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/mine")
    with handed_to_slurm():
        left = {name for name in os.environ if name.startswith(("SLURM_", "SRUN_", "RANK"))}
    assert left == {"SLURM_CONF"}
    assert os.environ["SLURM_ARRAY_JOB_ID"] == "7", "given back"


def test_a_sweep_larger_than_the_clusters_arrays_is_refused_first(
        digits: Path, tmp_path: Path, cluster: Path) -> None:
    slurm_stand_in.install(cluster, scontrol=slurm_stand_in.CONFIG + "MaxArraySize = 3\n")
    words = (f"data={digits}", f"runs={tmp_path}/runs", "launch.partition=cpu")
    plan_order(Order(RECIPE, words, sweep=("seed=0,1,2",)))
    with pytest.raises(ConfigError, match="makes 4 runs, and the cluster takes arrays of at most"):
        submit_order(Order(RECIPE, words, sweep=("seed=0,1,2,3",)))
    assert not (tmp_path / "runs").exists()


def test_a_sweep_shares_its_code_and_a_refused_evaluation_names_the_training(
        digits: Path, tmp_path: Path, cluster: Path) -> None:
    """sbatch takes the array, and refuses what comes after."""
    slurm_stand_in.program(cluster, "sbatch", f"[ -e {cluster}/once ] && {{ echo 'sbatch: error: "
                           f"QOSMaxSubmitJobPerUserLimit' >&2; exit 1; }}; touch {cluster}/once; "
                           "echo 'Submitted batch job 12'")
    words = (f"data={digits}", f"runs={tmp_path}/runs", "launch.partition=cpu", "name=s")
    with pytest.raises(ConfigError) as refused:
        submit_order(Order(RECIPE, words, sweep=("seed=0,1",), evaluate=("1crop",)))
    told = str(refused.value)
    assert told.startswith("--eval = 1crop: ")
    assert "QOSMaxSubmitJobPerUserLimit" in told
    assert "the training is queued: s-seed0 as job 12_0, s-seed1 as job 12_1;" in told
    first, second = (RunPaths(tmp_path / "runs" / f"s-seed{seed}") for seed in (0, 1))
    assert first.code.joinpath("launcher/job.py").samefile(second.code / "launcher/job.py")
    assert code_fingerprint(second.code) == read_provenance(second)["code"]["sha256"]
    assert read_provenance(second)["sweep"]["values"] == {"seed": "1"}
    assert read_provenance(second)["config"]["seed"] == 1


def test_a_controller_that_is_away_is_told_in_words(cluster: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def late(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 15)

    monkeypatch.setattr(subprocess, "run", late)
    assert cancel("5", kill=True) == "timed out after 15 s"


# -- dry run ---------------------------------------------------------------------------------------

def test_a_dry_run_shows_the_plan_and_leaves_no_trace(digits: Path, tmp_path: Path,
                                                      cluster: Path) -> None:
    order = Order(IMAGENET, (f"data={digits}", "cluster=gpu", f"runs={tmp_path}/runs", "name=new"))
    plan = plan_order(order)
    assert plan.script is not None
    assert "#SBATCH --partition=gpu" in plan.script
    assert plan.slurm.startswith("would start it at 2026-11-22T03:00:00")
    told = plan.as_json()
    assert told["config"]["launch"]["partition"] == "gpu"
    assert told["estimate"]["steps"] == 600_000
    assert not (tmp_path / "runs").exists()
    assert "sbatch --test-only" in (cluster / "calls").read_text()


def test_slurms_own_refusal_ends_a_dry_run(digits: Path, tmp_path: Path, cluster: Path) -> None:
    slurm_stand_in.program(cluster, "sbatch", "echo 'allocation failure: no licence' >&2; exit 1")
    with pytest.raises(ConfigError, match=r"SLURM would refuse the job \(allocation failure: no"):
        plan_order(Order(IMAGENET, (f"data={digits}", "cluster=gpu", f"runs={tmp_path}/runs")))
