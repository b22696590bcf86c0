"""The 36 faults: what happens, and what has to follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.faults import courses, disks, jobs, ranks
from tests.faults.ground import Ground, Seen

AS_KILLED = "peers fail within 1 s, restart, same bits, at most K = 10 iterations redone"


@dataclass(frozen=True)
class Fault:
    """One row. `instead`: why it is not made as usual, and what was made that comes closest."""

    number: int
    what: str
    expected: str
    make: tuple[Callable[[Ground], Seen], ...]
    instead: str = ""


FAULTS = (
    Fault(1, "SIGKILL of a random rank at a random step", AS_KILLED, (ranks.killed_rank,)),
    Fault(2, "SIGKILL while a checkpoint is written, 100 random delays",
          "what is torn is ignored, what was reported loads", (ranks.killed_while_writing,)),
    Fault(3, "SIGKILL around each rename of a commit; SIGKILL of rank 1 while ZeRO 1 saves",
          "the old or the new one, never neither", (
              disks.killed_between_renames, ranks.killed_while_gathering),
          "there is no `latest` file and no shard of another rank to tear: ranks gather, rank 0 "
          "writes"),
    Fault(4, "ENOSPC: a full tmpfs", "older ones intact, alarm, training goes on",
          (disks.disk_full,)),
    Fault(5, "EIO from fsync", "older ones intact, alarm, training goes on", (disks.disk_error,)),
    Fault(6, "checkpoint truncated", "named, fall back", (disks.truncated_checkpoint,)),
    Fault(7, "one bit of a weight flipped", "named, fall back", (disks.flipped_weight,)),
    Fault(8, "all checkpoints damaged", "stop; never start at 0", (disks.all_damaged,)),
    Fault(9, "one bit of a shard flipped", "the sample is named, stop", (disks.flipped_pixel,)),
    Fault(10, "undecodable JPEG in a shard", "the sample is named, stop",
          (disks.undecodable_jpeg,)),
    Fault(11, "allocation table cut off", "refused when opened", (disks.cut_table,)),
    Fault(12, "a shard removed", "refused before step 1", (disks.removed_shard,)),
    Fault(13, "a shard, and the data set, exchanged between resumes", "refused",
          (disks.swapped_shard,)),
    Fault(14, "corrupt JPEG in a source", "bounded; the file is listed", (disks.corrupt_source,)),
    Fault(15, "SIGKILL of the converter", "what is unfinished never opens",
          (disks.killed_converter,)),
    Fault(16, "exception in a loader thread", "error within 10 s, restart",
          (disks.data_thread,)),
    Fault(17, "scontrol requeue", "saved within KillWait, none redone", (jobs.requeued,)),
    Fault(18, "scancel --signal=USR2", "saved at an agreed step, requeued, none redone",
          (jobs.warned,)),
    Fault(19, "scancel --signal=TERM --full; plain scancel",
          "never requeued; plain: saved; --full: at most K lost", (jobs.cancelled,),
          "--full signals srun too, and srun answers SIGTERM with SIGKILL to its tasks (srun(1)), "
          "however it was started: a task that looked every 0.5 ms never saw the SIGTERM; without "
          "--full the run saves"),
    Fault(20, "time limit, with a warning before it", "saved, requeued, the limit anew",
          (jobs.time_limit,)),
    Fault(21, "preemption by a higher tier, grace 20 s and none",
          "none redone; at most K", (jobs.preempted,)),
    Fault(22, "SIGKILL of slurmd, slurmstepd and ranks of a node",
          "NODE_FAIL; goes on elsewhere", (jobs.lost_node,)),
    Fault(23, "SIGKILL of slurmd alone; its rank frozen as it saves, until the next one trains",
          "the lease refuses the old incarnation's commit", (jobs.lost_slurmd,)),
    Fault(24, "SIGKILL of slurmctld, slurmdbd and MariaDB", "training unaffected, requeue retried",
          (jobs.lost_controller,)),
    Fault(25, "munged stopped while requeueing", "back-off, exit code 77, requeued",
          (jobs.lost_munge,)),
    Fault(26, "SIGSTOP of a rank", "noticed within 60 s from outside: stacks, kill, restart",
          (ranks.stopped_rank,)),
    Fault(27, "STOP/CONT pulses", "a warning, no kill", (ranks.pulses,)),
    Fault(28, "NaN in the weights", "never committed; roll back, bounded, stop",
          (courses.not_a_number,)),
    Fault(29, "world 4, 2, 4", "refused unless told; then the same bits (exact mode)",
          (courses.other_world,)),
    Fault(30, "a rank's clock a day off", "order by step, monotonic timers", (ranks.other_clock,)),
    Fault(31, "two jobs, one directory", "the second ends, naming the first",
          (courses.two_jobs,)),
    Fault(32, "SIGKILL between the curves' flush and the checkpoint; torn last line",
          "every step once", (ranks.torn_curve,)),
    Fault(33, "config, code, package versions edited before a resume", "shown and refused",
          (courses.edited,)),
    Fault(34, "out of memory in a cgroup", "as 1, and named", (ranks.out_of_memory,)),
    Fault(35, "rendezvous port occupied", "another port within 30 s", (ranks.occupied_port,)),
    Fault(36, "20 kills in one run; then a crash loop",
          "same bits; stop after 3 restarts without progress", (ranks.twenty_kills,)),
)
