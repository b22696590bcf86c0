#!/usr/bin/env bash
# A real SLURM on one machine: munge, MariaDB, slurmdbd, slurmctld and four slurmd (n1..n4).
#
#   slurm/local_cluster.sh up [--install] [--prefix DIR]   start it, wait until all nodes are idle
#   slurm/local_cluster.sh status [--prefix DIR]           exit code 0 when it is up, 3 when not
#   slurm/local_cluster.sh env [--prefix DIR]              eval "$(slurm/local_cluster.sh env)"
#   slurm/local_cluster.sh down [--purge] [--prefix DIR]   end every process it started
#
# In: Debian's packages, root. Out: a cluster that listens on 127.0.0.1 alone and keeps its
# configuration, state and logs under one prefix; nothing under /etc/slurm is read or written.
# The one trace outside the prefix is a line in /etc/hosts (node names must resolve, or the
# rendezvous of a job hangs); `down` removes it. State survives `down` unless --purge is given,
# so that job ids go on counting and sacct remembers.
set -euo pipefail

NODES=(n1 n2 n3 n4)
CPUS_PER_NODE=2
PREFIX=/var/lib/resnet-dist-slurm  # not in /tmp, where others could lay links before
INSTALL=no
PURGE=no
export PATH="$PATH:/usr/sbin:/sbin"

say() { printf '%s\n' "local_cluster: $*" >&2; }
die() { say "$*"; exit "${CODE:-1}"; }

main() {
    local verb=${1:-help}
    [ $# -gt 0 ] && shift
    while [ $# -gt 0 ]; do
        case $1 in
            --prefix) [ $# -ge 2 ] || CODE=2 die "--prefix: name a directory"
                      PREFIX=$(realpath -m -- "$2"); shift 2 ;;
            --install) INSTALL=yes; shift ;;
            --purge) PURGE=yes; shift ;;
            *) CODE=2 die "$1: unknown option; see the head of $0" ;;
        esac
    done
    # The path goes into files that split at white space and commas, and into socket addresses,
    # which end at 107 bytes.
    [[ $PREFIX =~ ^/[A-Za-z0-9_./-]{1,70}$ ]] ||
        CODE=2 die "--prefix $PREFIX: use at most 70 of the characters A-Z a-z 0-9 _ . / -"
    CONF=$PREFIX/etc/slurm.conf RUN=$PREFIX/run LOG=$PREFIX/log
    case $verb in
        up) up ;;
        down) down ;;
        status) status ;;
        env) environment ;;
        *) sed -n '2,14s/^# \{0,1\}//p' "$0"; [ "$verb" = help ] || exit 2 ;;
    esac
}

# ---------------------------------------------------------------- verbs

up() {
    [ "$(id -u)" = 0 ] || die "up: slurmd starts jobs as their users and so needs root;" \
        "run it as root (tests that need SLURM skip otherwise)"
    need_packages
    mkdir -p "$PREFIX"
    [ -z "$(find "$PREFIX" -maxdepth 0 \( -not -user 0 -o -perm /022 -o -type l \))" ] ||
        CODE=2 die "--prefix $PREFIX: must be a folder that root alone may write to"
    exec 9>"$PREFIX/lock"
    flock -w 120 9 || die "up: another up or down of $PREFIX has been running for two minutes"
    if is_up; then say "already up; eval \"\$($0 env --prefix $PREFIX)\""; return; fi
    stop_everything  # what an interrupted `up` or a crash may have left
    trap 'code=$?; [ $code = 0 ] || { say "up failed; ending what was started"; stop_everything; }' EXIT
    local started=$SECONDS
    write_configuration
    add_hosts_line
    start_munge
    start_mariadb
    start slurmdbd "$CONF" slurmdbd -D
    wait_for slurmdbd 30 tcp_open "$PORT_DBD"
    start slurmctld "$CONF" slurmctld -D
    local node
    for node in "${NODES[@]}"; do start "slurmd-$node" "$CONF" slurmd -D -N "$node"; done
    wait_for slurmctld 30 controller_answers
    wait_for slurmctld 60 all_nodes_idle
    wait_for slurmdbd 30 accounting_answers
    trap - EXIT
    say "up after $((SECONDS - started)) s: $(printf '%s ' "${NODES[@]}")under $PREFIX"
    say "use it: eval \"\$($0 env --prefix $PREFIX)\""
}

down() {
    if [ -d "$PREFIX" ]; then
        exec 9>"$PREFIX/lock"
        flock -w 120 9 || die "down: another up or down of $PREFIX is still running"
    fi
    stop_everything
    [ "$PURGE" = no ] || rm -rf -- "$PREFIX"
    say "down"
}

status() {
    local name pid code=0
    for name in munged mariadbd slurmdbd slurmctld "${NODES[@]/#/slurmd-}"; do
        if pid=$(alive "$name"); then printf '%-10s running, pid %s\n' "$name" "$pid"
        else printf '%-10s not running\n' "$name"; code=3; fi
    done
    if [ $code = 0 ]; then SLURM_CONF=$CONF timeout 10 sinfo || code=3; fi
    return $code
}

environment() {
    [ -f "$CONF" ] || CODE=3 die "env: no cluster under $PREFIX; run: $0 up --prefix $PREFIX"
    printf 'export SLURM_CONF=%s\n' "$CONF"
}

# ---------------------------------------------------------------- packages

need_packages() {
    local program missing=()
    for program in munged mariadbd mariadb-install-db slurmdbd slurmctld slurmd sbatch sacct; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    [ -n "$(find /usr/lib -name accounting_storage_mysql.so -path '*slurm*' -print -quit)" ] ||
        missing+=(accounting_storage_mysql.so)
    [ ${#missing[@]} -gt 0 ] || return 0
    local install; install=$(realpath "$(dirname "$0")/../install.sh")
    [ "$INSTALL" = yes ] || CODE=4 die "missing: ${missing[*]}. Install them with
    $install --test --native-only
or let this script do it: $0 up --install"
    "$install" --test --native-only >&2 || die "install.sh failed"
    hash -r
}

# ---------------------------------------------------------------- configuration

write_configuration() {
    umask 022
    mkdir -p "$PREFIX"/{etc,log,run,state,spool,db}
    chmod 700 "$PREFIX"/{state,db}
    local host; host=$(hostname -s)
    choose_ports
    local secret=$PREFIX/etc/munge.key
    [ -s "$secret" ] || (umask 077; head -c 1024 /dev/urandom >"$secret")
    [ -s "$PREFIX/etc/db.password" ] ||
        (umask 077; head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$PREFIX/etc/db.password")

    (umask 077; cat >"$PREFIX/etc/slurmdbd.conf" <<CONF_END
AuthType=auth/munge
AuthInfo=socket=$RUN/munge.socket
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$PORT_DBD
SlurmUser=root
LogFile=$LOG/slurmdbd.log
PidFile=$RUN/slurmdbd.own.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$PORT_DB
StorageUser=slurm
StoragePass=$(cat "$PREFIX/etc/db.password")
StorageLoc=slurm_acct
CommunicationParameters=NoInAddrAny
CONF_END
    )

    cat >"$CONF" <<CONF_END
ClusterName=resnetdist
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT_CTLD
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
# A requeued job may start again only when its old credentials have expired: 120 s by default.
AuthInfo=socket=$RUN/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$PREFIX/state
SlurmdSpoolDir=$PREFIX/spool/%n
SlurmctldPidFile=$RUN/slurmctld.own.pid
SlurmdPidFile=$RUN/slurmd-%n.own.pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
PrologFlags=Alloc
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$PORT_DBD
AccountingStoragePass=$RUN/munge.socket
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# The nodes have what this file says, whatever the machine has.
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,bf_resolution=1,requeue_delay=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
RequeueExit=77
KillWait=10
KillOnBadExit=0
InactiveLimit=0
MinJobAge=300
MessageTimeout=10
SlurmctldTimeout=15
SlurmdTimeout=15
CompleteWait=0
BatchStartTimeout=10
ReturnToService=2
MailProg=/bin/true
NodeName=$(node_range) NodeAddr=127.0.0.1 NodeHostname=$host Port=$PORT_SLURMD-$((PORT_SLURMD + ${#NODES[@]} - 1)) CPUs=$CPUS_PER_NODE RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=UNLIMITED PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 State=UP
PartitionName=grace Nodes=ALL MaxTime=UNLIMITED PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 State=UP
PartitionName=high Nodes=ALL MaxTime=UNLIMITED PriorityTier=10 PreemptMode=OFF State=UP
CONF_END
    sed -i "s/Port=$PORT_SLURMD-\([0-9]*\)/Port=[$PORT_SLURMD-\1]/" "$CONF"
}

node_range() { printf 'n[1-%d]' "${#NODES[@]}"; }

# Ports are drawn from the prefix, so that clusters under other prefixes do not meet, and moved on
# where something listens already. They lie below the supervisors' control ports (20000...) and the
# range of outgoing connections (32768...).
choose_ports() {
    local base offset try
    base=$((10000 + $(printf '%s' "$PREFIX" | cksum | cut -d' ' -f1) % 350 * 20))
    for try in $(seq 0 20 2000); do
        PORT_DB=$((base + try)) PORT_DBD=$((base + try + 1)) PORT_CTLD=$((base + try + 2))
        PORT_SLURMD=$((base + try + 3))
        for offset in $(seq 0 $((2 + ${#NODES[@]}))); do
            tcp_open $((base + try + offset)) && continue 2
        done
        return 0
    done
    die "no seven free ports in a row between $base and $((base + 2000))"
}

HOSTS_MARK="# resnet-dist local cluster"

add_hosts_line() { rewrite_hosts "127.0.0.1 ${NODES[*]} $HOSTS_MARK $PREFIX"; }

remove_hosts_line() { ! grep -qF "$HOSTS_MARK $PREFIX" /etc/hosts || rewrite_hosts; }

# Replace this cluster's line by $1, and drop those of clusters whose prefix is gone. Other clusters
# may do the same at this moment. /etc/hosts may be a bind mount, which cannot be replaced by
# renaming: it is written in place.
rewrite_hosts() {
    local line owner rest=
    exec 8>>/etc/hosts
    flock 8
    while IFS= read -r line || [ -n "$line" ]; do
        if [[ $line == 127.*"$HOSTS_MARK "* ]]; then
            owner=${line##*"$HOSTS_MARK "}
            [ "$owner" != "$PREFIX" ] && [ -d "$owner" ] || continue
        fi
        rest+=$line$'\n'
    done </etc/hosts
    printf '%s' "$rest${1:+$1$'\n'}" >/etc/hosts
    exec 8>&-
}

# ---------------------------------------------------------------- daemons

start_munge() {
    # --force: the prefix may lie in /tmp, which others may write to; the key itself is 0600.
    start munged "" munged --foreground --force --num-threads=4 --key-file="$PREFIX/etc/munge.key" \
        --socket="$RUN/munge.socket" --pid-file="$RUN/munged.own.pid" \
        --log-file="$LOG/munged.log" --seed-file="$PREFIX/state/munge.seed"
    wait_for munged 15 munge_answers
}

start_mariadb() {
    local password; password=$(cat "$PREFIX/etc/db.password")
    if [ ! -f "$PREFIX/db/ready" ]; then
        install_database || {
            say "mariadb-install-db failed; trying once more. It said:"
            why_no_database >&2
            install_database || die "mariadb-install-db failed twice: $(why_no_database)"
        }
    fi
    start mariadbd "" mariadbd --no-defaults --user=root --datadir="$PREFIX/db" \
        --socket="$RUN/mariadb.socket" --bind-address=127.0.0.1 --port="$PORT_DB" \
        --skip-name-resolve --innodb-buffer-pool-size=64M --innodb-log-file-size=8M \
        --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=2 --innodb-use-native-aio=0 \
        --pid-file="$RUN/mariadbd.own.pid"
    wait_for mariadbd 30 sql "SELECT 1"
    [ -f "$PREFIX/db/ready" ] && return 0
    sql "CREATE DATABASE IF NOT EXISTS slurm_acct;
         CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY '$password';
         GRANT ALL ON slurm_acct.* TO 'slurm'@'127.0.0.1';"
    touch "$PREFIX/db/ready"
}

# No native asynchronous I/O, here and in the server: io_uring and libaio draw on limits of the
# whole machine, which others may have used up, and tables this small gain nothing by them.
install_database() {
    find "$PREFIX/db" -mindepth 1 -delete
    mariadb-install-db --no-defaults --user=root --datadir="$PREFIX/db" --skip-test-db \
        --auth-root-authentication-method=socket --innodb-log-file-size=8M \
        --innodb-buffer-pool-size=16M --innodb-use-native-aio=0 >"$LOG/mariadb-install.log" 2>&1
}

# Its log ends with a page of general advice; the reason stands before it.
why_no_database() {
    grep -m 6 -E "ERROR|signal|what\(\)" "$LOG/mariadb-install.log" || head -n 12 "$LOG/mariadb-install.log"
    df -h "$PREFIX/db"
}

sql() { mariadb --no-defaults --socket="$RUN/mariadb.socket" --user=root -e "$1" >/dev/null; }

# start NAME SLURM_CONF PROGRAM ARGS...: in a session of its own, pid and start time on record.
# RESNET_DIST_CLUSTER marks the daemons and the slurmstepd they start, and no process of a user.
start() {
    local name=$1 conf=$2; shift 2
    env -i PATH="$PATH" HOME=/root LANG=C ${conf:+SLURM_CONF="$conf"} RESNET_DIST_CLUSTER="$PREFIX" \
        setsid "$@" </dev/null >>"$LOG/$name.out" 2>&1 9>&- &
    local pid=$!
    disown "$pid"  # or bash reports its end
    printf '%s %s\n' "$pid" "$(start_time "$pid")" >"$RUN/$name.pid"
}

# Clock ticks since boot at which a process began: with it a recycled pid is never mistaken.
start_time() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

alive() {
    local pid began
    [ -f "$RUN/$1.pid" ] || return 1
    read -r pid began <"$RUN/$1.pid" || return 1
    [ -n "$began" ] && [ "$(start_time "$pid")" = "$began" ] && [ "$(state_of "$pid")" != Z ] || return 1
    printf '%s' "$pid"
}

wait_for() {  # NAME SECONDS COMMAND...
    local name=$1 limit=$((SECONDS + $2)); shift 2
    until "$@" 2>/dev/null; do
        if ! alive "$name" >/dev/null || [ $SECONDS -ge $limit ]; then
            say "$name is not ready ($*); the end of its log:"
            tail -qn 8 "$LOG/$name.log" "$LOG/$name.out" >&2 2>/dev/null || true
            return 1
        fi
        sleep 0.1
    done
}

tcp_open() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
munge_answers() { munge --socket="$RUN/munge.socket" -n >/dev/null; }
controller_answers() { SLURM_CONF=$CONF timeout 5 scontrol ping | grep -q "UP"; }
accounting_answers() { SLURM_CONF=$CONF timeout 5 sacctmgr -n list cluster format=cluster | grep -q resnetdist; }
all_nodes_idle() {
    [ "$(SLURM_CONF=$CONF timeout 5 sinfo -h -N -p main -o '%t' | grep -c '^idle$')" = ${#NODES[@]} ]
}
is_up() {
    local name
    for name in munged mariadbd slurmdbd slurmctld "${NODES[@]/#/slurmd-}"; do
        alive "$name" >/dev/null || return 1
    done
    controller_answers
}

# ---------------------------------------------------------------- the end

stop_everything() {
    # slurmd first: it must not start a job while the steps are being ended. One that cannot reach
    # its controller takes 10 s to obey.
    end 3 "${NODES[@]/#/slurmd-}"
    end_marked slurmstepd
    alive slurmctld >/dev/null && cancel_jobs
    end 15 slurmctld
    end 15 slurmdbd
    end 15 mariadbd
    end 15 munged
    end_marked  # a daemon without a pid file (killed between start and record) has the mark too
    rm -f "$RUN"/*.own.pid "$RUN"/*.socket*
    remove_hosts_line
}

cancel_jobs() {  # so that the next `up` does not start them again
    local jobs
    jobs=$(SLURM_CONF=$CONF timeout 5 squeue -h -o %A 2>/dev/null | sort -u) || return 0
    # shellcheck disable=SC2086  # one word a job
    [ -z "$jobs" ] || SLURM_CONF=$CONF timeout 10 scancel $jobs 2>/dev/null || true
}

# end SECONDS NAME...: TERM, wait, KILL, wait.
end() {
    local limit=$((SECONDS + $1)) name pid; shift
    for name in "$@"; do
        pid=$(alive "$name") || continue
        kill -TERM "$pid" 2>/dev/null || true
        kill -CONT "$pid" 2>/dev/null || true  # a stopped process obeys only when it runs again
    done
    for name in "$@"; do
        while pid=$(alive "$name"); do
            [ $SECONDS -lt $limit ] || kill -KILL "$pid" 2>/dev/null || true
            sleep 0.1
        done
        rm -f "$RUN/$name.pid"
    done
}

# Ends at once: daemons and slurmstepd by their mark, all that descends from them, and processes
# that a job left behind when its own parents ended (slurmd gave them a node name). The tree is
# read before its roots die, because children of a dead slurmstepd can no longer be told apart.
end_marked() {  # [NAME]: of the daemons, those of this name only
    local tries pids
    for tries in $(seq 50); do
        pids=$(marked_tree "${1:-}")
        [ -n "$pids" ] || return 0
        # shellcheck disable=SC2086
        kill -KILL $pids 2>/dev/null || true
        sleep 0.1
    done
    die "processes that do not end: $pids"
}

marked_tree() {
    local file pid parent stat grown variables found=" "
    for file in $(grep -lszE "^(RESNET_DIST_CLUSTER=$PREFIX|SLURM_CONF=$CONF)\$" /proc/[0-9]*/environ); do
        pid=${file#/proc/} pid=${pid%/environ}
        [ "$(state_of "$pid")" != Z ] || continue
        variables=$(tr '\0' '\n' 2>/dev/null <"$file") || continue
        if grep -qxF "RESNET_DIST_CLUSTER=$PREFIX" <<<"$variables"; then
            [[ $(cat "/proc/$pid/comm" 2>/dev/null) == *"$1"* ]] && found+="$pid "
        elif grep -q "^SLURMD_NODENAME=" <<<"$variables"; then
            found+="$pid "
        fi
    done
    [ "$found" != " " ] || return 0
    local table; table=$(ps -eo pid=,ppid=,stat=)
    grown=yes
    while [ $grown = yes ]; do
        grown=no
        while read -r pid parent stat; do
            if [[ $found == *" $parent "* && $found != *" $pid "* && $stat != Z* ]]; then
                found+="$pid " grown=yes
            fi
        done <<<"$table"
    done
    printf '%s' "$found"
}

state_of() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f1; }

main "$@"
